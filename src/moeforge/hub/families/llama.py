"""Llama (arXiv:2302.13971) and its successors."""

from moeforge.hub.families.decoder import activation, biases, decoder, heads
from moeforge.hub.families.family import Family
from moeforge.hub.families.names import DENSE
from moeforge.hub.families.rows import At

LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    rows=(
        *decoder(eps=1e-6, context=2048),
        *heads(),
        biases("attention_bias", False),
        biases("mlp_bias", False, "mlp_bias"),
        At("intermediate_size", 11008, "d_ff"),
        activation("activation"),
    ),
    names=DENSE,
    unused=r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
)
