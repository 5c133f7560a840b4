"""What a kernel does with edges: walks the segments, evens their lengths, and sums rows back to their tokens."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moeforge.kernels import sum_by_token
from moeforge.kernels.edges import pad_segments, segments
from moeforge.moe import Route


def test_segments_skip_experts_without_edges() -> None:
    ends_E = torch.tensor([0, 2, 2, 5, 5], dtype=torch.int32)
    assert list(segments(ends_E)) == [(1, 0, 2), (3, 2, 5)]


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_come_back_to_their_tokens(k: int, dtype: torch.dtype) -> None:
    route = Route.from_top_k(torch.rand(6, 4).argsort(1)[:, :k], torch.rand(6, k), 4)
    rows_ND = torch.randn(len(route.token), 3).to(dtype)
    expected_TD = torch.zeros(6, 3, dtype=torch.promote_types(dtype, torch.float32))
    for token, row in zip(route.token.tolist(), rows_ND, strict=True):
        expected_TD[token] += row
    summed_TD = sum_by_token(rows_ND, route)
    assert summed_TD.dtype == expected_TD.dtype
    torch.testing.assert_close(summed_TD, expected_TD)
    without_slots = Route(route.token, route.weight, route.ends, route.num_tokens)
    torch.testing.assert_close(sum_by_token(rows_ND, without_slots), expected_TD)


@given(counts=st.lists(st.one_of(st.integers(0, 40), st.integers(41, 700)), min_size=1, max_size=6))
def test_padding_repeats_the_last_edge_without_weight(counts: list[int]) -> None:
    ends = torch.tensor(counts).cumsum(0).to(torch.int32)
    token_N = torch.randint(1000, (sum(counts),))
    route = Route(token_N, (torch.rand(len(token_N)) + 0.1).requires_grad_(), ends, 1000)
    padded = pad_segments(route)
    lengths = padded.ends.diff(prepend=torch.zeros(1, dtype=torch.int32)).tolist()
    value_P = torch.rand(len(padded.token))
    (gradient_N,) = torch.autograd.grad(padded.weight @ value_P, route.weight)
    low, start = 0, 0
    for count, length in zip(counts, lengths, strict=True):
        assert count <= length <= count * 9 / 8 and (count > 16 or length == count)
        assert len(f"{length:b}".rstrip("0")) <= 4, "more than eight lengths per power of two"
        own = slice(low, low + length)
        expected = token_N[start : start + count].tolist()
        assert padded.token[own].tolist() == expected + expected[-1:] * (length - count)
        assert torch.equal(padded.weight[own][:count], route.weight[start : start + count])
        assert torch.equal(gradient_N[start : start + count], value_P[own][:count])
        assert not padded.weight[own][count:].any()
        low, start = low + length, start + count
    assert low == len(padded.token)


def test_padding_keeps_a_tail_that_belongs_to_nobody() -> None:
    counts, tail = [40, 0, 17], 5
    ends = torch.tensor(counts).cumsum(0).to(torch.int32)
    token_N, weight_N = torch.arange(57 + tail), torch.cat([torch.ones(57), torch.zeros(tail)]).requires_grad_()
    padded = pad_segments(Route(token_N, weight_N, ends, 99))
    assert padded.ends.tolist() == [40, 40, 58] and padded.token[58:].tolist() == token_N[57:].tolist()
    assert padded.weight.count_nonzero() == 57 and not padded.weight[57:].any()
