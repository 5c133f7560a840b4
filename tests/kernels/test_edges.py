"""The two verbs of a kernel on edges: walking the segments, and summing rows back to their tokens."""

import pytest
import torch

from moeforge.kernels import sum_by_token
from moeforge.kernels.edges import segments
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
