"""A bank behind the exchange equals the same bank in one process: outputs, every gradient, every byte."""

import pytest
import torch

from moeforge.moe.bank import LowRankExperts, MLPExperts, NeuronExperts
from moeforge.moe.route import Route
from moeforge.parallel.chunks import Chunks
from moeforge.parallel.exchange import Exchange
from moeforge.parallel.mesh import Mesh
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


def exchanged(name: str, case: str, dtype: torch.dtype, two_level: bool, chunks: int):
    """Four processes are two machines of two."""
    size = torch.distributed.get_world_size()
    mesh = Mesh.build(size, size, "cpu", 2 if two_level else None)
    bank, group, wire = built(name, dtype), mesh.expert_group, Wire(2)
    for key, parameter in list(bank.named_parameters()):
        own = parameter.detach().chunk(group.size())[group.rank()].clone()
        setattr(bank, key, torch.nn.Parameter(own))
    Exchange(mesh.levels, wire, Chunks(chunks)).install(bank)
    results = passed(bank, case, group.rank(), BANKS[name].num_experts, dtype)
    return results, {key: p.grad for key, p in bank.named_parameters()}, (wire.sent, wire.far)


DOUBLE, SINGLE = torch.float64, torch.float32
WAYS = [(2, DOUBLE), (4, DOUBLE), (4, SINGLE), (4, DOUBLE, True), (4, DOUBLE, False, 3), (4, DOUBLE, True, 2)]
"""Processes, type, two levels, chunks."""


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("case", ROUTES)
@pytest.mark.parametrize("name", BANKS)
def test_experts_elsewhere_are_as_experts_here(processes, way, name, case):
    size, dtype, two_level, chunks = (*way, *(False, 1)[len(way) - 2 :])
    tolerance = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    bank, config = built(name, dtype), BANKS[name]
    there = processes(size).run(exchanged, name, case, dtype, two_level, chunks)
    for rank, (results, _, _) in enumerate(there):
        here = passed(bank, case, rank, config.num_experts, dtype)
        for actual, expected in zip(results, here, strict=True):
            torch.testing.assert_close(actual, expected, **tolerance)
    for key, parameter in bank.named_parameters():
        pieces = torch.cat([gradients[key] for _, gradients, _ in there])
        torch.testing.assert_close(pieces, parameter.grad, **tolerance, msg=key)
    counted = [(sent["all_to_all"], far["all_to_all"], far["messages"]) for *_, (sent, far) in there]
    away_RR = edges_between(case, size, config.num_experts, dtype)
    expected = bytes_sent(away_RR, config.num_experts, dtype, two_level, chunks)
    assert counted == expected if not two_level else tuple(map(sum, zip(*counted, strict=True))) == expected


def edges_between(case: str, size: int, num_experts: int, dtype: torch.dtype) -> torch.Tensor:
    """[from, to]."""
    rows = []
    for rank in range(size):
        _, weights_TE, route = inputs(case, rank, num_experts, dtype)
        rows.append(route(weights_TE).counts.view(size, -1).sum(1))
    return torch.stack(rows)


def bytes_sent(away_RR: torch.Tensor, num_experts: int, dtype: torch.dtype, two_level: bool, chunks: int):
    """By the formulas of docs/parallel.md: counts, rows and weights out, rows back, and all in reverse.

    One level: of each rank; two: of all. What goes to any process, what goes to the other machine, messages there.
    """
    size, edge = len(away_RR), 4 * WIDTH * dtype.itemsize + 2 * dtype.itemsize  # there, back, and their gradients
    own, rank = chunks * num_experts // size, torch.arange(size)
    other, far = rank[:, None] != rank, rank[:, None] // 2 != rank // 2
    if two_level:
        inside = rank[:, None] % 2 != rank % 2  # to the neighbour who has the owner's place
        far_bytes = 8 * size * 1 * 2 * own + edge * int(away_RR[far].sum())
        return far_bytes + 8 * size * 1 * 2 * own + edge * int(away_RR[inside].sum()), far_bytes, size * 1 * 7 * chunks

    def of_each(there_RR: torch.Tensor) -> list[int]:
        out_and_back = (away_RR * there_RR).sum(1) + (away_RR * there_RR).sum(0)
        return [8 * own * int(n) + edge // 2 * int(rows) for n, rows in zip(there_RR.sum(1), out_and_back, strict=True)]

    return list(zip(of_each(other), of_each(far), (7 * chunks * far.sum(1)).tolist(), strict=True))
