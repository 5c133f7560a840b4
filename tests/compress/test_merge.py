"""Merged experts: permuted copies merge without loss, groups follow the correlations, use decides the mean."""

from itertools import permutations

import pytest
import torch

from moeforge.compress.merge import alike, groups, merge
from moeforge.errors import UserError
from moeforge.kernels import expert_mlp
from moeforge.moe import Route


def expert(d_expert: int = 6, gates: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Up [W, D] and down [D, H] for 5 values."""
    return torch.randn(gates * d_expert, 5), torch.randn(5, d_expert)


def permuted(up: torch.Tensor, down: torch.Tensor, order: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same expert with its hidden units in another order."""
    d_expert = down.shape[1]
    return up.unflatten(0, (-1, d_expert))[:, order].flatten(0, 1), down[:, order]


@pytest.mark.parametrize(("gates", "activation"), [(2, "swiglu"), (1, "gelu")])
def test_permuted_copies_merge_without_loss_once_aligned(gates: int, activation: str) -> None:
    up, down = expert(gates=gates)
    copies = [(up, down), *(permuted(up, down, torch.randperm(6)) for _ in range(3))]
    ups, downs = (torch.stack(part) for part in zip(*copies, strict=True))
    x_TD, route = torch.randn(7, 5), Route.from_top_k(torch.zeros(7, 1, dtype=torch.int64), torch.ones(7, 1), 1)
    wanted = expert_mlp(x_TD, route, up[None], down[None], activation)
    aligned, plain = merge(ups, downs, [1, 5, 0, 2]), merge(ups, downs, [1, 5, 0, 2], align=False)
    found, lossy = (expert_mlp(x_TD, route, up[None], down[None], activation) for up, down in (aligned, plain))
    torch.testing.assert_close(found, wanted)
    assert float((lossy - wanted).norm() / wanted.norm()) > 0.1


def test_the_order_is_the_best_of_all() -> None:
    first, other = torch.randn(5, 9), torch.randn(5, 9)
    best = max(permutations(range(5)), key=lambda order: float((first * other[list(order)]).sum()))
    assert alike(first, other).tolist() == list(best)


def test_use_weighs_the_mean() -> None:
    (up_a, down_a), (up_b, down_b) = expert(), expert()
    ups, downs = torch.stack([up_a, up_b]), torch.stack([down_a, down_b])
    up, down = merge(ups, downs, [3, 1], align=False)
    torch.testing.assert_close(up, 0.75 * up_a + 0.25 * up_b)
    torch.testing.assert_close(down, 0.75 * down_a + 0.25 * down_b)
    torch.testing.assert_close(merge(ups, downs, [0, 0], align=False)[0], (up_a + up_b) / 2)
    assert merge(ups.bfloat16(), downs.bfloat16(), [1, 1])[0].dtype == torch.bfloat16
    assert torch.equal(ups[1], up_b)  # what was given stays


def test_the_most_used_stay_and_the_others_join_the_likest() -> None:
    use = torch.tensor([5, 9, 1, 9, 2])
    likeness = torch.eye(5)
    likeness[0, 3], likeness[2, 1], likeness[2, 4], likeness[4, 3] = 0.5, 0.2, 0.9, 0.1
    assert groups(use, likeness, 2) == [3, 1, 1, 3, 3]
    assert groups(use, likeness, 1) == [1] * 5
    likeness[1, 3] = 2.0  # a dominant expert stays itself
    assert groups(use, likeness, 2)[1] == 1


@pytest.mark.parametrize("keep", [0, 5, 6])
def test_a_number_that_merges_nothing_is_refused(keep: int) -> None:
    with pytest.raises(UserError, match=f"merging 5 experts leaves 1 to 4 of them, not {keep}"):
        groups(torch.ones(5), torch.eye(5), keep)
