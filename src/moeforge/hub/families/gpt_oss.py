"""gpt-oss (arXiv:2508.10925): attention sinks, windows in every other layer, a clamped gate, experts in MXFP4."""

from moeforge.hub.families.decoder import activation, biases, decoder, heads
from moeforge.hub.families.family import Family
from moeforge.hub.families.layers import windows
from moeforge.hub.families.names import ATTENTION, FRAME, LAYER, both
from moeforge.hub.families.rows import At
from moeforge.hub.layout import GATE_UP_IN_TURN, TRANSPOSED, Layout

BANK = "blocks.{layer}.moe.banks.0"
EXPERTS = f"{LAYER}mlp.experts"

ROPE = {
    **{"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
    "original_max_position_embeddings": 4096,
}

GPT_OSS = Family(
    model_type="gpt_oss",
    architecture="GptOssForCausalLM",
    rows=(
        *decoder(eps=1e-5, context=131072, theta=150000.0, rope=ROPE),
        *heads(head_dim=64, kv_heads=8),
        biases("attention_bias", True),
        windows(lambda layer, theirs: layer % 2 == 0, {"sliding_window": 128}),
        At("num_local_experts", 128, "moe.experts.num_experts"),
        At("intermediate_size", 2880, "moe.experts.d_expert"),
        At("num_experts_per_tok", 4, "moe.router.select.k", also="experts_per_token"),
        At("swiglu_limit", 7.0, "moe.experts.clamp.limit"),
        At("swiglu_alpha", 1.702, "moe.experts.clamp.alpha"),
        activation("moe.experts.activation"),
    ),
    names={
        **FRAME,
        **ATTENTION,
        "blocks.{layer}.attention.sinks": (Layout((f"{LAYER}self_attn.sinks",)),),
        **both("weight bias", "blocks.{layer}.moe.router.gate", f"{LAYER}mlp.router"),
        f"{BANK}.gate_up_proj": (Layout((f"{EXPERTS}.gate_up_proj",), (TRANSPOSED, GATE_UP_IN_TURN)),),
        f"{BANK}.gate_up_bias": (Layout((f"{EXPERTS}.gate_up_proj_bias",), (GATE_UP_IN_TURN,)),),
        f"{BANK}.down_proj": (Layout((f"{EXPERTS}.down_proj",), (TRANSPOSED,)),),
        f"{BANK}.down_bias": (Layout((f"{EXPERTS}.down_proj_bias",)),),
    },
    settings={
        "attention": {"sinks": True},
        "moe": {
            "experts": {"bias": True},
            "router": {"gate": {"bias": True}, "score": "logits", "weigh": "softmax", "losses": []},
        },
    },
    inert=frozenset({"initial_context_length"}),
)
