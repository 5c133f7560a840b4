"""Gate: rows -> one logit per expert. The part of a router that owns parameters."""

from typing import Literal

import torch
from torch import Tensor, nn

from moeforge.config import Config, slot
from moeforge.moe.context import Context


class LinearGate(nn.Module):
    """logits = x W^T, in float32 also in a bf16 model (Switch Transformer, arXiv:2101.03961, section 2.4)."""

    def __init__(self, d_model: int, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))
        nn.init.trunc_normal_(self.weight, std=d_model**-0.5)

    def forward(self, x_TD: Tensor, context: Context) -> Tensor:
        """[T, D] -> [T, E] float32; float64 stays."""
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        return nn.functional.linear(x_TD.to(dtype), self.weight.to(dtype))


class Linear(Config):
    """A linear gate without bias."""

    type: Literal["linear"] = "linear"

    def build(self, d_model: int, num_experts: int) -> nn.Module:
        """The module: ``(x [T, D], context) -> logits [T, E]``."""
        return LinearGate(d_model, num_experts)


Gate = slot(Linear)
