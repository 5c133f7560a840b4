"""Names on disk that many families share: rows of tables, put together by each family."""

from moeforge.hub.layout import Layout, Names

LAYER = "model.layers.{layer}."


def both(kinds: str, ours: str, *parts: str) -> Names:
    """The rows of a linear map's ``weight`` and ``bias`` (``kinds``), where ours is ``parts`` side by side."""
    return {f"{ours}.{kind}": (Layout(tuple(f"{part}.{kind}" for part in parts)),) for kind in kinds.split()}


def mlp(ours: str, theirs: str) -> Names:
    """Rows of a gated MLP whose gate and up matrices are apart on disk."""
    return {
        **both("weight bias", f"{ours}.gate_up_proj", f"{theirs}.gate_proj", f"{theirs}.up_proj"),
        **both("weight bias", f"{ours}.down_proj", f"{theirs}.down_proj"),
    }


def stacked(theirs: str, gate: str, up: str, down: str, fused: str) -> Names:
    """Rows of one bank of experts: a matrix each on disk, or (``fused``) as transformers 5 holds them in memory."""
    each = f"{LAYER}{theirs}.{{expert}}."
    return {
        "blocks.{layer}.moe.banks.0.gate_up_proj": (
            Layout((f"{each}{gate}.weight", f"{each}{up}.weight")),
            Layout((f"{LAYER}{fused}.gate_up_proj",)),
        ),
        "blocks.{layer}.moe.banks.0.down_proj": (
            Layout((f"{each}{down}.weight",)),
            Layout((f"{LAYER}{fused}.down_proj",)),
        ),
    }


ATTENTION: Names = {
    **{
        row: layout
        for name in ("q_proj", "k_proj", "v_proj", "o_proj")
        for row, layout in both("weight bias", f"blocks.{{layer}}.attention.{name}", f"{LAYER}self_attn.{name}").items()
    },
    **both("weight", "blocks.{layer}.attention.q_norm", f"{LAYER}self_attn.q_norm"),
    **both("weight", "blocks.{layer}.attention.k_norm", f"{LAYER}self_attn.k_norm"),
}
"""Multi-head and grouped-query attention."""

FRAME: Names = {
    "embedding.weight": (Layout(("model.embed_tokens.weight",)),),
    **both("weight bias", "norm", "model.norm"),
    "output.weight": (Layout(("lm_head.weight",)),),
    "output_bias": (Layout(("lm_head.bias",)),),
    **both("weight bias", "blocks.{layer}.attention_norm", f"{LAYER}input_layernorm"),
    **both("weight bias", "blocks.{layer}.mlp_norm", f"{LAYER}post_attention_layernorm"),
}
"""What stands around attention and MLP."""

DENSE: Names = {**FRAME, **ATTENTION, **mlp("blocks.{layer}.mlp", f"{LAYER}mlp")}
"""A dense decoder; families with experts add theirs."""

ROUTER = "blocks.{layer}.moe.router.gate.weight"
EXPERTS: Names = {
    ROUTER: (Layout((f"{LAYER}mlp.gate.weight",)),),
    **stacked("mlp.experts", "gate_proj", "up_proj", "down_proj", "mlp.experts"),
}
"""Experts as most families name them."""

SHARED: Names = mlp("blocks.{layer}.moe.shared.mlp", f"{LAYER}mlp.shared_experts")
"""Shared experts as most families name them."""

CORRECTION = "blocks.{layer}.moe.router.expert_bias"
