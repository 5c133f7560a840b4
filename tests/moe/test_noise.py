"""Noise: it is drawn from the distribution it says, while training only, and masks hold always."""

import math
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from moeforge.moe import Context, MoEConfig, Router, RouterConfig
from moeforge.moe.noise import ExpertDropout, Gaussian, Gumbel, Noise, Visible
from moeforge.moe.schedule import Ramp
from tests.moe.brute_force import members

D, E = 8, 6
TRAINING, OUTSIDE = Context(training=True), Context()


@pytest.mark.parametrize("config", [Gaussian(std=0.3), Gaussian(), Gumbel()], ids=repr)
def test_noise_is_for_training_alone(config: Gaussian | Gumbel) -> None:
    noise, logits_TE, x_TD = config.build(D, E), torch.randn(9, E), torch.randn(9, D)
    assert torch.equal(noise(logits_TE, x_TD, OUTSIDE), logits_TE)
    assert not torch.equal(noise(logits_TE, x_TD, TRAINING), logits_TE)


def test_every_kind_is_tested() -> None:
    assert set(members(Noise)) == {Gaussian, Gumbel, Visible, ExpertDropout}


def test_gaussian_noise_has_the_deviation_it_says() -> None:
    zeros_TE, x_TD = torch.zeros(20000, 2), torch.randn(20000, D)
    assert Gaussian(std=0.3).build(D, 2)(zeros_TE, x_TD, TRAINING).std().item() == pytest.approx(0.3, rel=0.02)
    learned = Gaussian().build(D, 2)
    noisy_TE = learned(zeros_TE, x_TD, TRAINING)
    assert noisy_TE.std().item() == pytest.approx(math.log(2), rel=0.02)
    noisy_TE.square().sum().backward()
    assert learned.weight.grad.abs().min() > 0


def test_the_best_of_gumbel_logits_is_a_draw_from_the_softmax() -> None:
    logits_E = torch.tensor([0.0, 1.0, -1.0, 2.0])
    drawn_T = Gumbel().build(D, 4)(logits_E.expand(40000, 4), torch.zeros(40000, D), TRAINING).argmax(1)
    torch.testing.assert_close(torch.bincount(drawn_T, minlength=4) / 40000, logits_E.softmax(0), rtol=0, atol=0.01)
    still = Gumbel(scale=Ramp(start=1, end=0, steps=10)).build(D, 4)
    assert torch.equal(still(logits_E[None], torch.zeros(1, D), replace(TRAINING, step=10)), logits_E[None])


def test_jitter_moves_the_router_within_its_bound_while_training() -> None:
    router, x_TD = Router(RouterConfig(input_jitter=0.1), D, E), torch.randn(50, D)
    exact_TE = x_TD @ router.gate.weight.T
    jittered_TE = router(x_TD, Context()).logits
    bound_TE = 0.1 * x_TD.abs() @ router.gate.weight.abs().T
    assert not torch.allclose(jittered_TE, exact_TE)
    assert ((jittered_TE - exact_TE).abs() <= bound_TE + 1e-6).all()
    torch.testing.assert_close(router.eval()(x_TD, Context()).logits, exact_TE)


def test_a_rare_token_id_sees_one_expert_and_a_frequent_one_several() -> None:
    mask = Visible(common=100, experts=3).build(D, E)
    ids_T = torch.arange(400)
    logits_TE = mask(torch.zeros(400, E), torch.zeros(400, D), Context(token_ids=ids_T))
    seen_T = logits_TE.isfinite().sum(1)
    assert seen_T[:100].unique().tolist() == [3] and seen_T[100:].unique().tolist() == [1]
    again_TE = mask(torch.zeros(1, E), torch.zeros(1, D), Context(token_ids=ids_T[200:201], training=True))
    assert torch.equal(again_TE[0], logits_TE[200])
    assert logits_TE[100:].isfinite().sum(0).min() > 25, "rare ids are spread over the experts"
    with pytest.raises(ValueError, match="needs the token ids"):
        mask(torch.zeros(1, E), torch.zeros(1, D), Context())


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("at_least", [1, 2])
def test_whole_experts_are_masked_by_lot_and_no_cluster_is_emptied(groups: int, at_least: int) -> None:
    size = 12 // groups
    mask, logits_TE = ExpertDropout(rate=0.6, num_groups=groups, at_least=at_least).build(D, 12), torch.randn(5, 12)
    masked_RE = []
    for _ in range(400):
        noisy_TE = mask(logits_TE, torch.zeros(5, D), TRAINING)
        gone_TE = noisy_TE == -torch.inf
        assert torch.equal(gone_TE, gone_TE[:1].expand(5, 12)), "for all tokens of the batch"
        assert torch.equal(noisy_TE[~gone_TE], logits_TE[~gone_TE])
        assert (~gone_TE[0]).unflatten(0, (groups, size)).sum(1).min() >= at_least
        masked_RE.append(gone_TE[0])
    rate_E = torch.stack(masked_RE).double().mean(0)
    binomial = [math.comb(size, n) * 0.6**n * 0.4 ** (size - n) for n in range(size + 1)]
    expected = sum(p * min(n, size - at_least) for n, p in enumerate(binomial)) / size
    assert rate_E.tolist() == pytest.approx([expected] * 12, abs=0.1) and len({*map(str, masked_RE)}) > 50
    assert mask(logits_TE, torch.zeros(5, D), OUTSIDE) is logits_TE


def test_a_masked_expert_gets_no_token() -> None:
    router = Router(RouterConfig(noise=(ExpertDropout(rate=0.5, at_least=2),)), D, E)
    routing = router(torch.randn(200, D), Context())
    gone_E = routing.logits[0] == -torch.inf
    assert 0 < int(gone_E.sum()) <= E - 2 and int(routing.choices[gone_E].sum()) == 0
    routing.route.weight.sum().backward()
    assert torch.equal(router.gate.weight.grad.abs().sum(1) == 0, gone_E)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_groups": 4}, "not divisible by num_groups of noise: expert_dropout"),
        ({"at_least": 6}, "masks nothing: no group has more"),
        ({"at_least": 1}, "may leave fewer experts than a token takes: raise at_least"),
    ],
)
def test_dropout_of_too_little_or_too_much_is_refused(change: dict[str, int], message: str) -> None:
    router = {"noise": [{"type": "expert_dropout", **change}], "select": {"k": 2}}
    with pytest.raises(ValidationError, match=message):
        MoEConfig.model_validate({"experts": {"num_experts": E, "d_expert": 4}, "router": router})
    standardised = {"noise": [{"type": "expert_dropout", "at_least": 2}], "score": {"standardize": True}}
    with pytest.raises(ValidationError, match=r"have no mean: score.standardize is on"):
        MoEConfig.model_validate({"experts": {"num_experts": E, "d_expert": 4}, "router": standardised})
