"""Vectors of a codebook against four codes of 4 bits each that say the same: the kernel's bits are those."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moeforge.kernels.native import QuantisedWeight, engine, expert_mlp_quantised, linear_quantised
from moeforge.kernels.native.formats import BLOCK
from moeforge.kernels.native.vectors import VectorWeight
from moeforge.moe import Route

Twins = tuple[VectorWeight, QuantisedWeight]


def drawn(out: int, width: int, group: int, seed: int = 0) -> Twins:
    """Two stacks of one matrix, in both formats."""
    draw = torch.Generator().manual_seed(seed)
    wide = width + -width % BLOCK
    book = torch.randint(-7, 8, (256, 4), generator=draw).to(torch.int8)
    codes = book[torch.randint(0, 256, (out, wide // 4), generator=draw)].flatten(1)
    scales = (torch.rand(out, wide // group, generator=draw) + 0.1).half()
    plain = QuantisedWeight.of_codes(codes[None], scales[None], 4, group, width)
    return VectorWeight.of_codes(codes, scales, book, group, width), plain


def alone(twin: VectorWeight) -> VectorWeight:
    return VectorWeight(twin.packed[0], twin.scales[0], twin.codebook[0], twin.group, twin.shape[1:])


@given(
    *(st.integers(1, 70), st.integers(1, 300), st.integers(1, 40)),
    *(st.sampled_from([32, 64, 128]), st.sampled_from(["bf16", "int8"])),
)
def test_a_linear_is_that_of_the_codes(count: int, width: int, out: int, group: int, rows: str) -> None:
    made, plain = drawn(out, width, group, seed=width)
    assert torch.equal(made.dequantise(), plain.dequantise())
    assert torch.equal(alone(made).dequantise(), plain.dequantise()[0])
    x_TD = torch.randn(count, width).bfloat16()
    one = QuantisedWeight(plain.packed[0], plain.scales[0], 4, group, plain.shape[1:])
    assert torch.equal(linear_quantised(x_TD, alone(made), rows), linear_quantised(x_TD, one, rows))  # type: ignore[arg-type]


def stacks() -> tuple[Twins, Twins]:
    """Up and down of three gated experts for 96 values, 64 hidden ones."""
    found = []
    for out, width in ((128, 96), (96, 64)):
        each = [drawn(out, width, 32, seed) for seed in range(3)]
        vectors, plain = zip(*each, strict=True)
        parts = [torch.cat([getattr(one, name) for one in vectors]) for name in ("packed", "scales", "codebook")]
        made = VectorWeight(*parts, 32, (3, out, width))
        whole = [torch.cat([getattr(one, name) for one in plain]) for name in ("packed", "scales")]
        found.append((made, QuantisedWeight(*whole, 4, 32, (3, out, width))))
    return found[0], found[1]


@pytest.mark.parametrize("count", [1, 3, 90])
def test_experts_are_those_of_the_codes(count: int) -> None:
    (up, plain_up), (down, plain_down) = stacks()
    route = Route.from_top_k(torch.rand(count, 3).argsort(1)[:, :2], torch.rand(count, 2), 3)
    x_TD = torch.randn(count, 96)
    found = expert_mlp_quantised(x_TD, route, up, down, "swiglu")
    assert torch.equal(found, expert_mlp_quantised(x_TD, route, plain_up, plain_down, "swiglu")) and bool(found.any())
    assert up.nbytes == 3 * (128 * 32 + 128 * 4 * 2 + 512)


def test_without_the_library_torch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    (up, _), (down, _) = stacks()
    route = Route.from_top_k(torch.rand(5, 3).argsort(1)[:, :2], torch.rand(5, 2), 3)
    x_TD = torch.randn(5, 96)
    here = expert_mlp_quantised(x_TD, route, up, down, "swiglu")
    monkeypatch.setattr(engine, "library", lambda check: "no compiler")
    there = expert_mlp_quantised(x_TD, route, up, down, "swiglu")
    torch.testing.assert_close(here, there, rtol=0.01, atol=0.01 * float(here.abs().max()))
