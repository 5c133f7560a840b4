"""Parameters, FLOPs and memory of a config, counted on the meta device: nothing is allocated.

Three conventions are in use for "parameters": all of them; without the input embedding; without input embedding and
output matrix. All three are given, in total and active per token, so that any published number can be compared.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from moeforge.models.config import ModelConfig
from moeforge.models.decoder import Decoder
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


def measure(config: ModelConfig, bytes_per_weight: int = 4, seq_len: int | None = None) -> Size:
    """Counts ``config``; ``seq_len`` is the context that FLOPs are counted at (default: ``max_seq_len``)."""
    with torch.device("meta"):
        model = Decoder(config)
    total = sum(p.numel() for p in model.parameters())
    idle = sum(_idle(module) for module in model.modules() if isinstance(module, MoE))
    table = model.embedding.weight.numel()
    attending = sum(layer.attends for layer in config.applied_layers)
    attention = 2 * attending * config.num_heads * config.size_of_head * (seq_len or config.max_seq_len)
    attention += _looks_again(model, seq_len or config.max_seq_len)
    # The input embedding is a look-up; a tied one is still multiplied with, once, at the output.
    multiplied = table + config.num_repeats * (_matrices(model.blocks) - idle - _looked_up(model.blocks))
    return Size(
        total=_count(total, table, config),
        active=_count(total - max(0, idle) - _looked_up(model, but_rows=1), table, config),
        flops_per_token=2 * multiplied + attention,
        weight_bytes=bytes_per_weight * total,
        optimizer_bytes=16 * total,
        kv_bytes_per_token=2 * bytes_per_weight * attending * config.num_key_heads * config.size_of_head,
    )


def _looks_again(model: Decoder, seq_len: int) -> int:
    """FLOPs per token of queries, keys and their products where a router asks which tokens attention goes to."""
    again = [moe for moe in model.moe_layers.values() if moe.config.router.select.reads_importance]
    config, size = model.config, model.config.size_of_head
    projections = 2 * config.d_model * (config.num_heads + config.num_key_heads) * size
    return len(again) * (projections + config.num_heads * size * seq_len)


def _count(parameters: int, table: int, config: ModelConfig) -> Count:
    """A tied table counts once: without the input embedding it is gone, as the output uses the same weights."""
    output = 0 if config.tie_embeddings else table
    return Count(parameters, parameters - table, parameters - table - output)


def _idle(moe: MoE) -> int:
    """Weights of one layer that a token is not multiplied with on average, were every expert equally likely.

    Below zero where experts share weights: these are then multiplied with more than once.
    """
    num_experts, costs = moe.config.num_experts, moe.config.costs(moe.d_model)
    used = moe.config.router.select.mean_experts(num_experts) * sum(costs) / num_experts
    gate = moe.config.router.gate
    asked = gate.expert_work(moe.config.experts, moe.d_model) if hasattr(gate, "expert_work") else 0
    return round(sum(p.numel() for p in moe.banks.parameters()) - used - asked)


def _matrices(module: nn.Module) -> int:
    """Weights in matrices: all that rows are multiplied with."""
    return sum(p.numel() for p in module.parameters() if p.ndim >= 2)


def _looked_up(model: nn.Module, but_rows: int = 0) -> int:
    """Weights in tables that a token reads one row of, no multiplication; ``but_rows`` rows of each left out."""
    tables = (getattr(module, name) for module in model.modules() for name in getattr(module, "looked_up", ()))
    return sum(table[but_rows:].numel() for table in tables)


def dense_twin(config: ModelConfig) -> ModelConfig:
    """The dense decoder of the same shape whose FLOPs per token just reach those of ``config``.

    Each layer with experts becomes an MLP wide enough for what router, chosen experts and shared branch cost; widths
    round up, so that a comparison at equal FLOPs never favours the experts.
    """
    with torch.device("meta"):
        model = Decoder(config.replace(vocab_size=config.vocab_size or 1))
    layers = {index: layer for index, layer in config.layers.items() if layer.moe is None}
    for index, layer in enumerate(config.all_layers):
        if layer.moe is None:
            continue
        moe = model.moe_layers[index]
        active = _matrices(moe) - _idle(moe) - _looked_up(moe)
        per_unit = config.d_model * (3 if layer.activation.endswith("glu") else 2)
        layers[index] = layer.replace(d_ff=math.ceil(active / per_unit), moe=None)
    of_experts = ("moe", "layers", "momentum", "domains")
    shape = {name: getattr(config, name) for name in ModelConfig.model_fields if name not in of_experts}
    return ModelConfig.model_validate({**shape, "first_dense_layers": 0, "moe_every": 1, "layers": layers})
