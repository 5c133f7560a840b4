"""What matrices are held as while a model serves: the types they are stored in, others, or 8 and 4 bits.

Router, norms and embeddings stay as they are: they are small, and all else hangs on them.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from moeforge.errors import UserError
from moeforge.kernels.native.quantised import QuantisedWeight, expert_mlp_quantised, linear_quantised, quantise
from moeforge.moe import Route, Router
from moeforge.moe.bank.mlp import MLPBank

TYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
BITS = {"int8": 8, "int4": 4}
GROUP = {8: 128, 4: 32}
"""Values that share a scale: 4 bits need narrow groups to stay within a percent of the perplexity."""


class HeldLinear(nn.Module):
    """``nn.Linear`` for inference with a quantised weight."""

    def __init__(self, weight: QuantisedWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out] in x's type."""
        y = linear_quantised(x, self.weight).to(x.dtype)
        return y if self.bias is None else y + self.bias


class HeldExperts(nn.Module):
    """The matrices of an ``MLPBank``, quantised: takes the place of its kernel."""

    def __init__(self, up: QuantisedWeight, down: QuantisedWeight) -> None:
        super().__init__()
        self.up, self.down = up, down

    def forward(self, x_TD: Tensor, route: Route, activation: Any) -> Tensor:
        """[T, D] -> [T, D] in x's type."""
        return expert_mlp_quantised(x_TD, route, self.up, self.down, activation).to(x_TD.dtype)


def hold(model: nn.Module, weights: str) -> dict[str, int]:
    """Turns the matrices of experts, attention and dense layers into ``weights``, in place and one module at a time.

    Returns bytes by class: experts, dense, embeddings, router, other. Raises UserError when nothing could be changed.
    """
    if weights in TYPES:
        dtype = TYPES[weights]
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.is_floating_point():
                    module._parameters[name] = nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
    elif weights in BITS and not _quantise(model, BITS[weights]):
        raise UserError(f"no matrix of this model could be held as {weights}: it has no experts or layers of MLPs")
    return bytes_by_class(model)


def _quantise(model: nn.Module, bits: int) -> int:
    changed = 0
    for parent in list(model.modules()):
        if isinstance(parent, Router):
            continue
        if isinstance(parent, MLPBank) and not (parent.config.bias or parent.config.clamp):
            up, down = (quantise(w.detach(), bits, GROUP[bits]) for w in (parent.gate_up_proj, parent.down_proj))
            parent.held = HeldExperts(up, down)
            del parent.gate_up_proj, parent.down_proj
            changed += 1
        for name, child in list(parent.named_children()):
            taken_apart = name == "kv_b_proj"  # latent attention takes its parts to queries and outputs
            if type(child) is nn.Linear and name not in ("output", "gate") and not taken_apart:
                weight = quantise(child.weight.detach(), bits, GROUP[bits])
                setattr(parent, name, HeldLinear(weight, None if child.bias is None else child.bias.detach()))
                changed += 1
    return changed


def weight_of(module: Any) -> tuple[Tensor | QuantisedWeight, Tensor | None]:
    """Weight and bias of a linear module, held or not."""
    return module.weight, module.bias


def held_experts(bank: MLPBank) -> tuple[Tensor | QuantisedWeight, Tensor | QuantisedWeight]:
    """Up and down of a bank, held or not."""
    held = bank.held
    return (held.up, held.down) if held is not None else (bank.gate_up_proj, bank.down_proj)


def bytes_by_class(model: nn.Module) -> dict[str, int]:
    """Bytes in memory of experts, dense matrices, embeddings, router and all else."""
    found = dict.fromkeys(("experts", "dense", "embeddings", "router", "other"), 0)
    seen: set[int] = set()
    for kind, tensor in _tensors(model):
        size = tensor.nbytes
        key = tensor.data_ptr() if isinstance(tensor, Tensor) else id(tensor)
        if key not in seen:
            seen.add(key)
            found[kind] += size
    return found


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor | QuantisedWeight]]:
    routers = {id(module) for router in model.modules() if isinstance(router, Router) for module in router.modules()}
    for name, module in model.named_modules():
        if isinstance(module, HeldExperts):
            yield from (("experts", module.up), ("experts", module.down))
        if isinstance(module, HeldLinear):
            yield "dense", module.weight
        for parameter in module.parameters(recurse=False):
            if id(module) in routers:
                yield "router", parameter
            elif ".banks." in f".{name}.":
                yield "experts", parameter
            elif isinstance(module, nn.Embedding):
                yield "embeddings", parameter
            else:
                yield ("dense" if parameter.dim() > 1 else "other"), parameter
