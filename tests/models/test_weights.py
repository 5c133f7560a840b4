"""Matrices held in other types, 8 and 4 bits: what changes, what stays, how far outputs move, and what is said."""

import pytest
import torch

from moeforge.errors import UserError
from moeforge.kernels.native import engine
from moeforge.kernels.native.quantised import QuantisedWeight
from moeforge.models import Decoder, ModelConfig
from moeforge.models.weights import HeldLinear, bytes_by_class, hold

SHAPE = {
    **{"vocab_size": 300, "d_model": 128, "num_layers": 3, "num_heads": 4, "max_seq_len": 64},
    "moe": {
        "experts": {"num_experts": 4, "d_expert": 128},
        "router": {"select": {"k": 2}},
        "shared": {"d_expert": 128, "mix": "gated"},
    },
}
IDS = torch.arange(40)[None] * 7 % 300


def small(**changes: object) -> Decoder:
    torch.manual_seed(2)
    return Decoder(ModelConfig.model_validate(SHAPE | changes)).eval()


@torch.no_grad()
def logits(model: Decoder) -> torch.Tensor:
    return model(IDS).logits.float()


@pytest.mark.parametrize(("weights", "bits", "moves"), [("int8", 8 + 16 / 128, 0.03), ("int4", 4 + 16 / 32, 0.25)])
@pytest.mark.parametrize("tied", [False, True])
def test_every_matrix_is_held_and_little_moves(weights: str, bits: float, moves: float, tied: bool) -> None:
    model = small(tie_embeddings=tied)
    before, kept = logits(model), {n: p.clone() for n, p in model.named_parameters() if "router" in n or "norm" in n}
    sizes = bytes_by_class(model)
    head = 0 if tied else 300 * 128
    found = hold(model, weights)
    moved = float((logits(model) - before).norm() / before.norm())
    assert 0 < moved < moves
    assert found == bytes_by_class(model)
    assert found["experts"] == sizes["experts"] / 32 * bits
    shared_gate = 3 * 128 * 4
    dense = (sizes["dense"] - shared_gate - 4 * head) / 32 * bits + head * (8 + 16 / 128) / 8 + shared_gate
    assert found["dense"] == dense
    assert all(found[kind] == sizes[kind] for kind in ("embeddings", "router", "other"))
    assert all(torch.equal(model.get_parameter(name), value) for name, value in kept.items())
    assert isinstance(model.output, HeldLinear) != tied
    assert isinstance(model.blocks[0].moe.banks[0].down_proj, QuantisedWeight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_types(dtype: torch.dtype) -> None:
    model = small()
    plain, before = small(), sum(bytes_by_class(model).values())
    after = hold(model, {torch.float32: "float32", torch.bfloat16: "bf16"}[dtype])
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert sum(after.values()) == before * torch.finfo(dtype).bits / 32
    torch.testing.assert_close(logits(model), logits(plain), rtol=0.1, atol=0.1 if dtype == torch.bfloat16 else 1e-6)


def test_as_stored_changes_nothing() -> None:
    model = small()
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    assert hold(model, "as stored") == bytes_by_class(small())
    assert before == {name: parameter.data_ptr() for name, parameter in model.named_parameters()}


BIASED = {"num_experts": 4, "d_expert": 8, "bias": True}


@pytest.mark.parametrize("experts", [BIASED, {"type": "factorised", "num_experts": 4, "d_expert": 8}])
def test_what_stays_is_named(experts: dict[str, object], caplog: pytest.LogCaptureFixture) -> None:
    banks = [{"num_experts": 4, "d_expert": 128}, experts]
    model = small(moe={"experts": banks, "router": {"select": {"k": 2}}})
    before = logits(model)
    hold(model, "int8")
    assert float((logits(model) - before).norm() / before.norm()) < 0.03
    assert "stay as stored: blocks.0.moe.banks.1, blocks.1.moe.banks.1, blocks.2.moe.banks.1" in caplog.text


def test_experts_that_are_merged_stay(caplog: pytest.LogCaptureFixture) -> None:
    model = small(moe=SHAPE["moe"] | {"router": {"select": {"type": "merged"}, "losses": []}})  # type: ignore[operator]
    before = logits(model)
    hold(model, "int8")
    assert float((logits(model) - before).norm() / before.norm()) < 0.03 and "banks.0" in caplog.text


def test_without_a_compiler_torch_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = small(), small()
    hold(one, "int4")
    here = logits(one)
    monkeypatch.setattr(engine, "library", lambda check: "no compiler")
    hold(other, "int4")
    torch.testing.assert_close(logits(other), here, rtol=0.05, atol=0.05)


def test_bad_requests_are_refused() -> None:
    with pytest.raises(UserError, match="held as stored, float32, bf16, int8, int4, not as int3"):
        hold(small(), "int3")
    with pytest.raises(UserError, match="no matrix of this model could be held as int8"):
        hold(torch.nn.LayerNorm(3), "int8")
    broken = small()
    torch.nn.init.constant_(broken.blocks[1].moe.banks[0].down_proj, float("nan"))
    with pytest.raises(UserError, match="not finite"):
        hold(broken, "int8")
