"""Places of experts against brute force, and what cannot be placed."""

from itertools import permutations, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeforge.errors import UserError
from moeforge.parallel.plan import places
from moeforge.parallel.plan.places import Traffic, assign, busiest, greedy

LOADS = st.lists(st.integers(0, 100), min_size=6, max_size=6)


def every_placement(count: int, size: int) -> list[tuple[int, ...]]:
    return sorted(set(permutations(sorted(list(range(size)) * (count // size)))))


@given(loads=LOADS, size=st.sampled_from([2, 3, 6]), more=st.integers(0, 3))
@settings(max_examples=200, deadline=None)
def test_greedy_fills_processes_evenly_and_never_twice_with_the_same(loads, size, more):
    replicas = min(more * size, 6 * (size - 1))
    holders = greedy(torch.tensor(loads), size, replicas)
    assert all(len(set(ranks)) == len(ranks) >= 1 for ranks in holders)
    held = [sum(rank in ranks for ranks in holders) for rank in range(size)]
    assert held == [(6 + replicas) // size] * size


@given(loads=LOADS)
@settings(max_examples=100, deadline=None)
def test_greedy_is_within_a_third_of_the_best(loads):
    """Largest first onto the lightest of n is at most 4/3 - 1/3n of the best; equal counts cost a little besides."""
    load_E = torch.tensor(loads).double() + 1
    best = min(busiest(load_E, [[rank] for rank in place], 3) for place in every_placement(6, 3))
    assert busiest(load_E, greedy(load_E, 3), 3) <= 4 / 3 * best + 1e-9


def test_a_hot_expert_is_shared():
    load_E = torch.tensor([70.0, 10, 10, 10, 10, 10])
    alone, shared = greedy(load_E, 3), greedy(load_E, 3, replicas=3)
    assert len(shared[0]) == 3
    assert busiest(load_E, shared, 3) < 0.75 * busiest(load_E, alone, 3)


@pytest.mark.parametrize(
    "count, size, replicas, said", [(6, 4, 0, "take 2 replicas, or 6, 10"), (4, 2, 6, "more than 4 experts can have")]
)
def test_places_that_cannot_be_are_refused(count, size, replicas, said):
    with pytest.raises(UserError, match=said):
        greedy(torch.ones(count), size, replicas)


def measured(layers: int, experts: int, seed: int) -> Traffic:
    random = torch.Generator().manual_seed(seed)
    moves = [torch.randint(0, 20, (experts, experts), generator=random).double() for _ in range(layers - 1)]
    loads = [torch.randint(1, 60, (experts,), generator=random).double() for _ in range(layers)]
    return Traffic(loads, moves)


@pytest.mark.parametrize("balance", [0.0, 1.0, 10.0])
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("layers, experts, size", [(2, 4, 2), (3, 4, 2), (2, 6, 3)])
def test_the_program_finds_what_trying_all_finds(layers, experts, size, seed, balance):
    traffic = measured(layers, experts, seed)
    tried = product(every_placement(experts, size), repeat=layers)
    best = min(traffic.cost(each, size, balance) for each in tried)
    found = assign(traffic, size, balance)
    assert traffic.cost(found, size, balance) == pytest.approx(best)
    assert all(sorted(place) == sorted(list(range(size)) * (experts // size)) for place in found)


def test_layer_by_layer_is_better_than_by_load_or_in_order(monkeypatch):
    monkeypatch.setattr(places, "JOINT", 0)
    traffic = measured(4, 8, 0)
    together = torch.arange(8) % 2
    for move_EE in traffic.moves:  # even experts follow even ones, wherever they lie
        move_EE[together[:, None] == together] += 60
    found = assign(traffic, 2, balance=1.0)
    by_load = [[ranks[0] for ranks in greedy(load, 2)] for load in traffic.loads]
    in_order = [[0, 0, 0, 0, 1, 1, 1, 1]] * 4
    assert traffic.cost(found, 2, 1.0) < min(traffic.cost(each, 2, 1.0) for each in (by_load, in_order))
    assert traffic.moved(found) < 0.6 * traffic.moved(in_order)


def test_the_program_refuses_what_it_cannot_place():
    with pytest.raises(UserError, match="6 experts cannot be spread evenly over 4"):
        assign(measured(2, 6, 0), 4)
    with pytest.raises(UserError, match="as many experts in each"):
        assign(Traffic([torch.ones(4), torch.ones(6)], [torch.ones(4, 6)]), 2)
