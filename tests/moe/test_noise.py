"""Noise: it is drawn from the distribution it says, while training only, and masks hold always."""

import math
from dataclasses import replace

import pytest
import torch

from moeforge.moe import Context, Router, RouterConfig
from moeforge.moe.noise import Gaussian, Gumbel, Noise, Visible
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
    assert set(members(Noise)) == {Gaussian, Gumbel, Visible}


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
