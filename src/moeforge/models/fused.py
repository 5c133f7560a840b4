"""Layers of the usual parts as one call each (``kernels/native/decoder.cpp``): for passes over blocks, on a CPU.

``Block.forward`` stays what a layer means: the fused call is tested against it, and what is not made of these parts
goes through it.
"""

import ctypes
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from moeforge.kernels.activation import is_gated
from moeforge.kernels.apart import apart
from moeforge.kernels.mixed import MixedWeight
from moeforge.kernels.native import decoder as native
from moeforge.kernels.native import engine
from moeforge.kernels.native.quantised import ROWS
from moeforge.kernels.paged import Rows
from moeforge.models.attention import Attention, BlockLayer, Positions, locate
from moeforge.models.block import Block, scaled
from moeforge.models.config import ModelConfig
from moeforge.models.decoder import Blocks, Decoder, Output
from moeforge.models.heads import AllHeads
from moeforge.models.weights import HeldLinear
from moeforge.moe.bank.mlp import MLPBank
from moeforge.moe.gates.row import LinearGate
from moeforge.moe.shared import MLP


class Passes:
    """What the layers of one pass share, made by the first of them."""

    def __init__(self) -> None:
        self._rows: Rows | None = None
        self._pass: native.Pass | None = None

    def of(self, rows: Rows, positions: Positions) -> native.Pass:
        """The same for the same rows."""
        if self._pass is None or rows is not self._rows:
            width = positions.cos.shape[-1]
            self._rows = rows
            self._pass = native.Pass.of(rows, positions.cos.reshape(-1, width), positions.sin.reshape(-1, width))
        return self._pass


def fuse(model: Decoder, blocks: Blocks) -> dict[int, str]:
    """Lets layers of ``model`` run in one call over ``blocks``; returns by depth why others do not."""
    dtype, config, passes = model.embedding.weight.dtype, model.config, Passes()
    refused: dict[int, str] = {}
    if any(_hands_on(layer.moe.router) for layer in config.all_layers if layer.moe):
        return dict.fromkeys(range(len(model.stack)), "routers of this model hand on what they decide")
    for depth, block in enumerate(model.stack):
        assert isinstance(block, Block)
        reason = why_not(block, config, dtype)
        if reason is None:
            blocks.fused[depth] = Fused(block, blocks.layers[depth], config, passes)
        else:
            refused[depth] = reason
    return refused


class Whole:
    """All of a decoder whose every layer is fused: what ``Decoder.forward`` does over blocks, in few calls."""

    def __init__(self, model: Decoder, blocks: Blocks) -> None:
        self.model, self.passes = model, Passes()
        self.layers = native.Layers([fused.layer for _, fused in sorted(blocks.fused.items())])

    def __call__(self, ids_T: Tensor, rows: Rows, logits_of: Tensor) -> Output:
        """Logits of the places asked for, and what every layer's router took."""
        model, config = self.model, self.model.config
        positions = locate(config, rows.position[None], None, None)
        x_TD = scaled(model.embedding(ids_T), config.embedding_scale)
        taken = self.layers.run(self.passes.of(rows, positions), x_TD)
        with apart():
            return Output(model.logits(x_TD[None, logits_of]), {}, {}, dict(enumerate(taken)))


def _hands_on(router: Any) -> bool:
    return hasattr(router.gate, "state_width") and bool(router.gate.state_width(1))


class Fused:
    """One block for C++. What it points to is held here; make it anew when a weight changes its place."""

    def __init__(self, block: Block, cache: BlockLayer, config: ModelConfig, passes: "Passes") -> None:
        """Only for a block that ``why_not`` has nothing against."""
        self.cache, self.passes = cache, passes
        self.held: list[Any] = [block]
        self.layer = native.DecoderLayer(bf16=int(cache.pools[0].dtype == torch.bfloat16), d_model=config.d_model)
        self.layer.eps, self.layer.residual_scale = config.norm_eps, config.residual_scale
        self.layer.as_bytes = int(ROWS == "int8")
        self._attention(block, cache, config)
        self.layer.mlp_norm = self._pointer(block.mlp_norm.weight)
        mlp = block.mlp
        if block.moe is not None:
            self._experts(block.moe)
            shared = block.moe.shared
            mlp = None if shared is None else shared.mlp
            if shared is not None and shared.gate is not None:
                self.layer.mlp_gate = self._linear(shared.gate)
        if mlp is not None:
            gate_up, down = self._linear(mlp.gate_up_proj), self._linear(mlp.down_proj)
            pointwise, gated = engine.POINTWISE[mlp.activation], int(is_gated(mlp.activation))
            self.layer.mlp = native.Mlp(gate_up, down, pointwise, gated)

    def __call__(self, x: Tensor, positions: Positions) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """[1, T, D], changed in place -> itself, experts of each row [T, K], and the ends of their segments [E]."""
        assert self.cache.rows is not None
        (taken,) = self.alone.run(self.passes.of(self.cache.rows, positions), x[0])
        return x, taken

    @cached_property
    def alone(self) -> native.Layers:
        """This layer, to be run by itself."""
        return native.Layers([self.layer])

    def _attention(self, block: Block, cache: BlockLayer, config: ModelConfig) -> None:
        attention, layer = block.attention, self.layer
        assert isinstance(attention, Attention) and block.attention_norm is not None
        layer.attention_norm = self._pointer(block.attention_norm.weight)
        if attention.qk_norm:
            layer.q_norm, layer.k_norm = (self._pointer(n.weight) for n in (attention.q_norm, attention.k_norm))
        layer.whole_norm = int(attention.qk_norm == "whole")
        projections = attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj
        layer.q, layer.k, layer.v, layer.o = (self._linear(projection) for projection in projections)
        keys, values = cache.pools
        width = attention.head_dim
        scale = attention.heads.scale or width**-0.5
        layer.paged = native.Paged(scale=scale, queries=config.num_heads, heads=keys.shape[1], width=width)
        layer.paged.value_width = layer.paged.value_stride = values.shape[3]
        layer.paged.key_stride, layer.paged.block_size = width, keys.shape[2]
        layer.paged.keys, layer.paged.values = keys.data_ptr(), values.data_ptr()
        layer.paged.sinks = self._pointer(attention.sinks.float()) if attention.sinks is not None else None
        layer.paged.window = attention.window or 0
        layer.rotary_width, layer.interleaved = config.rotary_width, int(config.rope_interleaved)
        layer.clip = attention.heads.clip or 0

    def _experts(self, moe: Any) -> None:
        layer, router, bank = self.layer, moe.router, moe.banks[0]
        select, weigh, gate = router.config.select, router.config.weigh, router.gate
        layer.top_k, layer.experts, layer.d_expert = select.k, moe.config.num_experts, bank.config.d_expert
        layer.pointwise = engine.POINTWISE[bank.config.activation]
        layer.gated = int(is_gated(bank.config.activation))
        layer.router = native.matrix(gate.weight.float(), gate.bias, self.held)
        layer.score = native.SCORES[router.config.score.type]
        layer.skip, layer.groups, layer.top_groups = select.skip, select.num_groups, select.top_groups
        layer.ranking = 1 if select.group_rank == "best" else min(2, layer.experts // select.num_groups)
        layer.softmax_chosen, layer.weight_scale = int(weigh.type == "softmax"), weigh.weight_scale
        layer.normalize = int(getattr(weigh, "normalize_weights", False))
        layer.min_total = getattr(weigh, "min_total", 0)
        if router.expert_bias is not None:
            layer.selection_bias = self._pointer(router.expert_bias.float())
        up, down = bank.gate_up_proj, bank.down_proj
        if not isinstance(up, Tensor):
            self.held += [up, down]
            layer.quantised, layer.up, layer.down = 1, ctypes.addressof(up.matrices), ctypes.addressof(down.matrices)
        else:
            layer.up, layer.down = self._pointer(up), self._pointer(down)

    def _linear(self, module: Any) -> native.Matrix:
        return native.matrix(module.weight, module.bias, self.held)

    def _pointer(self, tensor: Any) -> int:
        tensor = tensor.detach().contiguous()
        self.held.append(tensor)
        return tensor.data_ptr()


def why_not(block: Block, config: ModelConfig, dtype: torch.dtype) -> str | None:
    """The first reason why a block is not made of these parts, or None."""
    return next(_reasons(block, config, dtype), None)


def _reasons(block: Block, config: ModelConfig, dtype: torch.dtype) -> Iterator[str]:
    attention, moe = block.attention, block.moe
    if dtype not in engine.TYPES or (missing := engine.missing()):
        yield f"there is no native engine for {dtype}: {missing if dtype in engine.TYPES else 'only float32 and bf16'}"
    if not isinstance(attention, Attention) or not isinstance(attention.heads, AllHeads):
        yield "its attention has other heads"
        return
    norms = [block.mlp_norm, block.attention_norm, *((attention.q_norm, attention.k_norm) if attention.qk_norm else ())]
    if not all(isinstance(norm, nn.RMSNorm) and norm.weight.dtype == dtype for norm in norms):
        yield "its norms are no RMS norms of the model's type"
    if config.momentum:
        yield "it adds with momentum"
    quantised = [m for m in block.modules() if isinstance(m, HeldLinear)]
    if any(m.weight.shape[1] % 128 for m in quantised) or (quantised and dtype != torch.bfloat16):
        yield "quantised products in one call want bf16 rows of a multiple of 128"
    if moe is not None:
        yield from _of_experts(moe, dtype)
    mlps = [block.mlp] if block.mlp is not None else []
    if any(mlp.activation not in engine.POINTWISE for mlp in mlps):
        yield "its MLP has another activation"


def _of_experts(moe: Any, dtype: torch.dtype) -> Iterator[str]:
    config, router = moe.config, moe.router
    banks = moe.banks
    if len(banks) != 1 or type(banks[0]) is not MLPBank or banks[0].config.bias or banks[0].config.clamp:
        yield "its experts are not one stack of plain MLPs"
        return
    if (
        config.heads > 1
        or config.token_block
        or config.shortcut
        or (config.shared and config.shared.mix.type not in ("sum", "gated"))
    ):
        yield "its layer is cut or mixed in another way"
    gate, parts = router.gate, router.config
    if type(gate) is not LinearGate or gate.previous is not None or gate.of_token:
        yield "its gate is no linear map of the row"
    score = parts.score
    plain = score.type == "softmax" and score.temperature == 1.0 and not score.standardize and score.num_groups == 1
    if not (plain or score.type in ("sigmoid", "logits")):
        yield "its scores are computed in another way"
    if parts.select.type != "top_k" or parts.capacity:
        yield "it selects in another way than the k best"
    if parts.weigh.type not in ("scores", "softmax") or getattr(parts.weigh, "over", "chosen") != "chosen":
        yield "it weighs in another way"
    if any(part.training for part in router.noise):
        yield "its router is in training mode"
    if moe.shared is not None and not isinstance(moe.shared.mlp, MLP):
        yield "its shared branch is no MLP"
    up: Any = banks[0].gate_up_proj
    if isinstance(up, MixedWeight) and up.whole:
        yield "some of its experts are whole, others packed"
        return
    if not isinstance(up, Tensor) and (dtype != torch.bfloat16 or any(size % 128 for size in up.shape[1:])):
        yield "quantised experts in one call want bf16 and multiples of 128"
