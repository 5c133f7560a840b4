"""Stacks whose experts are in several formats, or the same: one by one against the plain sum over dequantised ones."""

import pytest
import torch

from moeforge.compress.rounding import to_format
from moeforge.errors import UserError
from moeforge.hub.store import Format
from moeforge.kernels import expert_mlp
from moeforge.kernels.mixed import MixedWeight
from moeforge.kernels.reference import reference
from moeforge.moe import Route

FORMATS = (Format(8, 128), Format(4, 32), Format(3, 64), Format(2, 128), Format("ternary", 128), Format(16, None))
PLACE = ((2, 1), (0, 0), (1, 0), (0, 0), (2, 0), (3, 0), (4, 0), (5, 0))
"""Experts 1 and 3 are the same."""


def stacks() -> tuple[MixedWeight, MixedWeight]:
    def parts(*shape: int) -> MixedWeight:
        count = [max(row for part, row in PLACE if part == p) + 1 for p in range(len(FORMATS))]
        made = [to_format(torch.randn(n, *shape) / 16, f) for n, f in zip(count, FORMATS, strict=True)]
        return MixedWeight(tuple(made), PLACE)

    return parts(2 * 128, 256), parts(256, 128)


def route(tokens: int) -> Route:
    ids = torch.stack([torch.randperm(len(PLACE))[:3] for _ in range(tokens)])
    return Route.from_top_k(ids, torch.rand(tokens, 3), len(PLACE))


def test_it_is_the_sum_over_the_dequantised_experts() -> None:
    up, down = stacks()
    x, edges = torch.randn(50, 256).bfloat16(), route(50)
    found = expert_mlp(x, edges, up, down, "swiglu")
    wanted = reference(x.float(), edges, up.dequantise(), down.dequantise(), "swiglu")
    assert found.dtype == torch.bfloat16 and up.shape == (8, 256, 256)
    assert torch.equal(up.dequantise()[1], up.dequantise()[3])
    assert float((found.float() - wanted).norm() / wanted.norm()) < 2e-2  # rows are rounded to int8


def test_a_row_does_not_depend_on_others() -> None:
    up, down = stacks()
    x, edges = torch.randn(40, 256).bfloat16(), route(40)
    together = expert_mlp(x, edges, up, down, "swiglu")
    for row in (0, 17, 39):
        own = edges.token == row
        alone = Route.from_edges(edges.token[own] * 0, edges.expert[own], edges.weight[own], 1, len(PLACE))
        assert torch.equal(expert_mlp(x[row : row + 1], alone, up, down, "swiglu")[0], together[row])


def test_no_edges_give_zeros_and_other_places_are_refused() -> None:
    up, down = stacks()
    none = Route.from_mask(torch.zeros(4, 8, dtype=torch.bool), torch.zeros(4, 8))
    assert torch.equal(expert_mlp(torch.randn(4, 256), none, up, down, "swiglu"), torch.zeros(4, 256))
    with pytest.raises(UserError, match="same experts"):
        expert_mlp(torch.randn(4, 256), none, up, MixedWeight(down.parts, PLACE[::-1]), "swiglu")
