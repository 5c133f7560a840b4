"""GLM-4.5 (arXiv:2508.06471): DeepSeek-V3's router on grouped-query attention with half of each head rotating."""

from moeforge.hub.families.decoder import activation, biases, decoder, heads
from moeforge.hub.families.experts import groups, shared
from moeforge.hub.families.family import Family
from moeforge.hub.families.layers import dense_first
from moeforge.hub.families.names import CORRECTION, DENSE, EXPERTS, LAYER, SHARED
from moeforge.hub.families.rows import At, Only
from moeforge.hub.layout import Layout

GLM4_MOE = Family(
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    rows=(
        *decoder(eps=1e-5, context=131072, fraction=0.5),
        *heads(kv_heads=8),
        biases("attention_bias", False, "attention.qkv_bias"),
        At("use_qk_norm", False, "qk_norm"),
        At("intermediate_size", 10944, "d_ff"),
        dense_first("first_k_dense_replace", 1),
        shared("n_shared_experts", 1),
        At("n_routed_experts", 128, "moe.experts.num_experts"),
        At("moe_intermediate_size", 1408, "moe.experts.d_expert moe.shared.d_expert"),
        At("num_experts_per_tok", 8, "moe.router.select.k"),
        At("norm_topk_prob", True, "moe.router.weigh.normalize_weights"),
        At("routed_scaling_factor", 1.0, "moe.router.weigh.weight_scale"),
        groups(1, 1),
        Only("topk_method", ("noaux_tc",)),
        Only("scoring_func", ("sigmoid",)),
        activation("activation moe.experts.activation moe.shared.activation"),
    ),
    names={
        **DENSE,
        **EXPERTS,
        **SHARED,
        CORRECTION: (Layout((f"{LAYER}mlp.gate.e_score_correction_bias",)),),
    },
    settings={"moe": {"router": {"score": "sigmoid", "controller": {"type": "expert_bias", "rate": 0}, "losses": []}}},
    inert=frozenset({"num_nextn_predict_layers", "num_mtp_layers"}),
    unused=r"model\.layers\.NEXT\..*",
)
