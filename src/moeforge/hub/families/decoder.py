"""Rows that most families share: what their decoders have in common, from the vocabulary to the rotary positions."""

from collections.abc import Mapping
from typing import Any

from moeforge.hub.families.rotary import rotary
from moeforge.hub.families.rows import At, Joint, Only, Row, Settings, Tree
from moeforge.hub.packed import METHODS

ACTIVATIONS = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu"}


def decoder(
    *,
    eps: float,
    context: int,
    tied: bool = False,
    theta: float = 10000.0,
    fraction: float = 1.0,
    rope: Tree | None = None,
    short_only: bool = False,
) -> tuple[Row, ...]:
    """Sizes, norm, positions; ``eps`` to ``rope`` are what stands where a config.json is silent, ``short_only`` as in
    ``rotary``."""
    return (
        At("vocab_size", ..., "vocab_size"),
        At("hidden_size", ..., "d_model"),
        At("num_hidden_layers", ..., "num_layers"),
        At("num_attention_heads", ..., "num_heads"),
        At("max_position_embeddings", context, "max_seq_len"),
        At("rms_norm_eps", eps, "norm_eps"),
        At("tie_word_embeddings", tied, "tie_embeddings"),
        Only("is_encoder_decoder", (False, None)),
        _weights(),
        rotary(theta, fraction, rope, short_only),
    )


def _weights() -> Joint:
    def read(theirs: Mapping[str, Any]) -> Tree:
        method = (theirs["quantization_config"] or {}).get("quant_method", METHODS[0])
        if method not in METHODS:
            known = " and ".join(METHODS)
            raise ValueError(
                f"quantization_config: its weights are in {method!r}; {known} are read: dequantise it first"
            )
        return {}

    return Joint({"quantization_config": None}, read, lambda ours: {"quantization_config": None})


def heads(head_dim: int | None = None, kv_heads: int | None = None) -> tuple[Row, ...]:
    """Multi-head or grouped-query attention. The number of key heads is written out: some classes take no null."""

    def read(theirs: Mapping[str, Any]) -> Tree:
        return {"num_kv_heads": theirs["num_key_value_heads"]}

    def write(ours: Settings) -> Tree:
        return {"num_key_value_heads": ours["num_kv_heads"] or ours["num_heads"]}

    return (Joint({"num_key_value_heads": kv_heads}, read, write), At("head_dim", head_dim, "head_dim"))


def biases(name: str, default: bool, paths: str = "attention.qkv_bias attention.o_bias") -> At:
    """Whether linear maps have biases: by default all four of attention."""
    return At(name, default, paths)


def activation(paths: str) -> At:
    """What gates an MLP, at each of our paths that has one."""
    return At("hidden_act", "silu", paths, ACTIVATIONS, only=True)
