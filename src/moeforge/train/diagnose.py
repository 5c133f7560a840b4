"""Where a number stopped being finite: the message a user needs instead of a loss of nan."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


@torch.no_grad()
def first_broken_module(model: nn.Module, forward: Callable[[], object]) -> str:
    """Name of the first module, in order of execution, whose output is not finite in a new forward pass."""
    broken: list[str] = []
    hooks = []
    for name, module in model.named_modules():
        if name and not any(True for _ in module.children()):

            def look(_: nn.Module, __: object, output: object, name: str = name) -> None:
                if isinstance(output, Tensor) and not bool(torch.isfinite(output).all()):
                    broken.append(name)

            hooks.append(module.register_forward_hook(look))
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    return broken[0] if broken else "the loss itself (all layers are finite)"


def first_broken_gradient(model: nn.Module) -> str:
    """Name of the first parameter whose gradient is not finite."""
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
            return name
    return "none: the norm itself overflowed"
