"""Weights of 8 and 4 bits: the format to the letter, products against the dequantised twin, bits and bad input."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moeforge.errors import UserError
from moeforge.kernels.native import engine, expert_mlp_quantised, linear_quantised, quantise
from moeforge.kernels.reference import reference
from moeforge.moe import Route

FORMATS = [(bits, group) for bits in (8, 4) for group in (32, 64, 128)]


@pytest.mark.parametrize(("bits", "group"), FORMATS)
def test_the_format_is_what_the_docstring_says(bits: int, group: int) -> None:
    weight = torch.randn(2, 3, 200)
    made = quantise(weight, bits, group)
    assert made.scales.shape == (2, 3, 256 // group) and made.scales.dtype == torch.float16
    largest = {8: 127, 4: 7}[bits]
    for out, at in ((0, 0), (1, 70), (2, 199)):
        scale = float(made.scales[1, out, at // group])
        same_group = weight[1, out, at // group * group : (at // group + 1) * group]
        assert scale == float((same_group.abs().max() / largest).half())
        code = round(float(weight[1, out, at]) / scale)
        if bits == 8:
            assert made.packed.dtype == torch.int8 and int(made.packed[1, out, at]) == code
        else:
            block, place, word = at // 128, at % 128 // 32, at % 32
            low, high = made.packed[1, out, 64 * block + 2 * word : 64 * block + 2 * word + 2].tolist()
            assert ((low | high << 8) >> (4 * place) & 15) - 8 == code
        assert float(made.dequantise()[1, out, at]) == pytest.approx(code * scale)
    error = (made.dequantise() - weight).abs()
    assert error.shape == weight.shape and float(error.max()) <= 0.51 * float(weight.abs().max()) / largest
    assert made.nbytes == made.packed.nbytes + 2 * made.scales.numel()


def test_a_group_of_zeros_stays_zero() -> None:
    weight = torch.randn(4, 256)
    weight[1], weight[2, :32] = 0, 0
    for bits, group in FORMATS:
        found = quantise(weight, bits, group).dequantise()
        assert not found[1].any() and not found[2, :32].any() and bool(found[3].any())


@given(st.integers(1, 11), st.integers(1, 300), st.integers(1, 70), st.sampled_from(FORMATS))
def test_a_linear_is_its_dequantised_twin(rows: int, width: int, out: int, form: tuple[int, int]) -> None:
    weight = quantise(torch.randn(out, width), *form)
    x_TD = torch.randn(rows, width).bfloat16()
    found, exact = linear_quantised(x_TD, weight), x_TD.float() @ weight.dequantise().T
    assert found.shape == exact.shape and found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), exact, rtol=0.01, atol=0.01 * width**0.5)


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize(("bits", "group"), FORMATS)
def test_experts_are_their_dequantised_twins(bits: int, group: int, activation: str) -> None:
    gates = 1 + (activation == "swiglu")
    up = quantise(torch.randn(4, gates * 40, 72) / 8, bits, group)
    down = quantise(torch.randn(4, 72, 40) / 6, bits, group)
    route = Route.from_top_k(torch.rand(9, 4).argsort(1)[:, :2], torch.rand(9, 2), 4)
    x_TD = torch.randn(9, 72).bfloat16()
    y_TD = expert_mlp_quantised(x_TD, route, up, down, activation)
    exact_TD = reference(x_TD.float(), route, up.dequantise(), down.dequantise(), activation)
    assert y_TD.dtype == torch.bfloat16 and float((y_TD.float() - exact_TD).norm() / exact_TD.norm()) < 0.01


@pytest.mark.skipif(engine.missing() is not None, reason="the native engine does not run here")
@pytest.mark.parametrize(("bits", "group"), FORMATS)
def test_a_row_has_the_same_bits_whoever_is_beside_it(bits: int, group: int) -> None:
    up, down = quantise(torch.randn(3, 64, 96), bits, group), quantise(torch.randn(3, 96, 32), bits, group)
    ids_TK, weights_TK, x_TD = torch.rand(30, 3).argsort(1)[:, :2], torch.rand(30, 2), torch.randn(30, 96)
    every_TD = expert_mlp_quantised(x_TD, Route.from_top_k(ids_TK, weights_TK, 3), up, down, "swiglu")
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 5, 30):
            torch.set_num_threads(count % 4 + 1)
            part = Route.from_top_k(ids_TK[:count], weights_TK[:count], 3)
            assert torch.equal(expert_mlp_quantised(x_TD[:count], part, up, down, "swiglu"), every_TD[:count])
    finally:
        torch.set_num_threads(threads)
    x_TD[0] = float("nan")
    found_TD = expert_mlp_quantised(x_TD, Route.from_top_k(ids_TK, weights_TK, 3), up, down, "swiglu")
    assert torch.equal(found_TD[1:], every_TD[1:]) and bool(found_TD[0].isnan().all())


def test_without_the_library_torch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    up, down = quantise(torch.randn(3, 64, 96) / 9, 4, 32), quantise(torch.randn(3, 96, 32) / 5, 4, 32)
    route = Route.from_top_k(torch.rand(5, 3).argsort(1)[:, :2], torch.rand(5, 2), 3)
    x_TD = torch.randn(5, 96)
    here = [expert_mlp_quantised(x_TD, route, up, down, "swiglu"), linear_quantised(x_TD, quantise(x_TD, 8, 64))]
    monkeypatch.setattr(engine, "library", lambda check: "no compiler")
    there = [expert_mlp_quantised(x_TD, route, up, down, "swiglu"), linear_quantised(x_TD, quantise(x_TD, 8, 64))]
    for one, other in zip(here, there, strict=True):
        torch.testing.assert_close(one, other, rtol=0.03, atol=0.03)


def test_no_token_and_no_edge() -> None:
    up, down = quantise(torch.randn(3, 64, 96), 4, 32), quantise(torch.randn(3, 96, 32), 4, 32)
    none = Route.from_top_k(torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2), 3)
    assert expert_mlp_quantised(torch.zeros(0, 96), none, up, down, "swiglu").shape == (0, 96)
    unrouted = Route.from_mask(torch.zeros(4, 3, dtype=torch.bool), torch.rand(4, 3))
    assert not expert_mlp_quantised(torch.randn(4, 96), unrouted, up, down, "swiglu").any()


def test_bad_requests_are_refused() -> None:
    weight = torch.randn(4, 32)
    for bits, group in ((3, 32), (8, 16)):
        with pytest.raises(UserError, match=f"32, 64 or 128, not to {bits} in groups of {group}"):
            quantise(weight, bits, group)
    with pytest.raises(UserError, match="not finite"):
        quantise(weight / 0, 8, 32)
    with pytest.raises(UserError, match="too large for a float16 scale"):
        quantise(weight * 1e9, 8, 32)
    with pytest.raises(UserError, match=r"rows of 31 values do not fit a quantised matrix \(4, 32\)"):
        linear_quantised(torch.randn(2, 31), quantise(weight, 8, 32))
    up, down = quantise(torch.randn(3, 64, 96), 4, 32), quantise(torch.randn(3, 96, 32), 4, 32)
    route = Route.from_top_k(torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1), 3)
    with pytest.raises(UserError, match=r"rows \(2, 95\) on cpu do not fit weights for 96 on cpu, 2 tokens"):
        expert_mlp_quantised(torch.randn(2, 95), route, up, down, "swiglu")
    with pytest.raises(UserError, match=r"do not fit each other for gelu"):
        expert_mlp_quantised(torch.randn(2, 96), route, up, down, "gelu")
