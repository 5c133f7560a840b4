"""A bank behind the exchange equals the same bank in one process: outputs, every gradient, every byte."""

import pytest
import torch

from moeforge.moe.bank import LowRankExperts, MLPExperts, NeuronExperts
from moeforge.moe.route import Route
from moeforge.parallel.chunks import Chunks
from moeforge.parallel.exchange import Exchange
from moeforge.parallel.mesh import Mesh
from moeforge.parallel.placement import Placement
from moeforge.parallel.wire import Wire

pytestmark = pytest.mark.dist
WIDTH, TOKENS, EXPERTS = 8, 13, 8
BANKS = {
    "mlp": MLPExperts(num_experts=EXPERTS, d_expert=4),
    "mlp, plain, one expert each": MLPExperts(num_experts=4, d_expert=4, activation="relu"),
    "low_rank": LowRankExperts(num_experts=EXPERTS, d_expert=4, rank=3),
    "neurons": NeuronExperts(num_experts=EXPERTS),
}
ROUTES = ("even", "one owner", "no token on rank 0", "no token at all", "mask", "carry")


def inputs(case: str, rank: int, num_experts: int, dtype: torch.dtype):
    """Rows, edges' weights and the route of one rank; the same in whatever process asks."""
    random = torch.Generator().manual_seed(rank)
    tokens = 0 if case == "no token at all" or (case == "no token on rank 0" and rank == 0) else TOKENS + rank
    x_TD = torch.randn(tokens, WIDTH, generator=random, dtype=dtype)
    scores_TE = torch.rand(tokens, num_experts, generator=random, dtype=dtype)
    if case in ("mask", "carry"):
        carry_T = torch.rand(tokens, generator=random, dtype=dtype) if case == "carry" else None
        return x_TD, scores_TE, lambda weights_TE: Route.from_mask(scores_TE > 0.6, weights_TE, carry_T)
    among = 1 if case == "one owner" else num_experts
    ids_TK = scores_TE[:, :among].topk(min(2, among)).indices
    return x_TD, scores_TE, lambda weights_TE: Route.from_top_k(ids_TK, weights_TE.gather(1, ids_TK), num_experts)


def passed(bank, case: str, rank: int, num_experts: int, dtype: torch.dtype):
    """Output and gradients of one rank's rows; the bank's gradients add up."""
    x_TD, weights_TE, route = inputs(case, rank, num_experts, dtype)
    x_TD.requires_grad_()
    weights_TE.requires_grad_()
    y_TD = bank(x_TD, route(weights_TE))
    (y_TD * torch.linspace(-1, 2, WIDTH, dtype=dtype)).sum().backward()
    return y_TD.detach(), x_TD.grad, weights_TE.grad


def built(name: str, dtype: torch.dtype):
    torch.manual_seed(7)
    return BANKS[name].build(WIDTH).to(dtype)


def holders(num_experts: int, size: int, mixed: bool) -> Placement:
    """In order, or: experts dealt out one by one like cards, the second also on the first process, the third on all."""
    if not mixed:
        return Placement.in_order(num_experts, size)
    ranks = [[expert % size] for expert in range(num_experts)]
    return Placement.of_holders([ranks[0], [0, 1], [*range(size)], *ranks[3:]], size)


def exchanged(name: str, case: str, dtype: torch.dtype, two_level: bool, chunks: int, mixed: bool):
    """Four processes are two machines of two."""
    size = torch.distributed.get_world_size()
    mesh = Mesh.build(size, size, "cpu", 2 if two_level else None)
    bank, group, wire = built(name, dtype), mesh.expert_group, Wire(2)
    placement = holders(BANKS[name].num_experts, size, mixed)
    for key, parameter in list(bank.named_parameters()):
        setattr(bank, key, torch.nn.Parameter(parameter.detach()[list(placement.held[group.rank()])]))
    Exchange(mesh.levels, wire, Chunks(chunks), group.rank()).install(bank, lambda: placement)
    results = passed(bank, case, group.rank(), BANKS[name].num_experts, dtype)
    return results, {key: p.grad for key, p in bank.named_parameters()}, (wire.sent, wire.far)


DOUBLE, SINGLE = torch.float64, torch.float32
WAYS = [
    (2, DOUBLE, False, 1, False),
    (4, DOUBLE, False, 1, False),
    (4, SINGLE, False, 1, False),
    (4, DOUBLE, True, 1, False),
    (4, DOUBLE, False, 3, False),
    (4, DOUBLE, True, 2, True),
    (4, DOUBLE, False, 1, True),
]
"""Processes, type, two levels, chunks, experts anywhere."""


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("case", ROUTES)
@pytest.mark.parametrize("name", BANKS)
def test_experts_elsewhere_are_as_experts_here(processes, way, name, case):
    size, dtype, two_level, chunks, mixed = way
    tolerance = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    bank, config = built(name, dtype), BANKS[name]
    there = processes(size).run(exchanged, name, case, *way[1:])
    for rank, (results, _, _) in enumerate(there):
        here = passed(bank, case, rank, config.num_experts, dtype)
        for actual, expected in zip(results, here, strict=True):
            torch.testing.assert_close(actual, expected, **tolerance)
    placement = holders(config.num_experts, size, mixed)
    for key, parameter in bank.named_parameters():
        summed = torch.zeros_like(parameter)
        for held, (_, gradients, _) in zip(placement.held, there, strict=True):
            summed[list(held)] += gradients[key]
        torch.testing.assert_close(summed, parameter.grad, **tolerance, msg=key)
    counted = [(sent["all_to_all"], far["all_to_all"], far["messages"]) for *_, (sent, far) in there]
    away_RR = sum(edges_between(case, placement, dtype, chunk, chunks) for chunk in range(chunks))
    expected = bytes_sent(away_RR, placement, dtype, two_level, chunks)
    assert counted == expected if not two_level else tuple(map(sum, zip(*counted, strict=True))) == expected


def edges_between(case: str, placement: Placement, dtype: torch.dtype, chunk: int, chunks: int) -> torch.Tensor:
    """[from, to], of the tokens in a chunk. Counted one by one."""
    size, num_experts = len(placement.held), len(placement.copies)
    edges_RR = torch.zeros(size, size, dtype=torch.int64)
    for rank in range(size):
        _, weights_TE, route = inputs(case, rank, num_experts, dtype)
        low, high = (len(weights_TE) * edge // chunks for edge in (chunk, chunk + 1))
        for expert in range(num_experts):
            route_here = route(weights_TE)
            edges = sum(low <= t < high for t in route_here.token[route_here.expert == expert].tolist())
            at = [holder for holder, experts in enumerate(placement.held) if expert in experts]
            for edge in range(edges):
                edges_RR[rank, at[(edge * len(at) // edges + rank) % len(at)]] += 1
    return edges_RR


def bytes_sent(away_RR: torch.Tensor, placement: Placement, dtype: torch.dtype, two_level: bool, chunks: int):
    """By the formulas of docs/parallel.md: counts, rows and weights out, rows back, and all in reverse.

    One level: of each rank; two: of all. What goes to any process, what goes to the other machine, messages there.
    """
    size, edge = len(away_RR), 4 * WIDTH * dtype.itemsize + 2 * dtype.itemsize  # there, back, and their gradients
    places, rank = 8 * chunks * torch.tensor(placement.sizes), torch.arange(size)
    other, far = rank[:, None] != rank, rank[:, None] // 2 != rank // 2
    if two_level:
        inside = rank[:, None] % 2 != rank % 2  # to the neighbour who has the owner's place
        each = 2 * int(places.sum())  # twice: by both machines inside, and for both processes of a machine between
        far_bytes = each + edge * int(away_RR[far].sum())
        return far_bytes + each + edge * int(away_RR[inside].sum()), far_bytes, size * 1 * 7 * chunks

    def of_each(there_RR: torch.Tensor) -> list[int]:
        out_and_back = (away_RR * there_RR).sum(1) + (away_RR * there_RR).sum(0)
        return ((there_RR * places).sum(1) + edge // 2 * out_and_back).tolist()

    return list(zip(of_each(other), of_each(far), (7 * chunks * far.sum(1)).tolist(), strict=True))
