"""How weights start: the statistics of every kind of matrix."""

import pytest
import torch

from moeforge.config import build
from moeforge.models import Decoder, ModelConfig

BASE = {
    "vocab_size": 256,
    "d_model": 64,
    "num_layers": 2,
    "tie_embeddings": False,
    "moe": {"experts": {"num_experts": 16, "d_expert": 32}, "shared": {"d_expert": 64, "mix": "coefficient"}},
}
FAN_IN = {"o_proj": 64, "banks.0.down_proj": 32, "banks.0.gate_up_proj": 64, "router.gate": 64, "embedding": 64}
TRUNCATED = 0.8796  # the deviation of a unit normal cut at two


def deviation(model: Decoder, part: str) -> float:
    found = [p for name, p in model.named_parameters() if part in name and p.ndim > 1]
    assert found
    return float(torch.cat([p.detach().flatten() for p in found]).std())


def test_normal() -> None:
    model = Decoder(build(ModelConfig, BASE | {"init": {"type": "normal", "std": 0.006}}))
    for part in ("o_proj", "banks.0.down_proj", "shared.mlp.down_proj"):
        assert deviation(model, part) == pytest.approx(0.006 / 2, rel=0.05)
    for part in ("q_proj", "gate_up_proj", "router.gate", "embedding", "output"):
        assert deviation(model, part) == pytest.approx(0.006, rel=0.05)


def test_what_repeated_layers_write_is_smaller() -> None:
    model = Decoder(build(ModelConfig, BASE | {"num_repeats": 4, "init": {"type": "normal", "std": 0.006}}))
    assert deviation(model, "o_proj") == pytest.approx(0.006 / 4, rel=0.05)


def test_fan_in() -> None:
    model = Decoder(build(ModelConfig, BASE | {"init": "fan_in"}))
    for part, fan_in in FAN_IN.items():
        assert deviation(model, part) == pytest.approx(TRUNCATED * (0.1 / fan_in) ** 0.5, rel=0.05)
    largest = max(
        float(p.detach().abs().max()) for name, p in model.named_parameters() if "down_proj" in name and "banks" in name
    )
    assert largest <= 2 * (0.1 / 32) ** 0.5 + 1e-6


@pytest.mark.parametrize("init", ["normal", "fan_in"])
def test_vectors_and_biases(init: str) -> None:
    model = Decoder(build(ModelConfig, BASE | {"init": init, "qk_norm": True}))
    vectors = {name: p for name, p in model.named_parameters() if p.ndim == 1}
    assert any(name.endswith("shared.gate.bias") for name in vectors)
    for name, vector in vectors.items():
        assert torch.equal(vector, torch.full_like(vector, float(not name.endswith("bias")))), name


def test_experts_start_apart_and_a_seed_repeats() -> None:
    torch.manual_seed(5)
    one = Decoder(build(ModelConfig, BASE))
    torch.manual_seed(5)
    other = Decoder(build(ModelConfig, BASE))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    up = one.moe_layers[0].banks[0].gate_up_proj
    assert not torch.equal(up[0], up[1])
