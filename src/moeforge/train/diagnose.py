"""Where a number stopped being finite: the message a user needs instead of a loss of nan."""

from collections.abc import Callable
from typing import Any

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
    """Name of the first parameter whose gradient is not finite; empty where all are."""
    for name, parameter in model.named_parameters():
        gradient: Any = parameter.grad
        own = gradient.to_local() if hasattr(gradient, "to_local") else gradient  # of a sharded one, this process' part
        if own is not None and not bool(torch.isfinite(own).all()):
            return name
    return ""
