"""Experts that are fetched, or get all rows, equal experts that are here: outputs, every gradient, every byte sent."""

from collections import Counter

import pytest
import torch
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from moeforge.parallel.by_index import ByIndex
from moeforge.parallel.fetch import Fetch
from moeforge.parallel.placement import Placement
from moeforge.parallel.wire import Wire
from tests.parallel.test_exchange import BANKS, ROUTES, WIDTH, built, edges_between, holders, inputs, passed

pytestmark = pytest.mark.dist


def elsewhere(way: type[Fetch | ByIndex], name: str, case: str, mixed: bool):
    mesh, wire = DeviceMesh("cpu", torch.arange(dist.get_world_size())), Wire()
    bank, group, placement = built(name, torch.float64), mesh.get_group(), holders(BANKS[name].num_experts, 4, mixed)
    for key, parameter in list(bank.named_parameters()):
        setattr(bank, key, torch.nn.Parameter(parameter.detach()[list(placement.held[group.rank()])]))
    way(group, wire).install(bank, lambda: placement)
    results = passed(bank, case, group.rank(), BANKS[name].num_experts, torch.float64)
    return results, {key: p.grad for key, p in bank.named_parameters()}, wire.sent


@pytest.mark.parametrize("way", [Fetch, ByIndex])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("case", ROUTES)
@pytest.mark.parametrize("name", BANKS)
def test_experts_elsewhere_are_as_experts_here(processes, name, case, mixed, way):
    bank, config = built(name, torch.float64), BANKS[name]
    there, placement = processes(4).run(elsewhere, way, name, case, mixed), holders(config.num_experts, 4, mixed)
    for rank, (results, _, _) in enumerate(there):
        here = passed(bank, case, rank, config.num_experts, torch.float64)
        for actual, expected in zip(results, here, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    for key, parameter in bank.named_parameters():
        summed = torch.zeros_like(parameter)
        for held, (_, gradients, _) in zip(placement.held, there, strict=True):
            summed[list(held)] += gradients[key]
        torch.testing.assert_close(summed, parameter.grad, rtol=1e-10, atol=1e-10, msg=key)
    total = sum((sent for *_, sent in there), start=Counter())
    assert total == (bytes_by_index(case, placement) if way is ByIndex else bytes_fetched(case, placement, bank))


def bytes_by_index(case: str, placement: Placement) -> Counter[str]:
    """All rows to all others, and what experts add to them back; of each edge its place, its weight and a gradient."""
    tokens = sum(len(inputs(case, rank, len(placement.copies), torch.float64)[0]) for rank in range(4))
    away_RR = edges_between(case, placement, torch.float64, 0, 1)
    edges = int(away_RR.sum() - away_RR.trace())
    rows = 3 * tokens * WIDTH * 8
    return +Counter(
        all_to_all=3 * 8 * len(placement.experts) + edges * (8 + 2 * 8),
        all_gather=8 * 12 + 2 * rows,
        reduce_scatter=2 * rows,
    )


def bytes_fetched(case: str, placement: Placement, bank: torch.nn.Module) -> Counter[str]:
    """A byte per place asks for it; what is needed comes twice, and its gradient goes back."""
    places, expert = len(placement.experts), sum(stack[0].nbytes for stack in bank.parameters())
    owner_S = torch.arange(4).repeat_interleave(torch.tensor(placement.sizes))
    sent = 3 * places
    for rank in range(4):
        _, weights_TE, route = inputs(case, rank, bank.config.num_experts, torch.float64)
        needed_S = placement.route(route(weights_TE), rank).counts > 0
        sent += 3 * expert * int((needed_S & (owner_S != rank)).sum())
    return Counter(all_to_all=sent)
