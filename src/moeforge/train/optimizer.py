"""The optimizer and its learning rate over time."""

import math

import torch
from torch import nn

from moeforge.models import Decoder
from moeforge.train.config import AdamW, Cosine, Schedule


def build_optimizer(model: Decoder, config: AdamW) -> torch.optim.AdamW:
    """Fused AdamW; weight decay on matrices only."""
    # Nor do weights that live on different meshes go into one fused call.
    kinds: dict[tuple[bool, object], list[nn.Parameter]] = {}
    for p in model.parameters():
        kinds.setdefault((p.ndim >= 2, getattr(p, "device_mesh", None)), []).append(p)
    groups = [
        {"params": some, "weight_decay": config.weight_decay if is_matrix else 0.0}
        for (is_matrix, _), some in kinds.items()
    ]
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
