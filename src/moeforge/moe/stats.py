"""What a load looks like in a few numbers, from tokens per expert alone."""

import math

import torch
from torch import Tensor


def load_entropy(tokens_per_expert_E: Tensor) -> float:
    """Entropy of the load divided by log E: 1 is even, 0 is one expert taking all. 1 for a single expert."""
    share_E = tokens_per_expert_E.double() / tokens_per_expert_E.sum().clamp_min(1)
    if len(share_E) < 2:
        return 1.0
    return float(torch.special.entr(share_E).sum()) / math.log(len(share_E))


def dead_experts(tokens_per_expert_E: Tensor) -> int:
    """Experts that got no token."""
    return int((tokens_per_expert_E == 0).sum())


def max_load(tokens_per_expert_E: Tensor) -> float:
    """The busiest expert's load over the mean load: what a device per expert would wait for."""
    return float(tokens_per_expert_E.max() / tokens_per_expert_E.double().mean().clamp_min(1e-9))
