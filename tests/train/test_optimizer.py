"""Learning rates over time, and which parameters decay."""

import pytest
import torch

from moeforge.models import Decoder, ModelConfig
from moeforge.train.config import AdamW, Cosine, WarmupStableDecay
from moeforge.train.optimizer import build_optimizer, learning_rate


@pytest.mark.parametrize("schedule", [Cosine(), WarmupStableDecay()])
def test_schedules_warm_up_peak_and_end_low(schedule):
    rates = [learning_rate(schedule, 1.0, step, 100) for step in range(100)]
    assert rates[0] < rates[4] < 1.0
    assert max(rates) == pytest.approx(1.0, abs=0.02)
    assert rates[-1] < 0.2
    peak = rates.index(max(rates))
    assert rates[:peak] == sorted(rates[:peak]) and rates[peak:] == sorted(rates[peak:], reverse=True)


def test_cosine_is_halfway_in_the_middle_of_its_descent():
    assert learning_rate(Cosine(warmup=0.0, final=0.0), 2.0, 50, 100) == pytest.approx(1.0)


def test_stable_phase_is_flat_and_decay_is_a_line():
    schedule = WarmupStableDecay(warmup=0.1, decay=0.2, final=0.0)
    rates = [learning_rate(schedule, 1.0, step, 100) for step in range(101)]
    assert set(rates[10:81]) == {1.0}
    assert rates[90] == pytest.approx(0.5) and rates[100] == 0.0


def test_only_matrices_decay():
    model = Decoder(ModelConfig(vocab_size=11, d_model=8, num_layers=1, num_heads=2, d_ff=8, qk_norm=True))
    optimizer = build_optimizer(model, AdamW(weight_decay=0.3))
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in decayed}
    assert "embedding.weight" in names and not any("norm" in name for name in names)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    assert isinstance(optimizer, torch.optim.AdamW)
