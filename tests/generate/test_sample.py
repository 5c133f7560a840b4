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


@pytest.mark.parametrize("smallest", [5e-324, 1e-60, 1e-40, 1e-30])
@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p"])
def test_settings_that_float32_does_not_hold(name, smallest):
    logits_V = torch.tensor([3.0, 90.0, 89.9999, -5.0])
    probs_V = probabilities(logits_V, Sampling(**{"temperature": 1.0, name: smallest}))
    wanted_V = logits_V.softmax(-1) if name == "min_p" else torch.tensor([0.0, 1.0, 0.0, 0.0])
    torch.testing.assert_close(probs_V, wanted_V)


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


transformers = pytest.importorskip("transformers", reason="its processors are the reference")


@pytest.mark.parametrize("penalty", [0.5, 1.3])
def test_the_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    seen, logits_V = [3, 5, 5, 20], 3 * torch.randn(31)
    theirs = transformers.RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([seen]), logits_V[None].clone())
    sampler = Sampler(Sampling(repetition_penalty=penalty), seen)
    torch.testing.assert_close(sampler._changed(logits_V), theirs[0])


def test_the_cuts_are_those_of_transformers() -> None:
    sampling = Sampling(temperature=0.7, sample_k=12, top_p=0.8, min_p=0.05)
    for _ in range(20):
        logits_V = 3 * torch.randn(31)
        left, ids = logits_V[None].clone(), torch.zeros(1, 1, dtype=torch.long)
        for part in (
            transformers.TemperatureLogitsWarper(0.7),
            transformers.TopKLogitsWarper(12),
            transformers.TopPLogitsWarper(0.8),
            transformers.MinPLogitsWarper(0.05),
        ):
            left = part(ids, left)
        torch.testing.assert_close(probabilities(logits_V, sampling), left[0].softmax(-1))


def test_presence_and_frequency_count_what_was_written_alone() -> None:
    """OpenAI: mu[j] - c[j] * frequency - (c[j] > 0) * presence, c of the completion."""
    sampling = Sampling(temperature=0, presence_penalty=0.5, frequency_penalty=0.25)
    sampler, logits_V = Sampler(sampling, [1, 1, 1]), torch.zeros(8)
    wanted_V = torch.zeros(8)
    for token in (4, 4, 2):
        bumped_V = logits_V.clone()
        bumped_V[token] = 50
        assert sampler.pick(bumped_V).token_id == token
    wanted_V[4], wanted_V[2] = -0.5 - 2 * 0.25, -0.5 - 0.25
    torch.testing.assert_close(sampler._changed(logits_V), wanted_V)


def test_biases_bans_and_their_limits() -> None:
    sampler = Sampler(Sampling(temperature=0, logit_bias={3: 100.0, 5: 90.0}), [], banned=[3])
    assert sampler.pick(torch.zeros(8)).token_id == 5
    with pytest.raises(UserError, match="there is no token 8"):
        Sampling(logit_bias={8: 1.0}).check(8)
    with pytest.raises(ValidationError, match="between"):
        Sampling(logit_bias={1: math.inf})


def test_logprobs_are_the_models_before_anything_is_done_to_them() -> None:
    logits_V = 2 * torch.randn(300)
    for count in (0, 1, 5, 400):
        sampling = Sampling(temperature=0, logit_bias={7: 100.0}, logprobs=count)
        picked, wanted_V = Sampler(sampling, []).pick(logits_V), logits_V.log_softmax(-1)
        assert picked.token_id == 7 and picked.logprob == float(wanted_V[7])
        best = wanted_V.sort(descending=True, stable=True)
        assert [token for token, _ in picked.alternatives] == best.indices[:count].tolist()
        assert [value for _, value in picked.alternatives] == best.values[:count].tolist()


def test_ties_go_to_the_lowest_ids() -> None:
    assert probabilities(torch.zeros(9), Sampling(temperature=1, sample_k=3)).nonzero().flatten().tolist() == [0, 1, 2]
    assert draw(torch.zeros(9), Sampling(temperature=0), torch.Generator()) == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": 0}, "would do nothing"),
        ({"stop": ("",)}, "empty text"),
        ({"repetition_penalty": 1e-100}, "greater than or equal to 0.01"),
        ({"ignore_end": True, "grammar": {"regex": "a"}}, "where that is complete"),
        ({"grammar": {}}, "either json_schema or regex"),
        ({"grammar": {"regex": "a", "json_schema": {}}}, "either json_schema or regex"),
    ],
)
def test_what_makes_no_sense_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Sampling(**fields)
