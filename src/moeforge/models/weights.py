"""What matrices are held as while a model serves: the types they are stored in, others, or 8 and 4 bits.

8 and 4 bits are for the matrices of experts, attention and dense layers; a head of its own takes 8 bits with either,
since every token reads all of it. Router, norms and embeddings (with a tied head) stay: all else hangs on them.
"""

import logging
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from moeforge.errors import UserError
from moeforge.kernels.native.quantised import Bits, PackedWeight, linear_quantised, quantise
from moeforge.moe import MoE, Router
from moeforge.moe.bank.base import Bank
from moeforge.moe.bank.mlp import MLPBank
from moeforge.moe.select.merged import Merged

TYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
BITS: dict[str, Bits] = {"int8": 8, "int4": 4}
GROUP: dict[Bits, int] = {8: 128, 4: 32}
"""Values that share a scale: 4 bits need narrow groups to stay within a percent of the perplexity."""
EXPERTS = ("gate_up_proj", "down_proj")
"""The matrices of an ``MLPBank``."""
READ_WHOLE = ("gate", "kv_b_proj")
"""Linears that stay: a shared expert's gate, and the matrices that latent attention takes to the queries' side."""


class HeldLinear(nn.Module):
    """``nn.Linear`` for inference with a quantised weight."""

    def __init__(self, weight: PackedWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out] in x's type."""
        y = linear_quantised(x, self.weight).to(x.dtype)
        return y if self.bias is None else y + self.bias


def hold(model: nn.Module, weights: str) -> dict[str, int]:
    """Turns a model into ``weights`` in place, one module at a time: "as stored" changes nothing, types change all.

    Returns bytes by class: experts, dense, embeddings, router, other. Banks that no format of ours holds stay as they
    are, which a line on the log says. Raises UserError when nothing could be changed, or for unknown ``weights``.
    """
    turn(model, weights)
    if weights in BITS:
        banks = {name: module for name, module in model.named_modules() if isinstance(module, Bank)}
        held = [name for name, bank in banks.items() if isinstance(bank, MLPBank) and is_held(bank)]
        if not held and not any(isinstance(module, HeldLinear) for module in model.modules()):
            raise UserError(f"no matrix of this model could be held as {weights}: it has no experts or layers of MLPs")
        stay = [name for name in banks if name not in held and next(banks[name].parameters(), None) is not None]
        if stay:
            kinds = "experts with biases, that are merged, or of another kind than MLPs stay as stored: %s"
            logging.getLogger("moeforge").warning(kinds, ", ".join(stay))
    return bytes_by_class(model)


def turn(module: nn.Module, weights: str) -> None:
    """``hold`` of a model or a part of it, whatever there is to hold; what is held so already stays."""
    if weights in TYPES:
        dtype = TYPES[weights]
        for part in module.modules():
            for name, parameter in part.named_parameters(recurse=False):
                if parameter.is_floating_point():
                    part._parameters[name] = nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
    elif weights in BITS:
        _quantise(module, BITS[weights])
    elif weights != "as stored":
        raise UserError(f"weights are held as stored, {', '.join((*TYPES, *BITS))}, not as {weights}")


def is_held(bank: MLPBank) -> bool:
    """Whether its matrices are in few bits already: quantised as it was opened, or stored so."""
    return not isinstance(bank.gate_up_proj, Tensor)


def check_whole(model: nn.Module) -> None:
    """Raises UserError where experts are in few bits, for what needs all their matrices."""
    if any(isinstance(bank, MLPBank) and is_held(bank) for bank in model.modules()):
        raise UserError("experts are held in few bits: start from the model that this was made of")


def _quantise(model: nn.Module, bits: Bits) -> None:
    merging = [moe for moe in model.modules() if isinstance(moe, MoE) and isinstance(moe.config.router.select, Merged)]
    summed = {id(bank) for moe in merging for bank in moe.banks.children()}  # of new matrices for every group of tokens
    for parent in list(model.modules()):
        if isinstance(parent, Router):
            continue
        own_matrices = id(parent) not in summed
        if isinstance(parent, MLPBank) and is_held(parent):
            continue  # packed on disk: those bits are what was asked for there
        if isinstance(parent, MLPBank) and own_matrices and not (parent.config.bias or parent.config.clamp):
            for name in EXPERTS:
                weight = quantise(getattr(parent, name).detach(), bits, GROUP[bits])
                delattr(parent, name)  # the parameter gives its name to what the kernels take as well
                setattr(parent, name, weight)
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and name not in READ_WHOLE:
                own: Bits = 8 if name == "output" else bits
                weight = quantise(child.weight.detach(), own, GROUP[own])
                setattr(parent, name, HeldLinear(weight, None if child.bias is None else child.bias.detach()))


def bytes_by_class(model: nn.Module) -> dict[str, int]:
    """Bytes in memory of experts, dense matrices, embeddings, router and all else; on the meta device, those to be."""
    found = dict.fromkeys(("experts", "dense", "embeddings", "router", "other"), 0)
    seen: set[int] = set()
    for kind, tensor in _tensors(model):
        size = tensor.nbytes
        key = id(tensor) if not isinstance(tensor, Tensor) or tensor.is_meta else tensor.data_ptr()
        if key not in seen:
            seen.add(key)
            found[kind] += size
    return found


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor | PackedWeight]]:
    routers = {id(module) for router in model.modules() if isinstance(router, Router) for module in router.modules()}
    for name, module in model.named_modules():
        if isinstance(module, MLPBank):
            held = [getattr(module, name) for name in EXPERTS]
            yield from (("experts", weight) for weight in held if not isinstance(weight, Tensor))
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
