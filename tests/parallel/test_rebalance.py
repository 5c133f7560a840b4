"""Experts that move during a run change nothing but who computes them."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import distributed as dist

from moeforge.parallel.layout import Layout
from moeforge.parallel.mesh import Mesh
from moeforge.parallel.placement import Placement
from moeforge.parallel.plan.places import busiest
from moeforge.parallel.rebalance import cut, move, renumbered
from moeforge.parallel.together import Together
from moeforge.parallel.wire import Wire
from tests.parallel.test_training import SIX, alone, batches, decoder, same, trained, written

pytestmark = pytest.mark.dist
STEPS = 2
REPLICAS = "layer_01: [1, [0, 1], [0, 1], 0]"


def moved(name: str, rows: list[int], layout: Layout):
    """As ``together``, and where experts were in the end; they could move after each step."""
    mesh = Mesh.build(dist.get_world_size(), layout.ep, "cpu", None, layout.tp)
    ranks = Together(mesh, layout)
    results = trained(decoder(name, torch.float64), ranks, [batches(rows, step) for step in range(STEPS)])
    return results, ranks.sharding.banks["blocks.1.moe.banks.0"].held


PLAIN, IN_CUTS = "plain", Layout(2, rebalance=1, shard=True)
LAYOUTS = {
    "two": (PLAIN, 2, Layout(2, rebalance=1)),
    "replicas": (PLAIN, 2, Layout(2, rebalance=1, placement=REPLICAS)),
    "two groups": (PLAIN, 4, Layout(2, rebalance=1)),
    "slices": (PLAIN, 4, Layout(2, rebalance=1, tp=2)),
    "slices, the rest cut": (PLAIN, 4, Layout(2, rebalance=1, tp=2, shard=True)),
    "weights travel": (PLAIN, 2, Layout(2, rebalance=1, fetch=True)),
    "the rest cut": (PLAIN, 2, IN_CUTS),
    "offloaded": (PLAIN, 2, replace(IN_CUTS, offload=True)),
    "offloaded, two groups": (PLAIN, 4, replace(IN_CUTS, offload=True)),
    "cut in two groups": (PLAIN, 4, IN_CUTS),
    "cut in two groups, unevenly": (SIX, 4, IN_CUTS),
    "cut in two groups, replicas": (PLAIN, 4, replace(IN_CUTS, placement=REPLICAS)),
    "cut in two groups, weights travel": (PLAIN, 4, replace(IN_CUTS, fetch=True)),
}


@pytest.mark.parametrize("name, size, layout", LAYOUTS.values(), ids=LAYOUTS)
def test_moving_experts_changes_no_result(processes, tmp_path, name, size, layout):
    expected = alone(name, [7, 2], size, torch.float64)
    there = processes(size).run(moved, name, [7, 2], written(layout, tmp_path))
    loads_E = torch.tensor(expected[0][-1][2]["layer_01"])
    before = Placement.in_order(len(loads_E), 2)
    for actual, held in there:
        same(actual, expected, torch.float64)
        assert held == there[0][1] != before.held
    if not layout.placement:  # after the last step they are where it would have wanted them
        found = Placement(held)
        assert busiest(loads_E, found.holders, 2) <= busiest(loads_E, before.holders, 2)


def test_experts_stay_until_it_is_time(processes):
    for _, held in processes(2).run(moved, PLAIN, [7, 2], Layout(2, rebalance=STEPS + 1)):
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


@given(st.integers(1, 9), st.integers(1, 5))
def test_fsdp_leaves_each_what_it_would_cut(experts, size):
    held = torch.arange(experts), torch.arange(experts, 2 * experts)
    parts = [[*map(tuple, map(torch.Tensor.tolist, rows.chunk(size)))] for rows in held]
    wanted = [of[at] if at < len(of) else () for at in range(size) for of in parts]
    assert cut(Placement(tuple(tuple(rows.tolist()) for rows in held)), size).held == tuple(wanted)


def test_shares_stay_with_those_that_have_most_of_them():
    old = Placement(((0, 1, 2), (3, 4, 5), (6, 7, 8)))
    new = Placement(((6, 7, 5), (0, 3, 8), (1, 2, 4)))
    assert renumbered(new, old).held == ((1, 2, 4), (0, 3, 8), (6, 7, 5))
