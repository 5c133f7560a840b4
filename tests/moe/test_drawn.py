"""Drawn choices: their frequencies, their weights against loops, and the gradient of the draw against enumeration."""

from typing import Any, Literal

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from moeforge.moe import Context, MoEConfig, Router, RouterConfig
from moeforge.moe.scores import Logits
from moeforge.moe.select import Draw, Selection
from moeforge.moe.weigh import RULES, Drawn
from tests.moe.brute_force import ranked

TRAINING, OUTSIDE = Context(training=True), Context()
Rule = Literal["midpoint", "heun"]


def near(logits: list[float], left: list[int], margin: float | None) -> list[int]:
    """Of the experts left, those not too far behind the best."""
    best = max(logits[e] for e in left)
    return [e for e in left if margin is None or (best - logits[e]) / max(abs(logits[e]), best) <= margin]


def probabilities(logits_E: Tensor, among: list[int]) -> dict[int, Tensor]:
    """Softmax over some experts."""
    total = sum(torch.exp(logits_E[e]) for e in among)
    return {e: torch.exp(logits_E[e]) / total for e in among}


@pytest.mark.parametrize("margin", [None, 0.5])
def test_choices_are_draws_without_repetition(margin: float | None) -> None:
    logits = [2.0, 1.0, 0.5, 1.5]
    selection = Draw(k=2, margin=margin)(torch.tensor(logits).expand(60000, 4), TRAINING)
    first = probabilities(torch.tensor(logits), near(logits, [0, 1, 2, 3], margin))
    for one, p in first.items():
        second = probabilities(torch.tensor(logits), near(logits, [e for e in range(4) if e != one], margin))
        for other, q in second.items():
            share = (selection.ids == torch.tensor([one, other])).all(1).double().mean()
            assert float(share) == pytest.approx(float(p * q), abs=0.006), (one, other)
    assert (selection.ids[:, 0] != selection.ids[:, 1]).all()


@pytest.mark.parametrize("margin", [None, 0.4])
def test_weights_and_gradients_are_those_of_transformers_for_the_same_draws(margin: float | None) -> None:
    phimoe = pytest.importorskip("transformers.models.phimoe.modeling_phimoe")
    logits_TE, towards_T = (2 * torch.randn(200, 6)).requires_grad_(), torch.randn(200)
    selection = Draw(k=2, margin=margin)(logits_TE.detach(), TRAINING)
    weights_TK = Drawn()(logits_TE, selection, TRAINING)
    for choice in range(2):
        left_TE = logits_TE.detach() if choice == 0 else logits_TE.detach().scatter(1, selection.ids[:, :1], -torch.inf)
        probs_TE = left_TE.masked_fill(~selection.among[:, choice], -torch.inf).softmax(1)
        ids_T1 = selection.ids[:, choice, None]
        prob_T1, weight_T = probs_TE.gather(1, ids_T1), weights_TK[:, choice]
        whole_T1 = (weight_T.detach()[:, None] / prob_T1).round(decimals=4)
        assert {round(float(share), 3) for share in whole_T1.unique()} == {0.333, 1.0}
        expected_T1 = phimoe.PhimoeMultiplier.apply(logits_TE, prob_T1, ids_T1, probs_TE, whole_T1)
        torch.testing.assert_close(weight_T, expected_T1[:, 0], rtol=1e-3, atol=1e-5)
        ours, theirs = (
            torch.autograd.grad((weight * towards_T).sum(), logits_TE, retain_graph=True)[0]
            for weight in (weight_T, expected_T1[:, 0])
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_outside_training_the_best_are_chosen_and_weighed_one_after_the_other() -> None:
    router = Router(RouterConfig(select=Draw(k=3, margin=0.6), score=Logits(), weigh=Drawn()), 8, 6).eval()
    x_TD = torch.randn(40, 8)
    with torch.no_grad():
        first, second = router(x_TD, OUTSIDE), router(x_TD, OUTSIDE)
    assert torch.equal(first.route.weight, second.route.weight) and torch.equal(first.route.token, second.route.token)
    for token, logits_E in enumerate(first.logits):
        left, expected = list(range(6)), {}
        for best in ranked(logits_E.tolist())[:3]:
            expected[best] = float(probabilities(logits_E, near(logits_E.tolist(), left, 0.6))[best])
            left.remove(best)
        mine_N = first.route.token == token
        found = dict(zip(first.route.expert[mine_N].tolist(), first.route.weight[mine_N].tolist(), strict=True))
        assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_weights_shrink_by_lot_and_the_likeliest_never(rule: Rule) -> None:
    logits_TE = torch.tensor([0.3, -0.2, 0.1]).expand(40000, 3).clone().requires_grad_()
    selection = Draw(k=2)(logits_TE.detach(), TRAINING)
    weights_TK = Drawn(rule=rule)(logits_TE, selection, TRAINING)
    exact_TK = torch.stack(
        [torch.where(selection.among[:, k], logits_TE, -torch.inf).softmax(1).gather(1, selection.ids[:, k, None])[:, 0]
         for k in range(2)], 1
    )  # fmt: skip
    shrunk, often, gain = RULES[rule]
    ratio_TK = (weights_TK / exact_TK).detach()
    is_best_TK = torch.stack([
        selection.ids[:, 0] == 0,
        selection.ids[:, 1] == torch.where(selection.ids[:, 0] == 0, 2, 0),
    ], 1)  # fmt: skip
    assert ratio_TK[is_best_TK].sub(1).abs().max() < 1e-5
    small_N = ratio_TK[~is_best_TK] < 0.9
    assert float(small_N.double().mean()) == pytest.approx(often, abs=0.01)
    torch.testing.assert_close(ratio_TK[~is_best_TK][small_N], torch.full((int(small_N.sum()),), shrunk))
    towards_TK = torch.randn(40000, 2)
    ours, theirs = (torch.autograd.grad((w * towards_TK).sum(), logits_TE)[0] for w in (weights_TK, exact_TK))
    torch.testing.assert_close(ours, gain * theirs)


def setting(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Router logits, outputs of four experts and a target: one token, a loss with curvature in every direction."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return 0.5 * draw(4), 2 * draw(4, 3), draw(3)


def loss_of(weight: Tensor, output_D: Tensor, target_D: Tensor) -> Tensor:
    """Squared distance and a bend."""
    y_D = weight * output_D
    return (y_D - target_D).square().sum() + torch.tanh(y_D).sum()


def gradients(seed: int, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
    """[E] each: of the expected loss by enumeration; of the estimator, expected; of the plain gate of the best."""
    logits_E, outputs_ED, target_D = setting(seed)
    leaf_E = logits_E.clone().requires_grad_()
    probs_E = leaf_E.softmax(0)
    losses = torch.stack([loss_of(p, out_D, target_D) for p, out_D in zip(probs_E, outputs_ED, strict=True)])
    (exact_E,) = torch.autograd.grad((probs_E * losses).sum(), leaf_E, retain_graph=True)
    best = int(probs_E.argmax())
    (plain_E,) = torch.autograd.grad(losses[best], leaf_E, retain_graph=True)
    shrunk, often, gain = RULES[rule]
    estimate_E = torch.zeros(4, dtype=torch.float64)
    for expert in range(4):
        (slope_E,) = torch.autograd.grad(probs_E[expert], leaf_E, retain_graph=True)
        prob = probs_E[expert].detach()
        for place, chance in ((1.0, 1.0),) if expert == best else ((shrunk, often), (1.0, 1 - often)):
            weight = (place * prob).requires_grad_()
            (towards,) = torch.autograd.grad(loss_of(weight, outputs_ED[expert], target_D), weight)
            estimate_E += prob * chance * gain * towards * slope_E
    return exact_E, estimate_E, plain_E


def off(estimate_E: Tensor, exact_E: Tensor) -> float:
    """Relative error of the direction: what no learning rate can mend."""
    return 1 - float(torch.cosine_similarity(estimate_E, exact_E, dim=0))


@pytest.mark.parametrize("rule", RULES)
def test_the_mean_of_the_estimator_is_nearer_to_the_exact_gradient_than_the_plain_gate(rule: Rule) -> None:
    errors = [[off(g, exact) for g in rest] for exact, *rest in (gradients(seed, rule) for seed in range(50))]
    ours, plain = (sum(error) / 50 for error in zip(*errors, strict=True))
    assert ours < 0.3 * plain, (ours, plain)


@pytest.mark.parametrize("rule", RULES)
def test_many_draws_have_the_gradient_that_enumeration_says(rule: Rule) -> None:
    logits_E, outputs_ED, target_D = setting(3)
    leaf_E = logits_E.clone().requires_grad_()
    logits_TE = leaf_E.expand(200_000, 4)
    selection = Draw(k=1)(logits_TE.detach(), TRAINING)
    weight_T1 = Drawn(rule=rule)(logits_TE, selection, TRAINING)
    y_TD = weight_T1 * outputs_ED[selection.ids[:, 0]]
    loss = ((y_TD - target_D).square().sum(1) + torch.tanh(y_TD).sum(1)).mean()
    (found_E,) = torch.autograd.grad(loss, leaf_E)
    _, expected_E, plain_E = gradients(3, rule)
    torch.testing.assert_close(found_E, expected_E, rtol=0.03, atol=0.01)
    assert off(plain_E, expected_E) > 0.02, "the comparison tells them apart"


@pytest.mark.parametrize(
    ("router", "message"),
    [
        ({"weigh": "drawn"}, "weigh: drawn needs select: draw"),
        (
            {"weigh": "drawn", "select": "draw", "score": "logits", "noise": [{"type": "visible", "common": 5}]},
            "noise: visible shows some tokens one expert",
        ),
        ({"select": "draw"}, "select: draw has its own softmax; score: softmax would come before it"),
        ({"select": {"type": "draw", "k": 7}, "score": "logits"}, "k = 7 is more than num_experts = 6"),
    ],
)
def test_draws_that_make_no_sense_are_refused(router: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        MoEConfig.model_validate({"experts": {"num_experts": 6, "d_expert": 4}, "router": router})


def test_a_selection_says_what_was_left() -> None:
    selection: Selection = Draw(k=2)(torch.tensor([[0.0, 3.0, 1.0]]), OUTSIDE)
    assert selection.ids.tolist() == [[1, 2]]
    assert selection.among.tolist() == [[[True, True, True], [True, False, True]]]


@pytest.mark.parametrize("eps", [0.01, 0.1, 0.3])
def test_two_choices_are_those_of_the_published_code(eps: float) -> None:
    published = pytest.importorskip("transformers.models.phimoe.modeling_phimoe").sparsemixer
    logits_TE, towards_TK = torch.randn(300, 8), torch.randn(300, 2)
    select = Draw(k=2, margin=2 * eps)
    weights_TK, ids_TK = published(logits_TE, eps, training=False)
    ours = select(logits_TE, OUTSIDE)
    assert torch.equal(ours.ids, ids_TK)
    torch.testing.assert_close(Drawn()(logits_TE, ours, OUTSIDE), weights_TK)

    leaf_TE = logits_TE.clone().requires_grad_()
    weights_TK, ids_TK = published(leaf_TE, eps, training=True)
    (expected_TE,) = torch.autograd.grad((weights_TK * towards_TK).sum(), leaf_TE)
    first_TE = torch.zeros(300, 8, dtype=torch.bool).scatter(1, ids_TK[:, :1], True)
    among = [select.near(logits_TE), select.near(logits_TE.masked_fill(first_TE, -torch.inf))]
    drawn = Drawn()(leaf_TE, Selection(ids=ids_TK, among=torch.stack(among, 1)), TRAINING)
    (found_TE,) = torch.autograd.grad((drawn * towards_TK).sum(), leaf_TE)
    torch.testing.assert_close(found_TE, expected_TE)
