"""Sampling against a brute force over plain Python lists."""

import math

import pytest
import torch
from pydantic import ValidationError

from moeforge.errors import UserError
from moeforge.generate.sample import Sampler, Sampling, draw, probabilities

SETTINGS = [
    {},
    {"temperature": 0.3},
    {"sample_k": 1},
    {"sample_k": 5},
    {"sample_k": 100},
    {"top_p": 0.05},
    {"top_p": 0.6},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"sample_k": 8, "top_p": 0.7, "min_p": 0.1, "temperature": 1.7},
]


def brute_force(logits: list[float], sampling: Sampling) -> list[float]:
    """Probabilities by walking down the tokens, likeliest first."""
    weights = [math.exp(logit / sampling.temperature) for logit in logits]
    order = sorted(range(len(logits)), key=lambda token: -weights[token])[: sampling.sample_k]
    left = sum(weights[token] for token in order)
    kept, mass = [], 0.0
    for token in order:
        if mass < sampling.top_p:
            kept.append(token)
        mass += weights[token] / left
    kept = [token for token in kept if weights[token] >= sampling.min_p * weights[kept[0]]]
    total = sum(weights[token] for token in kept)
    return [weights[token] / total if token in kept else 0.0 for token in range(len(logits))]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_cuts_keep_what_brute_force_keeps(settings):
    sampling = Sampling(**settings)
    for _ in range(5):
        logits_V = 2 * torch.randn(31)
        wanted_V = torch.tensor(brute_force(logits_V.tolist(), sampling))
        torch.testing.assert_close(probabilities(logits_V, sampling), wanted_V, atol=1e-6, rtol=1e-5)


def test_tokens_are_drawn_as_often_as_their_probability_says():
    logits_V, sampling = torch.tensor([0.0, 1.0, 2.0, -1.0]), Sampling(temperature=1.0, sample_k=3)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.tensor([draw(logits_V, sampling, generator) for _ in range(3000)]).bincount(minlength=4) / 3000
    torch.testing.assert_close(drawn, probabilities(logits_V, sampling), atol=0.03, rtol=0)
    assert drawn[3] == 0


def test_temperature_zero_and_nearly_zero_take_the_likeliest():
    logits_V, generator = torch.tensor([3.0, 90.0, 89.9, -5.0]), torch.Generator()
    assert draw(logits_V, Sampling(temperature=0), generator) == 1
    assert draw(logits_V, Sampling(temperature=1e-39), generator) == 1


def test_the_seed_decides_and_no_seed_does_not():
    def draws(seed: int | None) -> list[int]:
        generator = Sampling(seed=seed).generator()
        return [draw(torch.zeros(1000), Sampling(), generator) for _ in range(8)]

    assert draws(3) == draws(3) != draws(4)
    assert draws(None) != draws(None)


def test_a_cut_that_would_do_nothing_is_refused():
    with pytest.raises(ValidationError, match="would do nothing"):
        Sampling(temperature=0, top_p=0.9)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_broken_logits_are_the_models_fault(bad):
    with pytest.raises(UserError, match="not finite"):
        Sampler(Sampling(), []).pick(torch.tensor([0.0, bad]))
