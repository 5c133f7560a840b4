"""Qwen2, Qwen3 (arXiv:2407.10671, arXiv:2505.09388) and their Mixture-of-Experts models."""

from collections.abc import Mapping
from typing import Any

from moeforge.hub.families.decoder import activation, biases, decoder, heads
from moeforge.hub.families.family import Family
from moeforge.hub.families.layers import every_step, windows
from moeforge.hub.families.names import DENSE, EXPERTS, LAYER, both, mlp
from moeforge.hub.families.rows import At, Joint, Settings, Tree

WINDOWS: Tree = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}


def _top(layer: int, theirs: Mapping[str, Any]) -> bool:
    return bool(theirs["use_sliding_window"] and theirs["sliding_window"]) and layer >= theirs["max_window_layers"]


def _bottom(layer: int, theirs: Mapping[str, Any]) -> bool:
    return bool(theirs["use_sliding_window"]) and layer % 2 == 0 and layer < theirs["max_window_layers"]


def _everywhere() -> Joint:
    def read(theirs: Mapping[str, Any]) -> Tree:
        return {"window": theirs["sliding_window"] if theirs["use_sliding_window"] else None}

    def write(ours: Settings) -> Tree:
        return {"use_sliding_window": ours["window"] is not None, "sliding_window": ours["window"]}

    return Joint({"use_sliding_window": False, "sliding_window": 4096}, read, write)


def _dense(model_type: str, architecture: str, *rows: At, head_dim: int | None, settings: Tree) -> Family:
    return Family(
        model_type,
        architecture,
        rows=(
            *decoder(eps=1e-6, context=32768),
            *heads(head_dim, kv_heads=32),
            *rows,
            At("intermediate_size", 22016, "d_ff"),
            activation("activation"),
            windows(_top, WINDOWS),
        ),
        names=DENSE,
        settings=settings,
    )


QWEN2 = _dense("qwen2", "Qwen2ForCausalLM", head_dim=None, settings={"attention": {"qkv_bias": True}})
QWEN3 = _dense("qwen3", "Qwen3ForCausalLM", biases("attention_bias", False), head_dim=128, settings={"qk_norm": True})


QWEN2_MOE = Family(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    rows=(
        *decoder(eps=1e-6, context=32768),
        *heads(kv_heads=16),
        biases("qkv_bias", True, "attention.qkv_bias"),
        At("intermediate_size", 5632, "d_ff"),
        At("num_experts", 60, "moe.experts.num_experts"),
        At("moe_intermediate_size", 1408, "moe.experts.d_expert"),
        At("shared_expert_intermediate_size", 5632, "moe.shared.d_expert"),
        At("num_experts_per_tok", 4, "moe.router.select.k"),
        At("norm_topk_prob", False, "moe.router.weigh.normalize_weights"),
        activation("activation moe.experts.activation moe.shared.activation"),
        every_step(),
        windows(_bottom, WINDOWS),
    ),
    names={
        **DENSE,
        **EXPERTS,
        **mlp("blocks.{layer}.moe.shared.mlp", f"{LAYER}mlp.shared_expert"),
        **both("weight", "blocks.{layer}.moe.shared.gate", f"{LAYER}mlp.shared_expert_gate"),
    },
    settings={"moe": {"router": {"losses": []}, "shared": {"mix": "gated"}}},
)

QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    rows=(
        *decoder(eps=1e-6, context=32768),
        *heads(kv_heads=4),
        biases("attention_bias", False),
        At("intermediate_size", 6144, "d_ff"),
        At("num_experts", 128, "moe.experts.num_experts", also="num_local_experts"),
        At("moe_intermediate_size", 768, "moe.experts.d_expert"),
        At("num_experts_per_tok", 8, "moe.router.select.k"),
        At("norm_topk_prob", False, "moe.router.weigh.normalize_weights"),
        activation("activation moe.experts.activation"),
        every_step(),
        _everywhere(),
    ),
    names={**DENSE, **EXPERTS},
    settings={"qk_norm": True, "moe": {"router": {"losses": []}}},
    inert=frozenset({"max_window_layers"}),
)
