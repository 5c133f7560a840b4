"""The optimizer and its learning rate over time."""

import math

import torch

from moeforge.models import Decoder
from moeforge.train.config import AdamW, Cosine, Schedule


def build_optimizer(model: Decoder, config: AdamW) -> torch.optim.AdamW:
    """Fused AdamW; weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)


def learning_rate(schedule: Schedule, peak: float, step: int, steps: int) -> float:
    """For optimizer step ``step`` (from 0) of ``steps``."""
    warmup = round(schedule.warmup * steps)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if isinstance(schedule, Cosine):
        done = (step - warmup) / max(1, steps - warmup)
        return peak * (schedule.final + (1 - schedule.final) * 0.5 * (1 + math.cos(math.pi * done)))
    decay = round(schedule.decay * steps)
    left = min(1.0, (steps - step) / decay) if decay else 1.0
    return peak * (schedule.final + (1 - schedule.final) * left)
