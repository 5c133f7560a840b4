"""OLMoE (arXiv:2409.02060): queries and keys are normalised over all heads together."""

from moeforge.hub.families.decoder import activation, biases, decoder, heads
from moeforge.hub.families.family import Family
from moeforge.hub.families.names import ATTENTION, EXPERTS, FRAME
from moeforge.hub.families.rows import At

OLMOE = Family(
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    rows=(
        *decoder(eps=1e-5, context=4096),
        *heads(),
        biases("attention_bias", False),
        At("clip_qkv", None, "attention.clip"),
        At("num_experts", 64, "moe.experts.num_experts"),
        At("intermediate_size", 2048, "moe.experts.d_expert"),
        At("num_experts_per_tok", 8, "moe.router.select.k"),
        At("norm_topk_prob", False, "moe.router.weigh.normalize_weights"),
        activation("moe.experts.activation"),
    ),
    names={**FRAME, **ATTENTION, **EXPERTS},
    settings={"qk_norm": "whole", "moe": {"router": {"losses": []}}},
)
