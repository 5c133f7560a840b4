"""Noise: what is done to router logits before they are scored, while training (or always, for a mask)."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from moeforge.config import Config, slot
from moeforge.moe.context import Context, hashed
from moeforge.moe.schedule import Scheduled, at


class Gaussian(Config):
    """logits + deviation * N(0, 1); a fixed deviation, or a learned softplus(x W) (arXiv:1701.06538, equation 4)."""

    type: Literal["gaussian"] = "gaussian"
    std: float | Literal["learned"] = "learned"
    """In units of a logit."""

    def build(self, d_model: int, num_experts: int) -> nn.Module:
        """The module: ``(logits [T, E], rows [T, D], context) -> logits [T, E]``."""
        return GaussianNoise(self.std, d_model, num_experts)


class GaussianNoise(nn.Module):
    """Draws while training only. The learned deviation starts at softplus(0) = 0.69 everywhere."""

    initialised = ("weight",)

    def __init__(self, std: float | Literal["learned"], d_model: int, num_experts: int) -> None:
        super().__init__()
        self.std = 0.0 if std == "learned" else std
        self.weight = nn.Parameter(torch.zeros(num_experts, d_model)) if std == "learned" else None

    def forward(self, logits_TE: Tensor, x_TD: Tensor, context: Context) -> Tensor:
        """[T, E] -> [T, E]."""
        if not context.training:
            return logits_TE
        if self.weight is None:
            return logits_TE + self.std * torch.randn_like(logits_TE)
        std_TE = nn.functional.softplus(nn.functional.linear(x_TD.to(logits_TE), self.weight.to(logits_TE)))
        return logits_TE + std_TE * torch.randn_like(logits_TE)


class Gumbel(Config):
    """logits + scale * Gumbel(0, 1): the best of them is a draw from the softmax (arXiv:1611.01144, equation 1)."""

    type: Literal["gumbel"] = "gumbel"
    scale: Scheduled = 1.0
    """Below one, draws are likelier to be the best expert."""

    def build(self, d_model: int, num_experts: int) -> nn.Module:
        """The module: ``(logits [T, E], rows [T, D], context) -> logits [T, E]``."""
        return GumbelNoise(self.scale)


class GumbelNoise(nn.Module):
    """Draws while training only."""

    def __init__(self, scale: Scheduled) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, logits_TE: Tensor, x_TD: Tensor, context: Context) -> Tensor:
        """[T, E] -> [T, E]."""
        if not context.training:
            return logits_TE
        uniform_TE = torch.rand_like(logits_TE).clamp_min(torch.finfo(logits_TE.dtype).tiny)
        return logits_TE - at(self.scale, context.step) * torch.log(-torch.log(uniform_TE))


class Visible(Config):
    """A token id above ``common`` sees one fixed expert, others see ``experts`` (MaskMoE, arXiv:2407.09816).

    Ids of a trained tokenizer are in order of merging, so frequent ones come first.
    """

    type: Literal["visible"] = "visible"
    common: int = Field(ge=0)
    """Ids below this are frequent."""
    experts: int = Field(8, ge=1)
    """How many experts a frequent id sees."""
    seed: int = Field(0, ge=0)
    """Which ones."""

    def build(self, d_model: int, num_experts: int) -> nn.Module:
        """The module: ``(logits [T, E], rows [T, D], context) -> logits [T, E]``."""
        return VisibleMask(self, num_experts)


class VisibleMask(nn.Module):
    """Experts of an id are neighbours on a ring, from a place that its hash decides."""

    def __init__(self, config: Visible, num_experts: int) -> None:
        super().__init__()
        self.config, self.num_experts = config, num_experts

    def forward(self, logits_TE: Tensor, x_TD: Tensor, context: Context) -> Tensor:
        """[T, E] -> [T, E], minus infinity where a token id does not see the expert."""
        if context.token_ids is None:
            raise ValueError("noise: visible needs the token ids in the context")
        first_T = hashed(context.token_ids, self.config.seed) % self.num_experts
        width_T = torch.where(context.token_ids < self.config.common, self.config.experts, 1)
        place_TE = (torch.arange(self.num_experts, device=first_T.device) - first_T[:, None]) % self.num_experts
        return logits_TE.masked_fill(place_TE >= width_T[:, None], -torch.inf)


Noise = slot(Gaussian, Gumbel, Visible)
