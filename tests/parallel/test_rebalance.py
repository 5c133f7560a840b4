"""Experts that move during a run change nothing but who computes them."""

import pytest
import torch
from torch import distributed as dist

from moeforge.parallel.layout import Layout
from moeforge.parallel.mesh import Mesh
from moeforge.parallel.placement import Placement
from moeforge.parallel.plan.places import busiest
from moeforge.parallel.rebalance import move, renumbered
from moeforge.parallel.together import Together
from moeforge.parallel.wire import Wire
from tests.parallel.test_training import alone, batches, decoder, same, trained, written

pytestmark = pytest.mark.dist
STEPS = 2
REPLICAS = "layer_01: [1, [0, 1], [0, 1], 0]"


def moved(rows: list[int], layout: Layout):
    """As ``together``, and where experts were in the end; they could move after each step."""
    mesh = Mesh.build(dist.get_world_size(), layout.ep, "cpu", None, layout.tp)
    ranks = Together(mesh, layout)
    results = trained(decoder("plain", torch.float64), ranks, [batches(rows, step) for step in range(STEPS)])
    return results, ranks.sharding.banks["blocks.1.moe.banks.0"].held


LAYOUTS = {
    "two": (2, Layout(2, rebalance=1)),
    "replicas": (2, Layout(2, rebalance=1, placement=REPLICAS)),
    "two groups": (4, Layout(2, rebalance=1)),
    "slices": (4, Layout(2, rebalance=1, tp=2)),
    "slices, the rest cut": (4, Layout(2, rebalance=1, tp=2, shard=True)),
    "weights travel": (2, Layout(2, rebalance=1, fetch=True)),
    "the rest cut": (2, Layout(2, rebalance=1, shard=True)),
}


@pytest.mark.parametrize("size, layout", LAYOUTS.values(), ids=LAYOUTS)
def test_moving_experts_changes_no_result(processes, tmp_path, size, layout):
    expected = alone("plain", [7, 2], size, torch.float64)
    there = processes(size).run(moved, [7, 2], written(layout, tmp_path))
    for actual, held in there:
        same(actual, expected, torch.float64)
        assert held == there[0][1] != ((0, 1), (2, 3))
    loads_E = torch.tensor(expected[0][-1][2]["layer_01"])
    if not layout.placement:  # after the last step they are where it would have wanted them
        found, before = Placement(held), Placement.in_order(4, 2)
        assert busiest(loads_E, found.holders, 2) <= busiest(loads_E, before.holders, 2)


def test_experts_stay_until_it_is_time(processes):
    for _, held in processes(2).run(moved, [7, 2], Layout(2, rebalance=STEPS + 1)):
        assert held == ((0, 1), (2, 3))


OLD = Placement.of_holders([[0], [0, 1], [1], [2, 3], [2], [3]], 4)
NEW = Placement.of_holders([[3, 1], [1], [0], [2], [0], [2, 3]], 4)


def rows_after_a_move():
    mesh, wire = Mesh.build(4, 4, "cpu"), Wire()
    rank = mesh.rank
    rows = torch.tensor([[expert, expert + 0.5] for expert in OLD.held[rank]], dtype=torch.float64)
    counts = torch.tensor(OLD.held[rank])
    move([rows, counts], OLD, NEW, mesh.expert_group, wire)
    return rows, counts, wire.sent["all_to_all"]


def test_rows_go_where_they_are_to_be_and_none_goes_twice(processes):
    there = processes(4).run(rows_after_a_move)
    for (rows, counts, _), experts in zip(there, NEW.held, strict=True):
        assert counts.tolist() == [*experts] and rows.tolist() == [[e, e + 0.5] for e in experts]
    new = sum(len({*after} - {*before}) for before, after in zip(OLD.held, NEW.held, strict=True))
    assert sum(sent for *_, sent in there) == new * (2 * 8 + 8)


def test_shares_stay_with_those_that_have_most_of_them():
    old = Placement(((0, 1, 2), (3, 4, 5), (6, 7, 8)))
    new = Placement(((6, 7, 5), (0, 3, 8), (1, 2, 4)))
    assert renumbered(new, old).held == ((1, 2, 4), (0, 3, 8), (6, 7, 5))
