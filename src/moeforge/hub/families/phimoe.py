"""Phi-3.5-MoE (arXiv:2404.14219): two experts drawn by SparseMixer, LayerNorm, biases."""

from moeforge.hub.families.decoder import activation, biases, decoder, heads
from moeforge.hub.families.family import Family
from moeforge.hub.families.names import ATTENTION, FRAME, LAYER, ROUTER, stacked
from moeforge.hub.families.rows import At, Joint, Only
from moeforge.hub.layout import Layout

PHIMOE = Family(
    model_type="phimoe",
    architecture="PhimoeForCausalLM",
    rows=(
        *decoder(eps=1e-5, context=131072, theta=1e6, short_only=True),  # as transformers computes it
        *heads(kv_heads=8),
        biases("attention_bias", False),
        biases("lm_head_bias", False, "output_bias"),
        At("sliding_window", None, "window"),
        At("num_local_experts", 16, "moe.experts.num_experts"),
        At("intermediate_size", 6400, "moe.experts.d_expert"),
        Only("num_experts_per_tok", (2,), "its router draws two"),
        Joint(
            {"router_jitter_noise": 0.01},
            read=lambda theirs: {"moe.router.select.margin": 2 * theirs["router_jitter_noise"]},
            write=lambda ours: {"router_jitter_noise": ours["moe.router.select.margin"] / 2},
        ),
        activation("moe.experts.activation"),
    ),
    names={
        **FRAME,
        **ATTENTION,
        ROUTER: (Layout((f"{LAYER}block_sparse_moe.gate.weight",)), Layout((f"{LAYER}mlp.router.weight",))),
        **stacked("block_sparse_moe.experts", "w1", "w3", "w2", fused="mlp.experts"),
    },
    settings={
        "norm": "layer",
        "moe": {"router": {"score": "logits", "select": {"type": "draw", "k": 2}, "weigh": "drawn", "losses": []}},
    },
    former="PhiMoEForCausalLM",
    inert=frozenset({"input_jitter_noise", "hidden_dropout"}),
)
