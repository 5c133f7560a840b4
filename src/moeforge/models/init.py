"""How weights start: one rule for every matrix, whatever module it sits in."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from moeforge.models.config import FanIn, ModelConfig

WRITES_TO_RESIDUAL = ("o_proj", "down_proj")


@torch.no_grad()
def initialise(model: nn.Module, config: ModelConfig) -> None:
    """Matrices by ``config.init``; vectors, and what a module lists as ``initialised``, as their module made them."""
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim >= 2 and name not in getattr(module, "initialised", ()):
                _matrix(f"{prefix}.{name}", parameter, config)


def _matrix(name: str, weight: nn.Parameter, config: ModelConfig) -> None:
    """A stack of experts [E, out, in] is initialised as E matrices: fan-in is the last dimension."""
    init = config.init
    if isinstance(init, FanIn):
        # An embedding is read row by row, not summed over: its fan-in is d_model's, as the output matrix it is tied to.
        std = (init.scale / weight.shape[-1]) ** 0.5
        nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
        return
    residual = any(part in name for part in WRITES_TO_RESIDUAL)
    depth = config.num_layers * config.num_repeats
    nn.init.normal_(weight, std=init.std / (2 * depth) ** 0.5 if residual else init.std)


class _Unfilled(TorchFunctionMode):
    """Drawing numbers for tensors without memory does nothing. torch would import its compiler to do as much, which
    takes most of a second."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.init.normal_ or func is torch.Tensor.normal_:
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        return func(*args, **(kwargs or {}))


@contextmanager
def without_memory() -> Iterator[None]:
    """Modules made inside have parameters on the meta device: shapes and types alone."""
    with _Unfilled(), torch.device("meta"):
        yield
