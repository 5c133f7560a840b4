"""Balance losses against plain loops, and exactly right under gradient accumulation; the bias controller."""

import math
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from moeforge.moe import Context, Route, Router, RouterConfig, Routing
from moeforge.moe.balance import (
    BalanceLoss,
    BudgetLoss,
    ClusterLoss,
    ConflictLoss,
    Controller,
    CoreLoss,
    EmbeddingLoss,
    EntropyLoss,
    ExpertBias,
    GateLoss,
    ImportanceLoss,
    LoadBalancingLoss,
    LoadLoss,
    LocalityLoss,
    Overflow,
    Sparsity,
    SparsityLoss,
    ZLoss,
)
from moeforge.moe.scores import Relu
from moeforge.moe.select import Threshold, TopK
from moeforge.moe.weigh import Scores
from tests.moe.brute_force import members

E, K = 5, 2
Choices = Literal["all", "first"]


def routing_of(logits_TE: Tensor) -> Routing:
    """A softmax router's decision, in the type of the logits."""
    probs_TE = logits_TE.softmax(1)
    weights_TK, ids_TK = probs_TE.topk(K)
    return Routing(Route.from_top_k(ids_TK, weights_TK, logits_TE.shape[1]), probs_TE, logits_TE)


def by_loop(logits_TE: Tensor, choices: Choices) -> Tensor:
    """E * sum f_i P_i, counted token by token."""
    probs_TE, num_experts = logits_TE.softmax(1), logits_TE.shape[1]
    chosen = [row.tolist() for row in probs_TE.topk(K if choices == "all" else 1).indices]
    total = torch.zeros(())
    for expert in range(num_experts):
        count = sum(row.count(expert) for row in chosen)
        total = total + count / sum(map(len, chosen)) * probs_TE[:, expert].mean()
    return num_experts * total


@pytest.mark.parametrize("choices", ["all", "first"])
@pytest.mark.parametrize("over", ["batch", "micro_batch", "sequence"])
def test_load_balancing_is_the_loop(over: Any, choices: Choices) -> None:
    logits_TE = torch.randn(12, E)
    loss = LoadBalancingLoss(over=over, choices=choices)
    torch.testing.assert_close(loss(routing_of(logits_TE), 1), by_loop(logits_TE, choices))
    parts = logits_TE.split(4) if over == "sequence" else [logits_TE]
    expected = torch.stack([by_loop(part, choices) for part in parts]).mean()
    torch.testing.assert_close(loss(routing_of(logits_TE), 3), expected)


@pytest.mark.parametrize("over", ["batch", "sequence"])
def test_an_even_load_costs_one(over: Any) -> None:
    ids_TK = torch.arange(20).view(10, 2) % E
    probs_TE = torch.full((10, E), 1 / E)
    routing = Routing(Route.from_top_k(ids_TK, torch.ones(10, 2), E), probs_TE, probs_TE)
    assert float(LoadBalancingLoss(over=over)(routing, 2)) == pytest.approx(1)
    collapsed = Routing(routing.route, torch.eye(E)[[0] * 10])
    assert float(LoadBalancingLoss(choices="first")(collapsed, 1)) == pytest.approx(E)


def test_z_loss_is_the_loop() -> None:
    logits_TE = 3 * torch.randn(7, E)
    expected = sum(float(torch.log(torch.exp(row).sum())) ** 2 for row in logits_TE) / 7
    assert float(ZLoss()(routing_of(logits_TE), 1)) == pytest.approx(expected)


def accumulated(losses: list[Any], logits_TE: Tensor, sizes: list[int], sequences: list[int]) -> Tensor:
    """The gradient of sum over micro-batches of share * loss, with the counts of the whole step."""
    leaf = logits_TE.clone().requires_grad_()
    routings = [routing_of(part) for part in leaf.split(sizes)]
    for loss in losses:
        counts = sum(loss.counts(routing) for routing in routings) if hasattr(loss, "counts") else None
        for routing, size, batch_size in zip(routings, sizes, sequences, strict=True):
            (size / len(leaf) * loss(routing, batch_size, counts)).backward(retain_graph=True)
    assert leaf.grad is not None
    return leaf.grad


@pytest.mark.parametrize(
    "loss",
    [LoadBalancingLoss(), LoadBalancingLoss(choices="first"), LoadBalancingLoss(over="sequence"), ZLoss()],
    ids=repr,
)
def test_accumulation_gives_exactly_the_gradient_of_the_whole_batch(loss: Any) -> None:
    logits_TE = torch.randn(24, E, dtype=torch.float64)
    whole = accumulated([loss], logits_TE, [24], [6])
    parts = accumulated([loss], logits_TE, [4, 12, 8], [1, 3, 2])
    torch.testing.assert_close(parts, whole, rtol=1e-13, atol=1e-15)
    assert bool(whole.any())


def test_the_micro_batch_scope_counts_each_micro_batch_by_itself() -> None:
    logits_TE = torch.randn(24, E, dtype=torch.float64)
    loss = LoadBalancingLoss(over="micro_batch")
    whole, parts = accumulated([loss], logits_TE, [24], [1]), accumulated([loss], logits_TE, [12, 12], [1, 1])
    assert not torch.allclose(whole, parts)
    alone = torch.cat([accumulated([loss], half, [12], [1]) / 2 for half in logits_TE.split(12)])
    torch.testing.assert_close(parts, alone)


def test_every_kind_is_tested_here() -> None:
    here = {LoadBalancingLoss, ZLoss, ImportanceLoss, EntropyLoss, SparsityLoss, GateLoss}
    elsewhere = {LoadLoss, ClusterLoss, LocalityLoss, EmbeddingLoss, BudgetLoss, ConflictLoss, CoreLoss}
    assert set(members(BalanceLoss)) == here | elsewhere
    assert set(members(Controller)) == {ExpertBias, Sparsity, Overflow}


def test_what_a_gate_wants_is_its_mean_over_tokens() -> None:
    routing = replace(routing_of(torch.randn(4, E)), gate_loss=torch.tensor([1.0, 2.0, 3.0, 6.0]))
    assert float(GateLoss()(routing, 2)) == 3.0


def test_importance_is_the_loop() -> None:
    routing = routing_of(torch.randn(9, E))
    sums = [sum(float(row[e]) for row in routing.probs) for e in range(E)]
    mean = sum(sums) / E
    expected = sum((s - mean) ** 2 for s in sums) / E / mean**2
    assert float(ImportanceLoss()(routing, 1)) == pytest.approx(expected, rel=1e-4)
    even = Routing(routing.route, torch.full((9, E), 1 / E))
    assert float(ImportanceLoss()(even, 1)) == pytest.approx(0, abs=1e-9)


def test_entropies_are_the_loop_and_their_difference_is_mutual_information() -> None:
    routing = routing_of(torch.randn(9, E))

    def entropy(shares: list[float]) -> float:
        return -sum(p * math.log(p) for p in shares if p > 0)

    of_token = sum(entropy(row.tolist()) for row in routing.probs) / 9
    of_batch = entropy([float(routing.probs[:, e].mean()) for e in range(E)])
    assert float(EntropyLoss()(routing, 1)) == pytest.approx(of_token, rel=1e-5)
    assert float(EntropyLoss(token=0, batch=-1)(routing, 1)) == pytest.approx(-of_batch, rel=1e-5)
    assert float(EntropyLoss(batch=-1)(routing, 1)) == pytest.approx(of_token - of_batch, rel=1e-4)
    one_each = Routing(routing.route, torch.eye(E))  # each token sure, all experts used: log E
    assert float(EntropyLoss(batch=-1)(one_each, 1)) == pytest.approx(-math.log(E), rel=1e-5)


def test_a_masked_expert_has_no_part_in_the_entropy() -> None:
    logits_TE = torch.randn(9, E)
    logits_TE[:, 2] = -torch.inf
    leaf_TE, rest_TE = logits_TE.clone().requires_grad_(), logits_TE[:, [0, 1, 3, 4]].clone().requires_grad_()
    loss = EntropyLoss(batch=-0.5)
    ours, theirs = loss(routing_of(leaf_TE), 1), loss(routing_of(rest_TE), 1)
    torch.testing.assert_close(ours, theirs)
    (ours_TE,), (theirs_TE,) = torch.autograd.grad(ours, leaf_TE), torch.autograd.grad(theirs, rest_TE)
    torch.testing.assert_close(ours_TE[:, [0, 1, 3, 4]], theirs_TE)
    assert not ours_TE[:, 2].any()


def test_sparsity_is_the_loop() -> None:
    router = Router(RouterConfig(score=Relu(), select=Threshold(), losses=()), 6, E)
    with torch.no_grad():
        routing = router(torch.randn(20, 6), Context())
    scores_TE = routing.scores
    load = [sum(float(row[e] > 0) for row in scores_TE) for e in range(E)]
    even = sum(load) / E
    plain = sum(float(s) for row in scores_TE for s in row) / 20
    paid = sum(float(row[e]) * load[e] / even for row in scores_TE for e in range(E)) / 20
    assert float(SparsityLoss(even=False)(routing, 1)) == pytest.approx(plain, rel=1e-5)
    assert float(SparsityLoss()(routing, 1)) == pytest.approx(paid, rel=1e-5)


def test_dear_experts_pay_more_and_free_ones_are_judged_together() -> None:
    routing = replace(routing_of(torch.randn(30, E)), cost=(1.0, 0.5, 0.5, 0.0, 0.0))
    fraction = [int(c) / 60 for c in routing.choices]
    mean_P = routing.probs.mean(0).tolist()
    share = [*fraction[:3], *([(fraction[3] + fraction[4]) / 2] * 2)]
    together = E * sum(f * p for f, p in zip(share, mean_P, strict=True))
    assert float(LoadBalancingLoss(free="together")(routing, 1)) == pytest.approx(together, rel=1e-5)
    dear = E * sum(f * p * c / 0.4 for f, p, c in zip(fraction, mean_P, routing.cost, strict=True))
    assert float(LoadBalancingLoss(prices="cost")(routing, 1)) == pytest.approx(dear, rel=1e-5)


def test_a_bias_in_proportion_to_the_load() -> None:
    bias_E = torch.zeros(4)
    ExpertBias(rate=0.1, by="share")(bias_E, torch.tensor([10, 2, 5, 3]), 20)
    assert bias_E.tolist() == pytest.approx([-0.1, 0.06, 0.0, 0.04])


def test_the_weight_of_sparsity_steers_to_the_wanted_number_of_experts() -> None:
    parts = {"score": Relu(), "select": Threshold(), "losses": (SparsityLoss(),), "controller": Sparsity(k=2)}
    router = Router(RouterConfig(**parts), 6, E)
    assert router.loss_weights == {"sparsity_loss": 1e-4}
    router.step(torch.tensor([9, 9, 9, 9, 9]), 10)
    assert router.loss_weights["sparsity_loss"] == pytest.approx(1.2e-4)
    for _ in range(2):
        router.step(torch.tensor([1, 1, 1, 1, 1]), 10)
    assert router.loss_weights["sparsity_loss"] == pytest.approx(1e-4 / 1.2)
    before = router.loss_weights
    router.step(torch.tensor([4, 4, 4, 4, 4]), 10)
    assert router.loss_weights == before, "exactly k: nothing moves"


def test_the_weight_of_balance_follows_the_overflow() -> None:
    scale = torch.ones(())
    Overflow(memory=0.5, factor=2.0)(scale, torch.tensor([10, 2, 5, 3]), 20)  # 5 of 20 are over the even 5
    assert float(scale) == pytest.approx(0.5 + 0.5 * 2.0 * 0.25)
    Overflow(memory=0.0, factor=100.0, most=1.5)(scale, torch.tensor([20, 0, 0, 0]), 20)
    assert float(scale) == pytest.approx(1.5)


def test_a_router_under_accumulation() -> None:
    linear = (LoadBalancingLoss(over="sequence"), ZLoss(), EntropyLoss(), EmbeddingLoss())
    losses = (LoadBalancingLoss(prices=(1, 2, 3, 4, 5)), SparsityLoss(), *linear)
    for loss in losses:
        router = Router(RouterConfig(losses=(loss,)), 6, E)
        x_TD = torch.randn(20, 6)
        whole = router.balance_losses(router(x_TD, Context(5)), 5)
        (expected,) = torch.autograd.grad(sum(whole.values()), router.gate.weight)
        routings = [router(part, Context(batch)) for part, batch in zip(x_TD.split([8, 12]), (2, 3), strict=True)]
        counts = [router.counts(routing) for routing in routings]
        assert list(counts[0]) == ([loss.type] if loss in losses[:2] else [])
        step = {name: counts[0][name] + counts[1][name] for name in counts[0]}
        values = [router.balance_losses(r, b, step)[loss.type] for r, b in zip(routings, (2, 3), strict=True)]
        (gradient,) = torch.autograd.grad(0.4 * values[0] + 0.6 * values[1], router.gate.weight)
        torch.testing.assert_close(gradient, expected)


def biased_router(**parts: Any) -> Router:
    return Router(RouterConfig(select=TopK(k=1), controller=ExpertBias(rate=0.25), losses=(), **parts), 4, 4)


def test_the_bias_moves_against_the_load() -> None:
    router = biased_router()
    router.step(torch.tensor([10, 2, 5, 3]), 20)
    assert router.expert_bias is not None and router.expert_bias.tolist() == [-0.25, 0.25, 0.0, 0.25]
    router.step(torch.tensor([0, 4, 0, 0]), 4)
    assert router.expert_bias.tolist() == [0.0, 0.0, 0.25, 0.5]


def test_a_bias_of_rate_zero_stays_as_it_was_loaded_and_chooses() -> None:
    router, x_TD = (
        Router(RouterConfig(select=TopK(k=1), controller=ExpertBias(rate=0), losses=()), 4, 4),
        torch.randn(9, 4),
    )
    router.load_state_dict(router.state_dict() | {"expert_bias": torch.tensor([0.0, 9.0, 0.5, -1.0])})
    for _ in range(2):
        assert router(x_TD, Context()).route.counts.tolist() == [0, 9, 0, 0]
        router.step(torch.tensor([10, 2, 5, 3]), 20)
    assert router.expert_bias is not None and router.expert_bias.tolist() == [0.0, 9.0, 0.5, -1.0]


def test_the_bias_sees_loads_that_bf16_cannot_tell_apart() -> None:
    router = biased_router().bfloat16()
    router.step(torch.tensor([1001, 1000, 1000, 999]), 4000)
    assert router.expert_bias is not None and router.expert_bias.tolist() == [-0.25, 0.0, 0.0, 0.25]


def test_the_bias_changes_who_is_chosen_and_no_weight() -> None:
    router, x_TD = biased_router(weigh=Scores()), torch.randn(9, 4)
    assert router.expert_bias is not None
    before = router(x_TD, Context())
    router.expert_bias[3] = 10.0
    after = router(x_TD, Context())
    assert before.route.counts.tolist() != [0, 0, 0, 9] and after.route.counts.tolist() == [0, 0, 0, 9]
    torch.testing.assert_close(after.route.weight, after.probs[:, 3])
    torch.testing.assert_close(after.probs, before.probs)
    torch.testing.assert_close(after.logits, before.logits)


def test_forward_never_moves_the_bias() -> None:
    router = biased_router()
    for _ in range(3):
        router(torch.randn(9, 4), Context())
    assert router.expert_bias is not None and router.expert_bias.tolist() == [0.0] * 4
    assert "expert_bias" in router.state_dict() and not router.expert_bias.requires_grad
    plain = Router(RouterConfig(), 4, 4)
    plain.step(torch.tensor([1, 2, 3, 4]), 10)
    assert plain.expert_bias is None


def test_probabilities_of_zero_have_an_entropy_with_a_gradient() -> None:
    router = Router(RouterConfig(score={"type": "relu"}, losses=[EntropyLoss(batch=-1.0)]), 8, 4)
    routing = router(torch.randn(9, 8, generator=torch.Generator().manual_seed(1)), Context())
    assert (routing.probs == 0).any()
    sum(router.balance_losses(routing, 1).values()).backward()
    assert router.gate.weight.grad.isfinite().all() and router.gate.weight.grad.abs().sum() > 0
