"""ERNIE 4.5: softmax scores with a correction bias, neighbours rotating as pairs."""

from moeforge.hub.families.decoder import activation, biases, decoder, heads
from moeforge.hub.families.experts import shared
from moeforge.hub.families.family import Family
from moeforge.hub.families.layers import from_start_to_end
from moeforge.hub.families.names import CORRECTION, DENSE, EXPERTS, LAYER, SHARED
from moeforge.hub.families.rows import At, Only
from moeforge.hub.layout import ONE_ROW, Layout

CORRECTED = "moe_statics.e_score_correction_bias"

ERNIE4_5_MOE = Family(
    model_type="ernie4_5_moe",
    architecture="Ernie4_5_MoeForCausalLM",
    rows=(
        *decoder(eps=1e-5, context=131072, theta=5e5, tied=True),
        *heads(kv_heads=4),
        biases("use_bias", False, "attention.qkv_bias attention.o_bias mlp_bias moe.shared.bias output_bias"),
        At("intermediate_size", 12288, "d_ff"),
        from_start_to_end(),
        shared("moe_num_shared_experts", 2),
        At("moe_num_experts", 64, "moe.experts.num_experts"),
        At("moe_intermediate_size", 1536, "moe.experts.d_expert moe.shared.d_expert"),
        At("moe_k", 6, "moe.router.select.k"),
        At("moe_norm_min", 1e-12, "moe.router.weigh.min_total"),
        Only("use_rmsnorm", (True, None)),
        Only("moe_gate", ("topk",)),
        Only("moe_gate_act", (None, "softmax")),
        activation("activation moe.experts.activation moe.shared.activation"),
    ),
    names={
        **DENSE,
        **EXPERTS,
        **SHARED,
        CORRECTION: (
            Layout((f"{LAYER}mlp.{CORRECTED}",), (ONE_ROW,)),
            Layout((f"{LAYER}mlp.gate.{CORRECTED}",), (ONE_ROW,)),
        ),
    },
    settings={
        "rope_interleaved": True,
        "moe": {
            "router": {
                "weigh": {"type": "scores", "normalize_weights": True},
                "controller": {"type": "expert_bias", "rate": 0},
                "losses": [],
            }
        },
    },
    inert=frozenset({"moe_capacity", "moe_use_aux_free", "num_nextn_predict_layers"}),
    unused=r"model\.mtp_.*",
)
