"""Experts that are fetched equal experts that are here: outputs, every gradient; only what is needed is sent."""

import pytest
import torch
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from moeforge.parallel.fetch import Fetch
from moeforge.parallel.placement import Placement
from moeforge.parallel.wire import Wire
from tests.parallel.test_exchange import BANKS, ROUTES, built, holders, inputs, passed

pytestmark = pytest.mark.dist


def fetched(name: str, case: str, mixed: bool):
    mesh, wire = DeviceMesh("cpu", torch.arange(dist.get_world_size())), Wire()
    bank, group, placement = built(name, torch.float64), mesh.get_group(), holders(BANKS[name].num_experts, 4, mixed)
    for key, parameter in list(bank.named_parameters()):
        setattr(bank, key, torch.nn.Parameter(parameter.detach()[list(placement.held[group.rank()])]))
    Fetch(group, wire).install(bank, lambda: placement)
    results = passed(bank, case, group.rank(), BANKS[name].num_experts, torch.float64)
    return results, {key: p.grad for key, p in bank.named_parameters()}, wire.sent["all_to_all"]


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("case", ROUTES)
@pytest.mark.parametrize("name", BANKS)
def test_fetched_experts_are_as_experts_here(processes, name, case, mixed):
    bank, config = built(name, torch.float64), BANKS[name]
    there, placement = processes(4).run(fetched, name, case, mixed), holders(config.num_experts, 4, mixed)
    for rank, (results, _, _) in enumerate(there):
        here = passed(bank, case, rank, config.num_experts, torch.float64)
        for actual, expected in zip(results, here, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    for key, parameter in bank.named_parameters():
        summed = torch.zeros_like(parameter)
        for held, (_, gradients, _) in zip(placement.held, there, strict=True):
            summed[list(held)] += gradients[key]
        torch.testing.assert_close(summed, parameter.grad, rtol=1e-10, atol=1e-10, msg=key)
    assert sum(sent for *_, sent in there) == bytes_sent(case, placement, bank)


def bytes_sent(case: str, placement: Placement, bank: torch.nn.Module) -> int:
    """A byte per place asks for it; what is needed comes twice, and its gradient goes back."""
    places, expert = len(placement.experts), sum(stack[0].nbytes for stack in bank.parameters())
    owner_S = torch.arange(4).repeat_interleave(torch.tensor(placement.sizes))
    sent = 3 * places
    for rank in range(4):
        _, weights_TE, route = inputs(case, rank, bank.config.num_experts, torch.float64)
        needed_S = placement.route(route(weights_TE), rank).counts > 0
        sent += 3 * expert * int((needed_S & (owner_S != rank)).sum())
    return sent
