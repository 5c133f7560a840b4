"""Stretched rotations against the modules of transformers that use the same functions, and against their rules."""

import sys
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from moeforge.config import build
from moeforge.errors import UserError
from moeforge.models import Cache, Decoder, ModelConfig
from moeforge.models.attention import locate
from moeforge.models.rope import stretched

transformers = pytest.importorskip("transformers")

ORIGINAL, LONGEST = 16, 64
WAVES = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
DIVISORS = {"short_factor": (1.0, 1.1, 1.3, 2.0), "long_factor": (1.0, 2.0, 4.0, 8.0)}
PAST = {"original_max_position_embeddings": ORIGINAL}
RULES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "linear": ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    "dynamic": ({"type": "dynamic", "factor": 4.0}, {"rope_type": "dynamic", "factor": 4.0}),
    "yarn": ({"type": "yarn", "factor": 4.0}, {"rope_type": "yarn", "factor": 4.0}),
    "yarn, all set": (
        {"type": "yarn", "factor": 4.0, "beta_fast": 8.0, "beta_slow": 2.0, "mscale": 0.7, "mscale_all_dim": 1.1}
        | {"truncate": False},
        {"rope_type": "yarn", "factor": 4.0, "beta_fast": 8.0, "beta_slow": 2.0, "mscale": 0.7, "mscale_all_dim": 1.1}
        | {"truncate": False},
    ),
    "by_wavelength": ({"type": "by_wavelength", **WAVES}, {"rope_type": "llama3", **WAVES}),
    "longrope": ({"type": "longrope", **DIVISORS}, {"rope_type": "longrope", **DIVISORS}),
}


def config_of(rope: dict[str, Any] | None, **changes: Any) -> ModelConfig:
    tree = {"vocab_size": 9, "d_model": 16, "num_heads": 2, "num_layers": 1, "max_seq_len": LONGEST, "rope": rope}
    return build(ModelConfig, tree | changes)


def ours(name: str, **changes: Any) -> ModelConfig:
    rope = dict(RULES[name][0])
    if rope["type"] in ("yarn", "by_wavelength", "longrope"):
        rope["original_max_seq_len"] = ORIGINAL
    return config_of(rope, **changes)


def theirs(rule: dict[str, Any], position: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, L, 8] of a fresh module."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = {**rule, "rope_theta": 10000.0}
    if rope["rope_type"] in ("yarn", "llama3", "longrope"):
        rope |= PAST
    rope = {key: list(value) if isinstance(value, tuple) else value for key, value in rope.items()}
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "max_position_embeddings": LONGEST}
    module = LlamaRotaryEmbedding(transformers.LlamaConfig(**sizes, rope_parameters=rope))
    return module(torch.zeros(1), position)


@pytest.mark.parametrize("length", [ORIGINAL, ORIGINAL + 1, LONGEST, LONGEST + 9])
@pytest.mark.parametrize("name", RULES)
def test_rotations_are_those_of_transformers(name: str, length: int) -> None:
    position = torch.arange(length)[None]
    where, expected = locate(ours(name), position, None, 0), theirs(RULES[name][1], position)
    # A growing base passes through a tensor there and a number here: one rounding.
    torch.testing.assert_close((where.cos[:, 0], where.sin[:, 0]), expected, rtol=0, atol=1e-5 * (name == "dynamic"))


def test_plain_rotations_are_those_of_transformers_bit_for_bit() -> None:
    position = torch.arange(5000)[None]
    where = locate(config_of(None), position, None, 0)
    torch.testing.assert_close(
        (where.cos[:, 0], where.sin[:, 0]), theirs({"rope_type": "default"}, position), rtol=0, atol=0
    )


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_each_row_rotates_by_its_own_length(name: str) -> None:
    longer = LONGEST + 9
    position = torch.stack([torch.arange(longer), torch.arange(longer) % 12])
    both = locate(ours(name), position, None, 0)
    for row in range(2):
        alone = locate(ours(name), position[row : row + 1], None, 0)
        assert torch.equal(both.cos[row], alone.cos[0]) and torch.equal(both.sin[row], alone.sin[0])
    assert not torch.equal(both.cos[0, :, :12], both.cos[1, :, :12])


def test_a_gain_of_its_own_for_short_and_for_longer_rows() -> None:
    rope = {**RULES["longrope"][0], "original_max_seq_len": ORIGINAL, "short_mscale": 1.5, "long_mscale": 3.0}
    config = config_of(rope)
    for length, gain in ((ORIGINAL, 1.5), (ORIGINAL + 1, 3.0)):
        where = locate(config, torch.arange(length)[None], None, 0)
        torch.testing.assert_close(where.cos**2 + where.sin**2, torch.full_like(where.cos, gain**2))


@pytest.mark.parametrize("name", [name for name in RULES if name not in ("dynamic", "longrope")])
@torch.no_grad()
def test_cached_decoding_is_the_full_pass(name: str) -> None:
    model, input_ids = Decoder(ours(name, init={"type": "normal", "std": 0.3})), torch.randint(9, (2, 30))
    cache = Cache(model, 2, 30)
    logits = [model(part, cache=cache).logits for part in input_ids.split([7, 1, 22], dim=1)]
    torch.testing.assert_close(torch.cat(logits, 1), model(input_ids).logits, rtol=1e-4, atol=1e-4)


def test_without_transformers_only_plain_rotation_works(monkeypatch: pytest.MonkeyPatch) -> None:
    stretched.cache_clear()
    monkeypatch.setitem(sys.modules, "transformers.modeling_rope_utils", None)
    locate(config_of(None), torch.arange(4)[None], None, 0)
    with pytest.raises(UserError, match=r"rope: yarn needs transformers.*pip install 'moeforge\[hf\]'"):
        locate(ours("yarn"), torch.arange(4)[None], None, 0)


@pytest.mark.parametrize(
    ("rope", "reason"),
    [
        ({"type": "longrope", **DIVISORS, "long_factor": (1.0,), "original_max_seq_len": 4}, "long_factor has 1 div"),
        ({"type": "yarn", "factor": 4.0}, "original_max_seq_len"),
        ({"type": "linear", "factor": 0}, "greater than 0"),
        ({"type": "linear", "factor": 2.0, "beta_fast": 1.0}, "Extra inputs"),
        ({"type": "llama3", "factor": 2.0}, "by_wavelength"),
    ],
    ids=str,
)
def test_what_is_no_rule_is_refused(rope: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        ModelConfig(d_model=16, num_heads=2, rope=rope)
