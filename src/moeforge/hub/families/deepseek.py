"""DeepSeekMoE, V2 and V3 (arXiv:2401.06066, 2405.04434, 2412.19437): shared experts, latent attention, groups."""

from collections.abc import Mapping
from typing import Any

from moeforge.hub.families.decoder import activation, biases, decoder, heads
from moeforge.hub.families.experts import groups, shared
from moeforge.hub.families.family import Family
from moeforge.hub.families.layers import dense_first
from moeforge.hub.families.names import ATTENTION as LLAMA_ATTENTION
from moeforge.hub.families.names import CORRECTION, EXPERTS, FRAME, LAYER, SHARED, both, mlp
from moeforge.hub.families.rows import At, Joint, Only, Row, Settings, Tree
from moeforge.hub.layout import Layout, Names

ATTENTION = {
    **{name: name for name in ("q_proj", "q_a_proj", "q_b_proj", "kv_b_proj", "o_proj")},
    **{"q_a_norm": "q_a_layernorm", "kv_a_norm": "kv_a_layernorm", "kv_a_proj": "kv_a_proj_with_mqa"},
}
NAMES: Names = {
    **FRAME,
    **mlp("blocks.{layer}.mlp", f"{LAYER}mlp"),
    **{
        row: layout
        for ours, theirs in ATTENTION.items()
        for row, layout in both(
            "weight bias", f"blocks.{{layer}}.attention.{ours}", f"{LAYER}self_attn.{theirs}"
        ).items()
    },
    **EXPERTS,
    **SHARED,
}


def _every_head_has_keys() -> Joint:
    def read(theirs: Mapping[str, Any]) -> Tree:
        if theirs["num_key_value_heads"] not in (None, theirs["num_attention_heads"]):
            raise ValueError(
                f"num_key_value_heads is {theirs['num_key_value_heads']}: latent attention shares no heads"
            )
        return {}

    return Joint({"num_key_value_heads": None}, read, lambda ours: {"num_key_value_heads": ours["num_heads"]})


def _method() -> Joint:
    groups_of = groups(None, None)

    def read(theirs: Mapping[str, Any]) -> Tree:
        method = theirs["topk_method"]
        if method not in ("greedy", "group_limited_greedy"):
            raise ValueError(f"topk_method is {method!r}; what the decoder has is greedy or group_limited_greedy")
        limits = groups_of.read(theirs) if method == "group_limited_greedy" else {}
        return limits | {"moe.router.select.group_rank": "best"} if limits else {}

    def write(ours: Settings) -> Tree:
        fields = groups_of.write(ours)
        return {**fields, "topk_method": "greedy" if fields["n_group"] == 1 else "group_limited_greedy"}

    return Joint({**groups_of.defaults, "topk_method": "greedy"}, read, write)


def _rows(num_experts: int, k: int | None) -> tuple[Row, ...]:
    return (
        _every_head_has_keys(),
        At("q_lora_rank", 1536, "attention.q_lora_rank"),
        At("kv_lora_rank", 512, "attention.kv_lora_rank"),
        At("qk_nope_head_dim", 128, "attention.qk_nope_head_dim"),
        At("qk_rope_head_dim", 64, "attention.qk_rope_head_dim"),
        At("v_head_dim", 128, "attention.v_head_dim"),
        biases("attention_bias", False, "attention.bias"),
        Only("moe_layer_freq", (1,)),
        At("n_routed_experts", num_experts, "moe.experts.num_experts"),
        At("num_experts_per_tok", k, "moe.router.select.k"),
        activation("activation moe.experts.activation moe.shared.activation"),
    )


INERT = frozenset("head_dim qk_head_dim aux_loss_alpha seq_aux ep_size num_nextn_predict_layers num_mtp_layers".split())

DEEPSEEK = Family(
    model_type="deepseek",
    architecture="DeepseekForCausalLM",
    rows=(
        *decoder(eps=1e-6, context=2048),
        *heads(),
        biases("attention_bias", False),
        Only("moe_layer_freq", (1,)),
        Only("scoring_func", ("softmax",)),
        At("intermediate_size", 11008, "d_ff"),
        dense_first("first_k_dense_replace", 0),
        shared("n_shared_experts", 0),
        At("n_routed_experts", ..., "moe.experts.num_experts"),
        At("num_experts_per_tok", ..., "moe.router.select.k"),
        At("norm_topk_prob", False, "moe.router.weigh.normalize_weights"),
        At("moe_intermediate_size", 1407, "moe.experts.d_expert moe.shared.d_expert"),
        activation("activation moe.experts.activation moe.shared.activation"),
    ),
    names={**FRAME, **LLAMA_ATTENTION, **mlp("blocks.{layer}.mlp", f"{LAYER}mlp"), **EXPERTS, **SHARED},
    settings={"moe": {"router": {"losses": []}}},
    inert=frozenset({"aux_loss_alpha", "seq_aux"}),
    in_transformers=False,
)
"""DeepSeekMoE (arXiv:2401.06066)."""

DEEPSEEK_V2 = Family(
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    rows=(
        *decoder(eps=1e-6, context=2048),
        *_rows(num_experts=64, k=None),
        biases("mlp_bias", False, "mlp_bias moe.shared.bias"),
        At("intermediate_size", 11008, "d_ff"),
        dense_first("first_k_dense_replace", 0),
        shared("n_shared_experts", 2),
        At("moe_intermediate_size", 1407, "moe.experts.d_expert moe.shared.d_expert"),
        At("routed_scaling_factor", 1.0, "moe.router.weigh.weight_scale"),
        _method(),
        Only("norm_topk_prob", (False, None), "transformers would pay no heed to it, the authors' code would"),
        Only("scoring_func", ("softmax",)),
    ),
    names=NAMES,
    settings={
        "attention": {"type": "latent"},
        "rope_interleaved": True,
        "moe": {"router": {"losses": []}},
    },
    inert=INERT,
)

DEEPSEEK_V3 = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    rows=(
        *decoder(eps=1e-6, context=4096),
        *_rows(num_experts=256, k=8),
        At("rope_interleave", True, "rope_interleaved"),
        At("intermediate_size", 18432, "d_ff"),
        dense_first("first_k_dense_replace", 3),
        shared("n_shared_experts", 1),
        At("moe_intermediate_size", 2048, "moe.experts.d_expert moe.shared.d_expert"),
        At("routed_scaling_factor", 2.5, "moe.router.weigh.weight_scale"),
        At("norm_topk_prob", True, "moe.router.weigh.normalize_weights"),
        groups(8, 4),
        Only("topk_method", ("noaux_tc",)),
        Only("scoring_func", ("sigmoid",)),
    ),
    names={**NAMES, CORRECTION: (Layout((f"{LAYER}mlp.gate.e_score_correction_bias",)),)},
    settings={
        "attention": {"type": "latent"},
        "moe": {"router": {"score": "sigmoid", "controller": {"type": "expert_bias", "rate": 0}, "losses": []}},
    },
    inert=INERT,
    unused=r"model\.layers\.NEXT\..*",
)
