"""What a gate tells the rest of the router."""

from typing import NamedTuple

import torch
from torch import Tensor


class Signal(NamedTuple):
    """Logits, and what only some gates have."""

    logits: Tensor
    """[T, E] float32."""
    state: Tensor | None = None
    """For the next MoE layer's router, as ``context.router_state``."""
    loss: Tensor | None = None
    """[T] float32: what this gate wants small besides the model's loss; ``losses: gate_loss`` adds it."""


def in_float32(tensor: Tensor) -> Tensor:
    """float32 at least; float64 stays."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
