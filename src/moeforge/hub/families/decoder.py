"""Rows that most families share: what their decoders have in common, from the vocabulary to the rotary positions."""

from collections.abc import Mapping
from typing import Any

from moeforge.hub.families.rows import At, Joint, Only, Row, Settings, Tree

ACTIVATIONS = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu"}


def decoder(*, eps: float, context: int, theta: float = 10000.0, tied: bool = False) -> tuple[Row, ...]:
    """Sizes, norm, positions; the arguments are what stands where a config.json is silent."""
    return (
        At("vocab_size", ..., "vocab_size"),
        At("hidden_size", ..., "d_model"),
        At("num_hidden_layers", ..., "num_layers"),
        At("num_attention_heads", ..., "num_heads"),
        At("max_position_embeddings", context, "max_seq_len"),
        At("rms_norm_eps", eps, "norm_eps"),
        At("tie_word_embeddings", tied, "tie_embeddings"),
        Only("is_encoder_decoder", (False, None)),
        rotary(theta),
    )


def heads(head_dim: int | None = None) -> tuple[Row, ...]:
    """Multi-head or grouped-query attention."""
    return (At("num_key_value_heads", None, "num_kv_heads"), At("head_dim", head_dim, "head_dim"))


def activation(paths: str) -> At:
    """What gates an MLP, at each of our paths that has one."""
    return At("hidden_act", "silu", paths, ACTIVATIONS, only=True)


def rotary(theta: float) -> Joint:
    """``rope_parameters`` of transformers 5, or ``rope_theta`` and ``rope_scaling`` of the configs before it."""

    def read(theirs: Mapping[str, Any]) -> Tree:
        rope = dict(theirs["rope_parameters"] or theirs["rope_scaling"] or {})
        kind = rope.pop("rope_type", rope.pop("type", "default"))
        base = rope.pop("rope_theta", theirs["rope_theta"])
        if kind != "default" or rope:
            raise ValueError(f"rope_parameters: rope_type {kind!r} with {rope} is not understood")
        return {"rope_theta": theta if base is None else base}

    def write(ours: Settings) -> Tree:
        return {"rope_parameters": {"rope_type": "default", "rope_theta": ours["rope_theta"]}}

    return Joint({"rope_parameters": None, "rope_scaling": None, "rope_theta": None}, read, write)
