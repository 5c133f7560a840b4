"""Losses about prices, noise, groups of experts and embeddings, against loops and where they must be zero."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from moeforge.moe import Context, MoE, MoEConfig, Router, RouterConfig, Routing
from moeforge.moe.balance import (
    ClusterLoss,
    EmbeddingLoss,
    ImportanceLoss,
    LoadBalancingLoss,
    LoadLoss,
    LocalityLoss,
)
from moeforge.moe.noise import Gaussian
from moeforge.moe.select import TopK
from tests.moe.test_balance import E, by_loop, routing_of
from tests.moe.test_layer import assert_same


def uneven(load: list[Tensor]) -> Tensor:
    """Squared coefficient of variation."""
    mean = sum(load) / len(load)
    return sum((x - mean) ** 2 for x in load) / len(load) / mean**2


def normal_cdf(z: Tensor) -> Tensor:
    """By the error function."""
    return (1 + torch.erf(z / math.sqrt(2))) / 2


@pytest.mark.parametrize("prices", [None, (1.0, 2.0, 0.5, 1.0, 3.0)])
@pytest.mark.parametrize("std", [0.7, "learned"])
def test_the_load_under_another_draw_of_the_noise_is_the_loop(std: Any, prices: Any) -> None:
    loss = LoadLoss(prices=prices)
    router = Router(RouterConfig(noise=(Gaussian(std=std),), select=TopK(k=2), losses=(loss,)), 6, E)
    if std == "learned":
        torch.nn.init.normal_(router.noise[0].weight, std=0.3)
    x_TD = torch.randn(9, 6, requires_grad=True)
    decided = []
    for _ in range(2):  # one for the loss, one for the loop: the same draw
        torch.manual_seed(5)
        decided.append(router(x_TD, Context()))
    load: list[Any] = [0.0] * E
    for x_D, noisy_E in zip(x_TD, decided[1].logits, strict=True):
        for e in range(E):
            others = sorted((float(noisy_E[o].detach()), o) for o in range(E) if o != e)
            bar = noisy_E[others[-2][1]]
            learned = std == "learned"
            deviation = torch.log(1 + torch.exp(x_D @ router.noise[0].weight[e])) if learned else std
            load[e] = load[e] + normal_cdf((x_D @ router.gate.weight[e] - bar) / deviation)
    expected = uneven([value * price for value, price in zip(load, prices or [1.0] * E, strict=True)])
    assert_same(loss(decided[0], 1), expected, [x_TD, *router.parameters()])


def test_the_smoothed_load_is_the_mean_over_draws() -> None:
    """P(x, i) with the others' noise held still: as often as drawing expert i's noise anew puts it among the k best."""
    router = Router(RouterConfig(noise=(Gaussian(std=1.0),), select=TopK(k=2), losses=(LoadLoss(),)), 6, E)
    with torch.no_grad():
        routing = router(torch.randn(1, 6), Context())
        noisy_E, clean_E = routing.logits[0], routing.clean[0]
        for e in range(E):
            again_SE = noisy_E.expand(40000, E).clone()
            again_SE[:, e] = clean_E[e] + torch.randn(40000)
            often = float((again_SE.topk(2).indices == e).any(1).double().mean())
            bar = noisy_E[torch.arange(E) != e].topk(2).values[1]
            assert often == pytest.approx(float(normal_cdf(clean_E[e] - bar)), abs=0.01)


def test_clean_logits_are_those_of_the_gate() -> None:
    router, x_TD = Router(RouterConfig(noise=(Gaussian(std=1.0),)), 6, E), torch.randn(9, 6)
    routing = router(x_TD, Context())
    torch.testing.assert_close(routing.clean, x_TD @ router.gate.weight.T)
    assert not torch.allclose(routing.clean, routing.logits) and routing.noise_std is None


def test_prices_are_paid_per_unit_of_load() -> None:
    prices = (1.0, 1.0, 1.0, 0.25, 0.25)  # three experts that compute, two that do not: the published weight is 1/4
    routing = routing_of(torch.randn(30, E))
    for over in ("batch", "sequence"):
        fraction = [int(c) / 60 for c in routing.choices]
        paid = E * sum(f * p * q for f, p, q in zip(fraction, routing.probs.mean(0).tolist(), prices, strict=True))
        assert float(LoadBalancingLoss(prices=prices, over=over)(routing, 1)) == pytest.approx(paid, rel=1e-5)
    sums = [routing.probs[:, e].sum() * prices[e] for e in range(E)]
    torch.testing.assert_close(ImportanceLoss(prices=prices)(routing, 1), uneven(sums))
    halves = [by_loop(half, "all") for half in routing.logits.split(15)]
    torch.testing.assert_close(LoadBalancingLoss(over="sequence")(routing, 2), sum(halves) / 2)


def test_importance_is_even_where_load_is_inverse_to_latency() -> None:
    latency = (1.0, 2.0, 4.0, 8.0, 8.0)
    shares = torch.tensor([1 / value for value in latency])
    routing = Routing(routing_of(torch.randn(6, E)).route, (shares / shares.sum()).expand(6, E))
    assert float(ImportanceLoss(prices=latency)(routing, 1)) == pytest.approx(0, abs=1e-9)
    assert float(ImportanceLoss()(routing, 1)) > 0.3
    assert float(ImportanceLoss(prices="cost")(replace(routing, cost=latency), 1)) == pytest.approx(0, abs=1e-9)


def test_descent_on_priced_importance_finds_the_inverse_latencies() -> None:
    latency, leaf_E = (1.0, 2.0, 4.0, 8.0, 8.0), torch.zeros(E, requires_grad=True)
    optimizer = torch.optim.Adam([leaf_E], lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        routing = Routing(routing_of(torch.zeros(1, E)).route, leaf_E.softmax(0)[None])
        ImportanceLoss(prices=latency)(routing, 1).backward()
        optimizer.step()
    inverse = torch.tensor([1 / value for value in latency])
    torch.testing.assert_close(leaf_E.softmax(0).detach(), inverse / inverse.sum(), rtol=0.01, atol=0.001)


def test_variance_inside_clusters_is_the_loop() -> None:
    logits_TE = torch.randn(7, 6, requires_grad=True)
    routing, inside, total = routing_of(logits_TE), torch.zeros(()), torch.zeros(())
    for row in logits_TE.softmax(1):
        for group in (row[:2], row[2:4], row[4:]):
            inside = inside + sum((p - sum(group) / 2) ** 2 for p in group)
        total = total + sum((p - 1 / 6) ** 2 for p in row)
    loss = ClusterLoss(num_groups=3)(routing, 1)
    assert_same(loss, inside / total, [logits_TE])
    for row, share in (([0.2, 0.2, 0.3, 0.3], 0.0), ([0.1, 0.4, 0.1, 0.4], 1.0), ([0.25] * 4, 0.0)):
        known = Routing(routing.route, torch.tensor([row]))
        assert float(ClusterLoss(num_groups=2)(known, 1)) == pytest.approx(share, abs=1e-6)


def test_locality_is_the_loop_and_zero_for_a_local_router() -> None:
    logits_TE = torch.randn(12, 6, requires_grad=True)  # 4 sequences of 3 tokens, 2 nodes of 3 experts
    routing, expected = routing_of(logits_TE), torch.zeros(())
    for token, row in enumerate(logits_TE.softmax(1)):
        node = token // 3 % 2
        expected = expected - torch.log(sum(row[3 * node : 3 * node + 3])) / 12
    assert_same(LocalityLoss(num_groups=2)(routing, 4), expected, [logits_TE])
    local_TE = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.3, 0.7]])
    assert float(LocalityLoss()(Routing(routing.route, local_TE), 2)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("gate", ["linear", "cosine"])
def test_embeddings_are_judged_by_length_and_angle(gate: Any) -> None:
    loss = EmbeddingLoss(diversity=2.0, simplicity=0.5)
    router = Router(RouterConfig(gate=gate, losses=(loss,)), 6, E)
    rows, off = router.gate.weight, torch.zeros(())
    for a in range(E):
        for b in range(E):
            cosine = (rows[a] * rows[b]).sum() / (rows[a] * rows[a]).sum().sqrt() / (rows[b] * rows[b]).sum().sqrt()
            off = off + (cosine - float(a == b)) ** 2
    length = sum((row * row).sum().sqrt() for row in rows) / E
    value = router.balance_losses(router(torch.randn(4, 6), Context()), 1)["embedding_loss"]
    assert_same(value, 2 * off.sqrt() + 0.5 * length, [rows])
    orthogonal = replace(routing_of(torch.zeros(1, E)), embeddings=3 * torch.eye(E))
    assert float(EmbeddingLoss()(orthogonal, 1)) == pytest.approx(3.0), "no pair alike, length 3"


@pytest.mark.parametrize("mix", ["interpolated", "coefficient"])
def test_the_use_of_experts_is_held_to_a_budget(mix: str) -> None:
    shared, losses = {"d_expert": 4, "mix": mix}, [{"type": "budget_loss", "budget": 0.7}]
    tree = {"experts": {"num_experts": 6, "d_expert": 4}, "shared": shared, "router": {"losses": losses}}
    moe, x_TD = MoE(MoEConfig.model_validate(tree), 8), torch.randn(9, 8)
    gate, share = moe.shared.gate, torch.zeros(())
    for x_D in x_TD:
        odds = torch.exp(gate.weight @ x_D + gate.bias)
        share = share + (odds[0] / odds.sum() if mix == "coefficient" else odds[0] / (1 + odds[0])) / 9
    loss = moe.router.balance_losses(moe(x_TD)[1], 1)["budget_loss"]
    assert_same(loss, (share - 0.7).abs(), [gate.weight, gate.bias])
    assert float(loss.detach()) > 0.04, "not yet kept to"
    optimizer = torch.optim.Adam(moe.shared.parameters(), lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        moe.router.balance_losses(moe(x_TD)[1], 1)["budget_loss"].backward()
        optimizer.step()
    assert float(moe(x_TD)[1].routed_share.mean().detach()) == pytest.approx(0.7, abs=0.03)


@pytest.mark.parametrize(
    ("router", "message"),
    [
        ({"losses": ["load_loss"]}, "load_loss needs noise"),
        ({"losses": ["load_loss"], "noise": ["gaussian", "gumbel"]}, "load_loss needs noise"),
        ({"losses": ["load_loss"], "noise": ["gaussian"], "select": "top_p"}, "load_loss needs noise"),
        ({"losses": ["load_loss"], "noise": ["gaussian"], "select": {"k": 6}}, "load_loss needs noise"),
        ({"losses": ["load_loss"], "noise": ["gaussian"], "select": {"train_k": 3}}, "load_loss needs noise"),
        ({"losses": [{"type": "importance_loss", "prices": [1, 2]}]}, "2 prices for 6 experts"),
        ({"losses": [{"type": "importance_loss", "prices": [2] * 6}]}, "prices do nothing where all experts cost"),
        ({"losses": [{"type": "importance_loss", "prices": [-1, 1, 1, 1, 1, 1]}]}, "greater than or equal to 0"),
        ({"losses": [{"type": "load_loss", "prices": [1]}], "noise": ["gaussian"]}, "1 prices for 6 experts"),
        ({"losses": [{"type": "cluster_loss", "num_groups": 4}]}, "not divisible by num_groups of losses: cluster"),
        ({"losses": [{"type": "locality_loss", "num_groups": 4}]}, "not divisible by num_groups of losses: local"),
        (
            {"losses": ["embedding_loss"], "gate": {"type": "lookup", "by": "token", "num_ids": 9}},
            "gate: lookup has no embedding of each expert",
        ),
    ],
)
def test_losses_that_cannot_be_had_are_refused(router: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        MoEConfig.model_validate({"experts": {"num_experts": 6, "d_expert": 4}, "router": router})
