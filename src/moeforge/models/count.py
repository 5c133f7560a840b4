"""Parameters, FLOPs and memory of a config, counted on the meta device: nothing is allocated.

Three conventions are in use for "parameters": all of them; without the input embedding; without input embedding and
output matrix. All three are given, in total and active per token, so that any published number can be compared.
"""

import math
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import nn

from moeforge.models.attention import Attention, LatentAttention
from moeforge.models.config import LayerConfig, ModelConfig
from moeforge.models.decoder import Decoder
from moeforge.models.heads import AllHeads, RoutedHeads
from moeforge.moe import MoE


@dataclass(frozen=True)
class Count:
    """Parameters by the three conventions."""

    all: int
    without_input_embedding: int
    without_embeddings: int


@dataclass(frozen=True)
class Size:
    """What a model costs."""

    total: Count
    active: Count
    """Parameters a token uses: dense ones, of each bank the mean number of chosen experts, of a gate's table a row.

    With repeats, those of one pass.
    """
    flops_per_token: int
    """Forward pass at full context: two per active weight of a matrix, and attention over half the context."""
    weight_bytes: int
    optimizer_bytes: int
    """Training with AdamW: float32 weights, gradients and two moments."""
    kv_bytes_per_token: int
    """Of a full context; layers with a window keep their last tokens alone."""


def measure(config: ModelConfig, bytes_per_weight: int = 4, seq_len: int | None = None) -> Size:
    """Counts ``config``; ``seq_len`` is the context that FLOPs are counted at (default: ``max_seq_len``)."""
    with torch.device("meta"):
        model = Decoder(config)
    total, table = sum(p.numel() for p in model.parameters()), model.embedding.weight.numel()
    routed = {id(part): part for part in (*model.moe_layers.values(), *model.attentions.values())}.values()
    idle, context = sum(map(_idle, routed)), seq_len or config.max_seq_len
    kept = sum(_kept(layer, config, context) for layer in config.applied_layers if layer.attends)
    # The input embedding is a look-up; a tied one is still multiplied with, once, at the output.
    layers = sum(sum(astuple(work)) for work in layer_work(model, context))
    return Size(
        total=_count(total, table, config),
        active=_count(total - round(idle) - _unread(model), table, config),
        flops_per_token=round(2 * table + layers),
        weight_bytes=bytes_per_weight * total,
        optimizer_bytes=16 * total,
        kv_bytes_per_token=round(bytes_per_weight * kept),
    )


@dataclass(frozen=True)
class LayerWork:
    """Forward FLOPs per token of one layer's parts."""

    projections: float
    """Of attention, with those of its heads' router."""
    scores: float
    """Queries with keys, and those with values."""
    routing: float
    """What a token's way to its experts is found with."""
    beside: float
    """The MLP, or the branch that every token takes beside experts."""
    experts: float
    """Of a token's experts, were all equally likely."""


def layer_work(model: Decoder, seq_len: int) -> list[LayerWork]:
    """Of every layer that a token passes, in order; ``model`` may be on the meta device."""
    return [
        _layer_work(block, layer, model.config, seq_len)
        for block, layer in zip(model.stack, model.config.applied_layers, strict=True)
    ]


def _layer_work(block: Any, layer: LayerConfig, config: ModelConfig, seq_len: int) -> LayerWork:
    attention, moe = block.attention, block.moe
    projections = 0.0 if attention is None else 2 * _work(attention)
    scores = 0.0 if attention is None else 2 * _attended(layer, config, seq_len)
    if moe is None:
        return LayerWork(projections, scores, 0.0, 2 * (_matrices(block) - _known(attention)), 0.0)
    routed, shared = _used(moe), moe.d_model / moe.row_width * _known(moe.shared)
    beside = _matrices(block) - _known(attention) - _matrices(moe) + shared
    scores += _looks_again(moe, config, seq_len)
    return LayerWork(projections, scores, 2 * (_work(moe) - routed - shared), 2 * beside, 2 * routed)


def _known(module: nn.Module | None) -> int:
    return 0 if module is None else _matrices(module)


def _attended(layer: LayerConfig, config: ModelConfig, seq_len: int) -> float:
    """Multiplications per token with keys and values: of half the context, or of what a window leaves of it."""
    seen = seq_len / 2
    if layer.window is not None and layer.window < seq_len:
        seen = layer.window - layer.window**2 / (2 * seq_len)
    return layer.attention.per_token(config) * sum(layer.attention.widths(config)) * seen


def _kept(layer: LayerConfig, config: ModelConfig, seq_len: int) -> float:
    """Numbers that a cache holds per token of a full context; a window holds no more than its own."""
    share = 1.0 if layer.window is None else min(1.0, layer.window / seq_len)
    return share * sum(heads * width for heads, width in layer.attention.cached(config))


def _looks_again(moe: MoE, config: ModelConfig, seq_len: int) -> int:
    """FLOPs per token of queries, keys and their products where a router asks which tokens attention goes to."""
    if not moe.config.router.select.reads_importance:
        return 0
    projections = 2 * config.d_model * (config.num_heads + config.num_key_heads) * config.size_of_head
    return projections + config.num_heads * config.size_of_head * seq_len


def _count(parameters: int, table: int, config: ModelConfig) -> Count:
    """A tied table counts once: without the input embedding it is gone, as the output uses the same weights."""
    output = 0 if config.tie_embeddings else table
    return Count(parameters, parameters - table, parameters - table - output)


def _work(module: MoE | Attention | LatentAttention) -> float:
    """Multiplications with weights per token, were every expert equally likely."""
    if not isinstance(module, MoE):
        return _matrices(module) - _idle(module)
    each_row = sum(_matrices(part) for part in (module.router, module.shared) if part is not None)
    once = sum(weight.numel() for weight in (module.split_proj, module.merge_proj) if weight is not None)
    return _used(module) + module.d_model / module.row_width * each_row + once


def _idle(module: MoE | Attention | LatentAttention) -> float:
    """Weights of experts that a token does not use, were every expert equally likely.

    None where experts share weights and a token's experts multiply with as many as there are.
    """
    if isinstance(module, MoE):
        named = list(module.banks.named_parameters())
        biases = sum(p.numel() for name, p in named if name.endswith("bias"))
        share = module.config.router.select.mean_experts(module.config.num_experts) / module.config.num_experts
        matrices = sum(p.numel() for _, p in named) - biases
        return max(0.0, matrices - _used(module)) + (1 - share) * biases
    heads = module.heads
    if not isinstance(heads, RoutedHeads):
        return 0.0
    share = heads.router.select.mean_experts(heads.num_experts) / heads.num_experts
    return (1 - share) * (_matrices(module.q_proj) + _matrices(module.o_proj))


def _used(moe: MoE) -> float:
    """Multiplications of a token's experts, of all its heads."""
    config, costs = moe.config, moe.config.costs(moe.row_width)
    fixed = sum(bank.fixed_cost(moe.row_width) for bank in config.experts if hasattr(bank, "fixed_cost"))
    chosen = config.router.select.mean_experts(config.num_experts) * sum(costs) / config.num_experts
    gate = config.router.gate
    asked = gate.expert_work(config.experts, moe.row_width) if hasattr(gate, "expert_work") else 0
    return moe.d_model / moe.row_width * (chosen + fixed + asked)


def _matrices(module: nn.Module) -> int:
    """Multiplications of a row with all weights: none with vectors, nor with tables that a token reads rows of.

    A module's ``times`` tells weights that a row is multiplied with more than once.
    """
    total = 0
    for part in module.modules():
        looked_up, times = getattr(part, "looked_up", {}), getattr(part, "times", {})
        for name, weight in part.named_parameters(recurse=False):
            if weight.ndim >= 2 and name not in looked_up:
                total += times.get(name, 1) * weight.numel()
    return total


def _unread(model: Decoder) -> int:
    """Weights that a token does not read, in tables that it reads some rows of, as a module's ``looked_up`` says; a
    router is asked once for each of a token's heads."""
    asked = {moe.router: moe.config.heads for moe in model.moe_layers.values()}
    tables = ((module, *table) for module in model.modules() for table in getattr(module, "looked_up", {}).items())
    return sum(getattr(module, name)[rows * asked.get(module, 1) :].numel() for module, name, rows in tables)


def dense_twin(config: ModelConfig) -> ModelConfig:
    """The dense decoder of the same shape whose FLOPs per token just reach those of ``config``.

    Each layer with experts becomes an MLP wide enough for what router, chosen experts and shared branch cost, and for
    what routed heads cost above plain attention; widths round up, so that a comparison at equal FLOPs never favours
    the experts.
    """
    of_experts = ("moe", "attention", "layers", "momentum", "domains")
    kept = {name: getattr(config, name) for name in ModelConfig.model_fields if name not in of_experts}
    with torch.device("meta"):
        model = Decoder(config.replace(vocab_size=config.vocab_size or 1))
        heads = _work(Attention(config)) + _attended(LayerConfig(), config, config.max_seq_len)
    layers = {}
    for index, layer in enumerate(config.all_layers):
        if layer.moe is None and not layer.attention.router:
            if index in config.layers:
                layers[index] = layer
            continue
        per_unit = config.d_model * (3 if layer.activation.endswith("glu") else 2)
        work = per_unit * layer.d_ff if layer.moe is None else _work(model.moe_layers[index])
        if layer.attention.router:
            work += _work(model.attentions[index]) - heads
            work += _attended(layer.replace(window=None), config, config.max_seq_len)
        attention = AllHeads() if layer.attention.router else layer.attention
        layers[index] = layer.replace(d_ff=max(1, math.ceil(work / per_unit)), moe=None, attention=attention)
    return ModelConfig.model_validate({**kept, "first_dense_layers": 0, "moe_every": 1, "layers": layers})
