"""What ``torch.compile`` is told about functions."""

from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable[..., object])


def constant(function: F) -> F:
    """The function, marked as ``torch.compiler.assume_constant_result`` marks it: a compiled program keeps what it
    returned. torch's own decorator imports the compiler to do so, which takes most of a second of every start."""
    vars(function)["_dynamo_marked_constant"] = True
    return function
