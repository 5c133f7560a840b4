"""A bank behind the exchange equals the same bank in one process: outputs, every gradient, every byte."""

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh

from moeforge.moe.bank import LowRankExperts, MLPExperts, NeuronExperts
from moeforge.moe.route import Route
from moeforge.parallel.exchange import install
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


def exchanged(name: str, case: str, dtype: torch.dtype):
    mesh = DeviceMesh("cpu", torch.arange(torch.distributed.get_world_size()))
    bank, group, wire = built(name, dtype), mesh.get_group(), Wire()
    for key, parameter in list(bank.named_parameters()):
        own = parameter.detach().chunk(group.size())[group.rank()].clone()
        setattr(bank, key, torch.nn.Parameter(own))
    install(bank, group, wire)
    results = passed(bank, case, group.rank(), BANKS[name].num_experts, dtype)
    return results, {key: p.grad for key, p in bank.named_parameters()}, dict(wire.sent)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("case", ROUTES)
@pytest.mark.parametrize("name", BANKS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
def test_experts_elsewhere_are_as_experts_here(processes, size, name, case, dtype):
    tolerance = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    bank, config = built(name, dtype), BANKS[name]
    there = processes(size).run(exchanged, name, case, dtype)
    for rank, (results, _, _) in enumerate(there):
        here = passed(bank, case, rank, config.num_experts, dtype)
        for actual, expected in zip(results, here, strict=True):
            torch.testing.assert_close(actual, expected, **tolerance)
    for key, parameter in bank.named_parameters():
        pieces = torch.cat([gradients[key] for _, gradients, _ in there])
        torch.testing.assert_close(pieces, parameter.grad, **tolerance, msg=key)
    assert [sent["all_to_all"] for *_, sent in there] == bytes_sent(case, size, config.num_experts, dtype)


def bytes_sent(case: str, size: int, num_experts: int, dtype: torch.dtype) -> list[int]:
    """By the formula of docs/parallel.md, of each rank: counts, rows and weights out, rows back, and all in reverse."""
    away = torch.zeros(size, size, dtype=torch.int64)
    for rank in range(size):
        _, weights_TE, route = inputs(case, rank, num_experts, dtype)
        away[rank] = route(weights_TE).counts.view(size, -1).sum(1)
    away.fill_diagonal_(0)
    counts = 8 * (num_experts // size) * (size - 1)
    edge = 2 * WIDTH * dtype.itemsize + dtype.itemsize
    return [counts + edge * int(out) + edge * int(back) for out, back in zip(away.sum(1), away.sum(0), strict=True)]
