"""Less than a bit a weight: the dictionary against its definition, round trips, products, the size that QMoE names."""

import heapq
import math
from copy import deepcopy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moeforge.errors import UserError
from moeforge.kernels.mixed import MixedWeight
from moeforge.kernels.native import engine, expert_mlp_quantised, linear_quantised, quantise
from moeforge.kernels.native.coded import LENGTH, CodedWeight, dictionary, encode
from moeforge.moe import Route


def ternary(*shape: int, zeros: float, seed: int = 0) -> torch.Tensor:
    """Rows of -s, 0 and s, each row with an s of its own that float16 has."""
    draw = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 2, shape, generator=draw) * 2 - 1
    kept = torch.rand(shape, generator=draw) >= zeros
    return values * kept * (torch.rand((*shape[:-1], 1), generator=draw).half().float() + 0.5).half().float()


def likeliest(zeros: float, count: int) -> list[float]:
    """Probabilities of the likeliest runs of 1 to 14 pairs, best first: a search that grows the best run so far."""
    each = [zeros, (1 - zeros) / 2, (1 - zeros) / 2]
    pairs = [a * b for a in each for b in each]
    found: list[float] = []
    heap = [(-1.0, 0)]
    while len(found) < count:
        probability, length = heapq.heappop(heap)
        found += [-probability] if length else []
        if length < 14:
            for pair in pairs:
                heapq.heappush(heap, (probability * pair, length + 1))
    return found


def runs(zeros: float) -> list[tuple[int, ...]]:
    """The values of each word, from 0 to 2."""
    return [
        tuple(entry >> 2 * i & 3 for i in range(2 * (entry >> LENGTH))) for entry in dictionary(zeros).entries.tolist()
    ]


@pytest.mark.parametrize("zeros", [0.34, 0.88, 0.99])
def test_the_dictionary_holds_the_likeliest_runs(zeros: float) -> None:
    found = runs(zeros)
    chance = {0: (1 - zeros) / 2, 1: zeros, 2: (1 - zeros) / 2}
    assert len(set(found)) == len(found) == 2**16 and {(a, b) for a in chance for b in chance} <= set(found)
    ours = [math.prod(chance[value] for value in run) for run in found]
    assert ours[:3000] == pytest.approx(likeliest(zeros, 3000)) and sorted(ours, reverse=True) == pytest.approx(ours)
    longer = dictionary(zeros).longer.tolist()
    words = {run: word for word, run in enumerate(found)} | {(): 2**16}
    for run in [(), *found[:200], *found[-200:]]:
        for pair in range(9):
            assert longer[words[run]][pair] == words.get((*run, pair % 3, pair // 3), -1)


def test_a_matrix_of_switch_takes_three_quarters_of_a_bit() -> None:
    weight = ternary(768, 3072, zeros=0.885)
    made = encode(weight)
    assert torch.equal(made.dequantise(), weight)
    assert 2 * weight.numel() / made.nbytes > 21 and made.nbytes * 8 / weight.numel() < 0.76


@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 300), st.sampled_from([0.0, 0.5, 0.88, 0.97, 1.0]))
def test_ternary_weights_come_back(experts: int, out: int, width: int, zeros: float) -> None:
    weight = ternary(experts, out, width, zeros=zeros, seed=out)
    made = encode(weight)
    assert torch.equal(made.dequantise(), weight) and made.ends.shape == (experts, out)
    if experts == 1:
        alone = encode(weight[0])
        assert torch.equal(alone.words, made.words[0]) and torch.equal(alone.dequantise(), weight[0])


def test_other_weights_go_to_the_nearest() -> None:
    weight = torch.randn(6, 200)
    found, largest = encode(weight).dequantise(), weight.abs().amax(-1, keepdim=True).half().float()
    assert torch.equal(found, torch.where(weight.abs() > largest / 2, weight.sign() * largest, 0))


@given(st.integers(1, 70), st.integers(1, 300), st.integers(1, 40), st.sampled_from(["bf16", "int8"]))
def test_a_linear_is_its_decoded_twin(count: int, width: int, out: int, rows: str) -> None:
    made = encode(ternary(out, width, zeros=0.9, seed=width))
    x_TD = torch.randn(count, width).bfloat16()
    plain = quantise(made.dequantise(), "ternary", 128)
    assert torch.equal(linear_quantised(x_TD, made, rows), linear_quantised(x_TD, plain, rows))


def stacks(experts: int) -> tuple[CodedWeight, CodedWeight]:
    """Up and down of gated experts for 96 values, 64 hidden ones."""
    return encode(ternary(experts, 128, 96, zeros=0.8)), encode(ternary(experts, 96, 64, zeros=0.9))


@pytest.mark.parametrize("count", [1, 3, 90])
def test_coded_experts_are_their_twins(count: int) -> None:
    coded = stacks(4)
    plain = tuple(quantise(part.dequantise(), "ternary", 128) for part in coded)
    route = Route.from_top_k(torch.rand(count, 4).argsort(1)[:, :2], torch.rand(count, 2), 4)
    x_TD = torch.randn(count, 96)
    found = expert_mlp_quantised(x_TD, route, *coded, "swiglu")
    assert torch.equal(found, expert_mlp_quantised(x_TD, route, *plain, "swiglu")) and bool(found.any())


def mixture() -> tuple[MixedWeight, MixedWeight]:
    """Six experts in five formats, two of them one and the same."""
    formats = [(8, 128), (4, 32), (3, 64), (2, 32)]
    coded, parts = stacks(2), []
    for at, (out, width) in enumerate(((128, 96), (96, 64))):
        drawn = torch.randn(len(formats), out, width) / 8
        parts.append((*(quantise(w[None], *form) for w, form in zip(drawn, formats, strict=True)), coded[at]))
    place = ((0, 0), (4, 1), (1, 0), (2, 0), (0, 0), (3, 0))
    up, down = (MixedWeight(part, place) for part in parts)
    return up, down


@pytest.mark.parametrize("count", [1, 3, 90])
def test_experts_of_several_formats_run_in_one_call(count: int) -> None:
    up, down = mixture()
    ids_TK = torch.rand(count, 6).argsort(1)[:, :3]
    weights_TK, x_TD = torch.rand(count, 3), torch.randn(count, 96).bfloat16()
    found = expert_mlp_quantised(x_TD, Route.from_top_k(ids_TK, weights_TK, 6), up, down, "swiglu", "bf16").float()
    exact_TD = torch.zeros(count, 96)
    for expert, (part, row) in enumerate(up.place):
        up_HD, down_DH = (weight.parts[part].dequantise()[row] for weight in (up, down))
        gate, linear = (x_TD.float() @ up_HD.T).chunk(2, -1)
        chosen = (weights_TK * (ids_TK == expert)).sum(-1, keepdim=True)
        exact_TD += chosen * ((torch.nn.functional.silu(gate) * linear) @ down_DH.T)
    assert float((found - exact_TD).norm() / exact_TD.norm()) < 0.004
    assert up.shape == (6, 128, 96) and torch.equal(up.dequantise()[4], up.dequantise()[0])
    assert up.nbytes == sum(part.nbytes for part in up.parts)


def test_a_copy_outlives_its_original() -> None:
    up, down = mixture()
    route = Route.from_top_k(torch.tensor([[0, 1]]), torch.ones(1, 2), 6)
    x_TD = torch.randn(1, 96)
    before = expert_mlp_quantised(x_TD, route, up, down, "swiglu")
    again = deepcopy((up, down))
    for part in up.parts:
        (part.words if isinstance(part, CodedWeight) else part.packed).zero_()
    assert torch.equal(expert_mlp_quantised(x_TD, route, *again, "swiglu"), before)


def test_without_the_library_torch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    up, down = mixture()
    route = Route.from_top_k(torch.rand(5, 6).argsort(1)[:, :2], torch.rand(5, 2), 6)
    x_TD = torch.randn(5, 96)
    here = expert_mlp_quantised(x_TD, route, up, down, "swiglu")
    monkeypatch.setattr(engine, "library", lambda check: "no compiler")
    there = expert_mlp_quantised(x_TD, route, up, down, "swiglu")
    torch.testing.assert_close(here, there, rtol=0.01, atol=0.01 * float(here.abs().max()))


def test_words_of_another_matrix_do_no_harm() -> None:
    made = encode(ternary(9, 300, zeros=0.9))
    wrong = CodedWeight(torch.zeros_like(made.words), made.ends, made.scales, made.zeros, made.shape)
    assert linear_quantised(torch.ones(2, 300), wrong).shape == (2, 9)


def test_bad_weights_are_refused() -> None:
    with pytest.raises(UserError, match="not finite"):
        encode(torch.full((2, 8), float("nan")))
    with pytest.raises(UserError, match="too large for a float16 scale"):
        encode(torch.full((2, 8), 1e9))
