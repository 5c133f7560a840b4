"""About how much memory a training step keeps between its forward and its backward pass."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moeforge.models import LayerConfig, ModelConfig
    from moeforge.train import RunConfig

FLOAT = 4
"""Bytes of what autocast leaves alone: the residual stream, norms, router and losses."""


def activation_bytes(config: "RunConfig", model: "ModelConfig") -> int:
    """An estimate for one micro-batch, from the tensors that each part saves; temporary ones come on top."""
    width = 2 if config.dtype == "bfloat16" else FLOAT
    blocks = [_block(model, layer, width) for layer in model.applied_layers]
    kept = sum(blocks)
    if config.recompute_activations:
        # Only what enters attention and MLP stays; one block at a time is made again.
        kept = 2 * FLOAT * model.d_model * len(blocks) + max(blocks)
    vocabulary = model.vocab_size or 0
    last = (FLOAT + width) * model.d_model + (width + 2 * FLOAT) * vocabulary
    return round(config.batch_size * config.seq_len * (kept + last))


def _block(model: "ModelConfig", layer: "LayerConfig", width: int) -> float:
    """Bytes per token: attention's norm, its input, queries, keys, values and output (twice), then the MLP."""
    if not layer.attends:
        return (FLOAT + width) * model.d_model + _mlp(layer, width)
    heads, keys = layer.attention.per_token(model) * model.size_of_head, model.num_key_heads * model.size_of_head
    attention = (FLOAT + width) * model.d_model + width * (3 * heads + 2 * keys)
    return attention + (FLOAT + width) * model.d_model + _mlp(layer, width)


def _mlp(layer: "LayerConfig", width: int) -> float:
    if layer.moe is None:
        return width * layer.d_ff * _kept_per_unit(layer.activation)
    moe = layer.moe
    banks = [bank for bank in moe.experts if hasattr(bank, "d_expert")]
    per_edge = max(((2 if bank.activation.endswith("glu") else 1) * bank.d_expert for bank in banks), default=0)
    shared = moe.shared.d_ff * _kept_per_unit(moe.shared.activation) if moe.shared else 0
    routed = moe.router.select.mean_experts(moe.num_experts) * per_edge
    return moe.heads * (width * (routed + shared) + FLOAT * 3 * moe.num_experts)


def _kept_per_unit(activation: str) -> int:
    """Gated: gate, up, activated gate, product. Plain: before and after."""
    return 4 if activation.endswith("glu") else 2
