"""Mixtral (arXiv:2401.04088): softmax over the two chosen experts of eight."""

from moeforge.hub.families.decoder import activation, decoder, heads
from moeforge.hub.families.family import Family
from moeforge.hub.families.names import ATTENTION, FRAME, LAYER, ROUTER, stacked
from moeforge.hub.families.rows import At
from moeforge.hub.layout import Layout

MIXTRAL = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    rows=(
        *decoder(eps=1e-5, context=131072, theta=1e6),
        *heads(kv_heads=8),
        At("sliding_window", None, "window"),
        At("num_local_experts", 8, "moe.experts.num_experts"),
        At("intermediate_size", 14336, "moe.experts.d_expert"),
        At("num_experts_per_tok", 2, "moe.router.select.k"),
        activation("moe.experts.activation"),
    ),
    names={
        **FRAME,
        **ATTENTION,
        ROUTER: (Layout((f"{LAYER}block_sparse_moe.gate.weight",)), Layout((f"{LAYER}mlp.gate.weight",))),
        **stacked("block_sparse_moe.experts", "w1", "w3", "w2", fused="mlp.experts"),
    },
    settings={"moe": {"router": {"score": "logits", "weigh": "softmax", "losses": []}}},
    inert=frozenset({"router_jitter_noise"}),
)
