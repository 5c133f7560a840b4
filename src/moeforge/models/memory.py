"""About how much memory a training step keeps between its forward and its backward pass, and a pass alone takes."""

from collections.abc import Mapping

from moeforge.models.config import LayerConfig, ModelConfig

FLOAT = 4
"""Bytes of what autocast leaves alone: the residual stream, norms, router and losses."""


def activation_bytes(
    model: ModelConfig, width: int, tokens: int, recompute: bool, edges: Mapping[int, float] | None = None
) -> float:
    """An estimate for one micro-batch, from the tensors that each part saves; temporary ones come on top.

    ``width``: bytes of a value in matrix products. ``edges``: by depth, rows through experts; None: the mean of such a
    router for ``tokens``.
    """
    edges = edges or {}
    blocks = [
        sum(kept_by_block(model, layer, width, tokens, edges.get(depth)))
        for depth, layer in enumerate(model.applied_layers)
    ]
    kept = sum(blocks)
    if recompute:
        # Only what enters attention and MLP stays; one block at a time is made again.
        kept = tokens * 2 * FLOAT * model.d_model * len(blocks) + max(blocks)
    vocabulary = model.vocab_size or 0
    return kept + tokens * ((FLOAT + width) * model.d_model + (width + 2 * FLOAT) * vocabulary)


def pass_bytes(model: ModelConfig, width: int, tokens: int) -> float:
    """An estimate for one pass over ``tokens`` without gradients: the widest block, the residual stream and, as a
    request may ask for every token's, logits, in float32 too."""
    widest = max(sum(kept_by_block(model, layer, width, tokens)) for layer in model.applied_layers)
    return widest + tokens * ((FLOAT + width) * model.d_model + (FLOAT + width) * (model.vocab_size or 0))


def kept_by_block(
    model: ModelConfig, layer: LayerConfig, width: int, tokens: int, edges: float | None = None
) -> tuple[float, float, float]:
    """Bytes that (attention, MLP or what stands beside experts, experts) keep.

    Attention: the norm, its input, queries, keys, values and output (twice).
    """
    attention = 0.0
    if layer.attends:
        heads, keys = layer.attention.per_token(model) * model.size_of_head, model.num_key_heads * model.size_of_head
        attention = (FLOAT + width) * model.d_model + width * (3 * heads + 2 * keys)
    beside, experts = (FLOAT + width) * model.d_model, 0.0
    if layer.moe is None:
        beside += width * layer.d_ff * _kept_per_unit(layer.activation)
    else:
        moe = layer.moe
        beside += moe.heads * FLOAT * 3 * moe.num_experts
        if moe.shared:
            beside += moe.heads * width * moe.shared.d_ff * _kept_per_unit(moe.shared.activation)
        banks = [bank for bank in moe.experts if hasattr(bank, "d_expert")]
        widest = max(((2 if bank.activation.endswith("glu") else 1) * bank.d_expert for bank in banks), default=0)
        mean = tokens * moe.heads * moe.router.select.mean_experts(moe.num_experts)
        experts = width * widest * (mean if edges is None else edges)
    return tokens * attention, tokens * beside, experts


def _kept_per_unit(activation: str) -> int:
    """Gated: gate, up, activated gate, product. Plain: before and after."""
    return 4 if activation.endswith("glu") else 2
