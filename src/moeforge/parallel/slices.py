"""Slices: attention, MLPs and experts cut across, so that a group of processes holds one of each between them.

Every process of a tensor group has a slice of each matrix: some heads of an attention, some hidden units of an MLP or
of every expert (Megatron-LM, arXiv:1909.08053), but rows of its own. Before such a part the rows of all are gathered,
each process computes what its slice adds, and the sums go back to whose rows they are; gradients take the opposite
way. So no two processes compute a norm, a router or a loss for the same token, and none sends an expert a row that
another one sends it too: DeepSpeed-TED (arXiv:2303.06318, section 4.1) drops such duplicates before an all-to-all and
gathers after it; here there are none to drop.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from moeforge.errors import UserError
from moeforge.kernels.activation import is_gated
from moeforge.models import Decoder, ModelConfig
from moeforge.models.attention import Attention, LatentAttention, Positions, locate
from moeforge.models.config import LayerConfig
from moeforge.models.heads import AllHeads, LatentHeads
from moeforge.moe.bank import Bank, LowRankExperts, MLPExperts
from moeforge.moe.bank.mlp import MLPBank
from moeforge.moe.route import Route
from moeforge.moe.shared import MLP
from moeforge.parallel.exchange import Run, as_computed
from moeforge.parallel.wire import Wire, gather_rows, sum_rows

HEADS = {f"{name}_proj.{kind}": 0 for name in "qkv" for kind in ("weight", "bias")} | {"o_proj.weight": 1, "sinks": 0}
LATENT = {"q_proj.weight": 0, "q_b_proj.weight": 0, "kv_b_proj.weight": 0, "o_proj.weight": 1}
HIDDEN = {"gate_up_proj.weight": 0, "gate_up_proj.bias": 0, "down_proj.weight": 1}
EXPERTS = {"gate_up_proj": 1, "gate_up_bias": 1, "gate_out": 1, "up_proj": 1, "down_proj": 2}
"""The dimension of heads or hidden units, of what has one."""
SLICED = (MLPExperts, LowRankExperts)
"""Banks whose experts have hidden units to cut. Others stay whole, as routed heads do."""


def cuts(model: Decoder) -> dict[str, tuple[nn.Module, dict[str, int], int]]:
    """By name, the modules that can be cut; the dimension of each parameter to be; parts of those called gate and up,
    which lie one after the other."""
    found: dict[str, tuple[nn.Module, dict[str, int], int]] = {}
    for name, module in model.named_modules():
        if isinstance(module, Attention) and isinstance(module.heads, AllHeads):
            found[name] = module, HEADS, 1
        elif isinstance(module, LatentAttention):
            found[name] = module, LATENT, 1
        elif isinstance(module, MLP):
            found[name] = module, HIDDEN, 1 + is_gated(module.activation)
        elif isinstance(module, Bank) and isinstance(module.config, SLICED):
            found[name] = module, EXPERTS, 1 + is_gated(module.config.activation)
    return found


def sliced(model: Decoder, size: int) -> Iterator[tuple[str, int, tuple[tuple[int, ...], ...]]]:
    """(name, dimension, indices of each process of a tensor group) of every parameter that is cut."""
    for name, (module, dims, gates) in cuts(model).items():
        for key, parameter in module.named_parameters():
            if key in dims:
                dim, parts = dims[key], gates if key.startswith("gate_up") else 1
                shares = torch.arange(parameter.shape[dim]).view(parts, size, -1).transpose(0, 1).flatten(1)
                yield f"{name}.{key}", dim, tuple(map(tuple, shares.tolist()))


def share_biases(model: Decoder, size: int) -> None:
    """Biases that no slice has for itself are added once by all ``size`` together. Before banks are copied."""

    def add(last: Any, x: Tensor) -> Tensor:
        return nn.functional.linear(x, last.weight, last.bias / size)

    for module, *_ in cuts(model).values():
        if isinstance(module, MLPBank):
            module.bias_share = 1 / size
        elif not isinstance(module, Bank):
            last: Any = module.down_proj if isinstance(module, MLP) else module.o_proj
            if last.bias is not None:
                last.forward = partial(add, last)


class Slices:
    """The other processes of a tensor group, as the parts of a model that are cut see them."""

    def __init__(self, model: Decoder, group: ProcessGroup, wire: Wire) -> None:
        """The model's parameters have been cut: from now on it asks the others."""
        self.group, self.wire, self.d_model = group, wire, model.config.d_model
        self.ones = [1] * group.size()
        model.register_forward_pre_hook(self._meet, with_kwargs=True)
        for module, *_ in cuts(model).values():
            if isinstance(module, Bank):
                module.forward = partial(self._experts, module.forward)  # type: ignore[method-assign]
                continue
            if isinstance(module, LatentAttention):
                module.num_heads //= group.size()
            module.forward = partial(self._rows, module.forward)  # type: ignore[method-assign]

    def _meet(self, model: Decoder, inputs: tuple[Tensor, ...], named: dict[str, Any]) -> None:
        """A pass begins: how many rows each has, and what attention must know of them."""
        position_BL, document_BL = named["position"], named["document"]
        sizes = self.wire.all_gather(position_BL.new_tensor([len(position_BL)]), self.ones, self.group).tolist()
        told = self.wire.all_gather(torch.stack([position_BL, document_BL.to(position_BL.dtype)], 1), sizes, self.group)
        self.positions = locate(model.config, told[:, 0], told[:, 1], 0)
        self.tokens = [size * position_BL.shape[1] for size in sizes]

    def _rows(self, run: Callable[..., Tensor], x: Tensor, *rest: Any) -> Tensor:
        """[..., D] -> [..., D], of attention or an MLP."""
        sizes = [size * self.d_model // x.shape[-1] for size in self.tokens]  # of experts, rows may be parts of tokens
        all_TD = gather_rows(as_computed(x).flatten(0, -2), sizes, self.group, self.wire)
        whole = all_TD.view(sum(sizes) // x.shape[1:-1].numel(), *x.shape[1:])
        if rest and isinstance(rest[0], Positions):
            rest = (self.positions, *rest[1:])
        return sum_rows(run(whole, *rest).flatten(0, -2), sizes, self.group, self.wire).view_as(x)

    def _experts(self, run: Run, x_TD: Tensor, route: object) -> Tensor:
        """[T, D] -> [T, D], of experts: edges are gathered too.

        Raises UserError for mixed tokens or mixed parameters, which have no edges.
        """
        if not isinstance(route, Route):
            raise UserError("select: soft and merged mix all tokens or all experts: they need a tensor size of 1")
        own = torch.cat([route.counts.new_tensor([len(x_TD)]), route.counts])
        told = self.wire.all_gather(own[None], self.ones, self.group)
        size_R, counts_RE = told[:, 0], told[:, 1:]
        tokens, edges = size_R.tolist(), counts_RE.sum(1).tolist()
        all_TD = gather_rows(as_computed(x_TD), tokens, self.group, self.wire)
        weight_N = gather_rows(route.weight, edges, self.group, self.wire)
        place_N = self.wire.all_gather(route.token if route.slot is None else route.slot, edges, self.group)
        place_N = place_N + ((size_R.cumsum(0) - size_R) * (route.top_k or 1)).repeat_interleave(counts_RE.sum(1))
        expert_N = torch.arange(route.num_experts, device=place_N.device).repeat(len(tokens))
        order_N = expert_N.repeat_interleave(counts_RE.flatten()).argsort(stable=True)
        place_N, ends = place_N[order_N], counts_RE.sum(0).cumsum(0).to(torch.int32)
        slot, token_N = (None, place_N) if route.slot is None else (place_N, place_N // (route.top_k or 1))
        whole = Route(token_N, weight_N[order_N], ends, sum(tokens), route.top_k, slot)
        return route.add_carry(sum_rows(run(all_TD, whole), tokens, self.group, self.wire), x_TD)


def check_slices(config: ModelConfig, size: int) -> None:
    """Raises UserError when something cannot be cut in ``size`` slices, naming it and what would fit, or nothing is."""
    if size == 1:
        return
    widths = [
        width for depth, layer in enumerate(config.all_layers) for width in _widths(config, layer, f"layer {depth}")
    ]
    for where, width in widths:
        if width % size:
            raise UserError(f"{where} = {width} cannot be cut in {size} slices: take a --tp that divides it")


def _widths(config: ModelConfig, layer: LayerConfig, where: str) -> Iterator[tuple[str, int]]:
    """What there is to cut in a layer. Raises UserError for what would need the whole."""
    heads = layer.attention
    if layer.attends and isinstance(heads, AllHeads | LatentHeads):
        yield f"{where}: num_heads", config.num_heads
    if layer.attends and isinstance(heads, AllHeads):
        yield f"{where}: num_kv_heads", config.num_key_heads
        if config.qk_norm == "whole":
            raise UserError(f"{where}: qk_norm: whole is over all heads: it needs a tensor size of 1")
    if layer.moe is None:
        yield f"{where}: d_ff", layer.d_ff
        return
    router = layer.moe.router
    if hasattr(router.gate, "check_banks") or router.select.type in ("soft", "merged"):
        part = (
            f"select: {router.select.type}" if router.select.type in ("soft", "merged") else f"gate: {router.gate.type}"
        )
        raise UserError(f"{where}: {part} asks or mixes whole experts: it needs a tensor size of 1")
    if router.select.reads_importance:
        raise UserError(f"{where}: select: {router.select.type} asks all heads: it needs a tensor size of 1")
    if layer.moe.shared is not None:
        yield f"{where}: shared d_expert", layer.moe.shared.d_ff
    for bank in layer.moe.experts:
        if isinstance(bank, SLICED):
            yield f"{where}: d_expert", bank.d_expert
