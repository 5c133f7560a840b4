"""Weights of 8 bits and fewer: the formats to the letter, products against the dequantised twin, bits and bad input."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from moeforge.errors import UserError
from moeforge.kernels.activation import activate
from moeforge.kernels.native import build, engine, expert_mlp_quantised, formats, linear_quantised, quantise, quantised
from moeforge.moe import Route

FORMATS = [(bits, group) for bits in formats.FORMATS for group in (32, 64, 128)]
WHOLE = [(bits, group) for bits, group in FORMATS if bits in (8, 4)]
"""What the C++ packs as well."""
LARGEST = {8: 127, 4: 7, 3: 7, 2: 3, "ternary": 1}
ROWS = ["bf16", "int8"]


def rounded(x_TD: torch.Tensor, group: int) -> torch.Tensor:
    """Each group of a row in codes of -127 to 127, by its largest magnitude, and back."""
    groups = F.pad(x_TD.float(), (0, -x_TD.shape[-1] % group)).unflatten(-1, (-1, group))
    scales = groups.abs().amax(-1, keepdim=True) / 127
    return ((groups / scales).round() * scales).flatten(-2)[..., : x_TD.shape[-1]]


@pytest.mark.parametrize(("bits", "group"), FORMATS)
def test_the_format_is_what_the_docstring_says(bits: int, group: int) -> None:
    weight = torch.randn(2, 3, 200)
    made = quantise(weight, bits, group)
    assert made.scales.shape == (2, 3, 256 // group) and made.scales.dtype == torch.float16
    largest = LARGEST[bits]
    for out, at in ((0, 0), (1, 70), (2, 199)):
        scale = float(made.scales[1, out, at // group])
        same_group = weight[1, out, at // group * group : (at // group + 1) * group]
        assert scale == float((same_group.abs().max() / largest).half())
        ratio = float(weight[1, out, at]) / scale
        code = 2 * round((ratio - 1) / 2) + 1 if bits in (3, 2) else round(ratio)
        block, quarter, step, half = at // 128, at // 32 % 4, at // 8 % 4, at // 4 % 2
        byte = 16 * step + 4 * quarter + at % 4
        if bits == 8:
            assert made.packed.dtype == torch.int8 and int(made.packed[1, out, 128 * block + 64 * half + byte]) == code
        else:
            assert code_at(made.packed[1, out].tolist(), bits, block, 64 * half + byte) == code
        assert float(made.dequantise()[1, out, at]) == pytest.approx(code * scale)
    error = (made.dequantise() - weight).abs()
    step = 2 if bits in (3, 2) else 1
    assert error.shape == weight.shape and float(error.max()) <= 0.51 * step * float(weight.abs().max()) / largest
    assert made.nbytes == made.packed.nbytes + 2 * made.scales.numel()


def code_at(packed: list[int], bits: int | str, block: int, at: int) -> int:
    """The code that is ``at`` in the stored order of a block, as the docstring has it."""
    if bits == 4:
        return (packed[64 * block + at % 64] >> 4 * (at // 64) & 15) - 8
    if bits == "ternary":
        return packed[26 * block + at % 26] // 3 ** (at // 26) % 3 - 1
    low = packed[{3: 48, 2: 32}[bits] * block + at % 32] >> 2 * (at // 32) & 3
    return 2 * low - 3 if bits == 2 else 2 * (low + 4 * (packed[48 * block + 32 + at % 16] >> at // 16 & 1)) - 7


@pytest.mark.parametrize("bits", formats.FORMATS)
@given(st.integers(0, 3), st.integers(0, 2**31))
def test_every_code_comes_back(bits: formats.Bits, blocks: int, seed: int) -> None:
    form, draw = formats.FORMATS[bits], torch.Generator().manual_seed(seed)
    levels = torch.randint(0, 2 * form.largest // form.step + 1, (2, 3, 128 * blocks), generator=draw)
    codes = (levels * form.step - form.largest).to(torch.int8)
    packed = formats.pack(codes, bits)
    assert packed.shape == (2, 3, blocks * form.block) and torch.equal(formats.unpack(packed, bits), codes)


def test_a_group_of_zeros_stays_zero() -> None:
    for bits, group in FORMATS:
        weight = torch.randn(4, 256)
        weight[1], weight[2, :group] = 0, 0
        found = quantise(weight, bits, group).dequantise()
        assert not found[1].any() and not found[2, :group].any() and bool(found[3].any())


@pytest.mark.skipif(engine.missing() is not None, reason="the native engine does not run here")
@pytest.mark.parametrize(("bits", "group"), WHOLE)
@given(st.integers(1, 70), st.integers(1, 300), st.sampled_from([torch.float32, torch.bfloat16]), st.integers(-16, 8))
def test_one_pass_makes_what_torch_makes(
    bits: int, group: int, out: int, width: int, dtype: torch.dtype, exponent: int
) -> None:
    weight = (torch.randn(2, out, width) * 2.0**exponent).to(dtype)
    weight[0, 0] = 0
    one, other = quantise(weight, bits, group), quantised._pack_in_torch(weight, bits, group)
    assert torch.equal(one.packed, other[0]) and torch.equal(one.scales, other[1])


@given(st.integers(1, 11), st.integers(1, 300), st.integers(1, 70), st.sampled_from(FORMATS), st.sampled_from(ROWS))
def test_a_linear_is_its_dequantised_twin(count: int, width: int, out: int, form: tuple[int, int], rows: str) -> None:
    weight = quantise(torch.randn(out, width), *form)
    x_TD = torch.randn(count, width).bfloat16()
    exact = (rounded(x_TD, form[1]) if rows == "int8" else x_TD.float()) @ weight.dequantise().T
    found = linear_quantised(x_TD, weight, rows)
    assert found.shape == exact.shape and found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), exact, rtol=0.004, atol=1e-4 * width**0.5)


def test_a_copy_outlives_its_original() -> None:
    made, x_TD = quantise(torch.randn(8, 64), 8, 32), torch.randn(2, 64)
    before = linear_quantised(x_TD, made)
    again = deepcopy(made)
    made.packed.zero_()
    assert torch.equal(linear_quantised(x_TD, again), before)


def integers(count: int, width: int, group: int, largest: int, step: int = 1) -> torch.Tensor:
    """[count, width]: codes up to ``largest`` times 1 or 2 per group, so that a scale is exactly 1 or 2."""
    codes = torch.randint(0, 2 * largest // step + 1, (count, -(-width // group), group)) * step - largest
    codes[..., 0] = largest
    return (codes * torch.randint(1, 3, codes.shape[:2])[..., None]).flatten(1)[:, :width].float()


def exact_products(bits: int, group: int) -> None:
    """Sums of integers below 2**24 have no rounding: bit for bit what integers give."""
    for width in (32, 128, 300):
        x_TD, weight = (
            integers(6, width, group, 127),
            integers(21, width, group, LARGEST[bits], 2 if bits in (3, 2) else 1),
        )
        made = quantise(weight, bits, group)
        assert torch.equal(made.dequantise(), weight)
        exact = (x_TD.long() @ weight.long().T).float().bfloat16()
        assert torch.equal(linear_quantised(x_TD, made, "int8"), exact)


@pytest.mark.parametrize(("bits", "group"), FORMATS)
def test_integer_rows_are_exact(bits: int, group: int) -> None:
    exact_products(bits, group)


@pytest.mark.skipif(engine.missing() is not None, reason="the native engine does not run here")
def test_integer_rows_are_exact_without_the_instruction(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MOEFORGE_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "SOURCES", [s for s in build.SOURCES if s.stem not in ("experts", "decoder")])
    monkeypatch.setattr(build, "FLAGS", ("-O1", *build.FLAGS[1:]))
    monkeypatch.setattr(build, "USED", {})
    plain = build.open_or_build(lambda lib: None)
    monkeypatch.setattr(engine, "library", lambda check: plain)
    for form in FORMATS:
        exact_products(*form)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize(("bits", "group"), FORMATS)
def test_experts_are_their_dequantised_twins(bits: int, group: int, activation: str, rows: str) -> None:
    gates = 1 + (activation == "swiglu")
    up = quantise(torch.randn(4, gates * 40, 72) / 8, bits, group)
    down = quantise(torch.randn(4, 72, 40) / 6, bits, group)
    route = Route.from_top_k(torch.rand(9, 4).argsort(1)[:, :2], torch.rand(9, 2), 4)
    x_TD = torch.randn(9, 72).bfloat16()
    y_TD = expert_mlp_quantised(x_TD, route, up, down, activation, rows)
    up_EHD, down_EDH, exact_TD = up.dequantise(), down.dequantise(), torch.zeros(9, 72)
    for expert, token, weight in zip(*route_edges(route), strict=True):
        if rows == "bf16":
            hidden_H = activate(x_TD[token].float() @ up_EHD[expert].T, activation)
        else:
            hidden_H = activate(rounded(x_TD[token], group) @ up_EHD[expert].T, activation)
            hidden_H = rounded(hidden_H.bfloat16(), group)
        exact_TD[token] += weight * (hidden_H @ down_EDH[expert].T)
    assert y_TD.dtype == torch.bfloat16 and float((y_TD.float() - exact_TD).norm() / exact_TD.norm()) < 0.003


def route_edges(route: Route) -> tuple[list[int], list[int], list[float]]:
    experts = torch.arange(len(route.ends)).repeat_interleave(route.counts)
    return experts.tolist(), route.token.tolist(), route.weight.tolist()


@pytest.mark.skipif(engine.missing() is not None, reason="the native engine does not run here")
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("bits", "group"), FORMATS)
def test_a_row_has_the_same_bits_whoever_is_beside_it(bits: int, group: int, rows: str) -> None:
    up, down = quantise(torch.randn(3, 64, 96), bits, group), quantise(torch.randn(3, 96, 32), bits, group)
    ids_TK, weights_TK, x_TD = torch.rand(150, 3).argsort(1)[:, :2], torch.rand(150, 2), torch.randn(150, 96)
    every_TD = expert_mlp_quantised(x_TD, Route.from_top_k(ids_TK, weights_TK, 3), up, down, "swiglu", rows)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 5, 30, 150):
            torch.set_num_threads(count % 4 + 1)
            part = Route.from_top_k(ids_TK[:count], weights_TK[:count], 3)
            assert torch.equal(expert_mlp_quantised(x_TD[:count], part, up, down, "swiglu", rows), every_TD[:count])
    finally:
        torch.set_num_threads(threads)
    x_TD[0] = float("nan")
    found_TD = expert_mlp_quantised(x_TD, Route.from_top_k(ids_TK, weights_TK, 3), up, down, "swiglu", rows)
    assert torch.equal(found_TD[1:], every_TD[1:]) and bool(found_TD[0].isnan().all())


@pytest.mark.parametrize("rows", ROWS)
def test_without_the_library_torch_computes(monkeypatch: pytest.MonkeyPatch, rows: str) -> None:
    up, down = quantise(torch.randn(3, 64, 96) / 9, 4, 32), quantise(torch.randn(3, 96, 32) / 5, 4, 32)
    route = Route.from_top_k(torch.rand(5, 3).argsort(1)[:, :2], torch.rand(5, 2), 3)
    x_TD = torch.randn(5, 96)
    here = [
        expert_mlp_quantised(x_TD, route, up, down, "swiglu", rows),
        linear_quantised(x_TD, quantise(x_TD, 8, 64), rows),
    ]
    monkeypatch.setattr(engine, "library", lambda check: "no compiler")
    there = [
        expert_mlp_quantised(x_TD, route, up, down, "swiglu", rows),
        linear_quantised(x_TD, quantise(x_TD, 8, 64), rows),
    ]
    for one, other in zip(here, there, strict=True):
        torch.testing.assert_close(one, other, rtol=0.01, atol=0.01)


def test_no_token_and_no_edge() -> None:
    up, down = quantise(torch.randn(3, 64, 96), 4, 32), quantise(torch.randn(3, 96, 32), 4, 32)
    none = Route.from_top_k(torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2), 3)
    assert expert_mlp_quantised(torch.zeros(0, 96), none, up, down, "swiglu").shape == (0, 96)
    unrouted = Route.from_mask(torch.zeros(4, 3, dtype=torch.bool), torch.rand(4, 3))
    assert not expert_mlp_quantised(torch.randn(4, 96), unrouted, up, down, "swiglu").any()


def test_bad_requests_are_refused() -> None:
    weight = torch.randn(4, 32)
    for bits, group in ((5, 32), (8, 16)):
        with pytest.raises(
            UserError, match=f"8, 4, 3, 2, ternary bits in .* 64 or 128, not to {bits} in groups of {group}"
        ):
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
    with pytest.raises(UserError, match="multiplied as one of bf16, int8, not as int4"):
        linear_quantised(torch.randn(2, 32), quantise(weight, 8, 32), "int4")
    with pytest.raises(UserError, match="multiplied as one of bf16, int8, not as float"):
        expert_mlp_quantised(torch.randn(2, 96), route, up, down, "swiglu", "float")
