"""Noise: what is done to router logits before they are scored, while training (or always, for a mask)."""

from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from moeforge.config import Config, slot
from moeforge.moe.context import Context, hashed
from moeforge.moe.schedule import Scheduled, at
from moeforge.moe.select import check_groups

if TYPE_CHECKING:
    from moeforge.moe.router import RouterConfig


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
        return logits_TE + self.std_of(x_TD, logits_TE) * torch.randn_like(logits_TE)

    def std_of(self, x_TD: Tensor, like_TE: Tensor) -> Tensor:
        """The deviation: a scalar, or [T, E] where it is learned."""
        if self.weight is None:
            return like_TE.new_tensor(self.std)
        return nn.functional.softplus(nn.functional.linear(x_TD.to(like_TE), self.weight.to(like_TE)))


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


class ExpertDropout(Config):
    """While training, experts are masked by lot for all tokens of a batch (sigma-MoE, arXiv:2310.10837).

    With groups, as the cluster-level dropout of MoEC (arXiv:2207.09094): no cluster is ever without experts.
    """

    type: Literal["expert_dropout"] = "expert_dropout"
    rate: float = Field(0.05, gt=0, lt=1)
    """Chance of an expert to be masked."""
    num_groups: int = Field(1, ge=1)
    """Experts form this many equal groups, in order."""
    at_least: int = Field(1, ge=1)
    """Experts of each group that stay, whatever the lot."""

    def check_router(self, router: "RouterConfig", num_experts: int) -> None:
        """Raises ValueError when nothing can be masked, or more than a token can do without."""
        check_groups(num_experts, self.num_groups, "num_groups of noise: expert_dropout")
        if self.at_least >= num_experts // self.num_groups:
            raise ValueError(f"noise: expert_dropout with at_least = {self.at_least} masks nothing: no group has more")
        if self.at_least * self.num_groups < router.select.mean_experts(num_experts):
            raise ValueError("noise: expert_dropout may leave fewer experts than a token takes: raise at_least")
        if getattr(router.score, "standardize", False):
            raise ValueError("noise: expert_dropout: logits of masked experts have no mean: score.standardize is on")

    def build(self, d_model: int, num_experts: int) -> nn.Module:
        """The module: ``(logits [T, E], rows [T, D], context) -> logits [T, E]``."""
        return ExpertMask(self)


class ExpertMask(nn.Module):
    """Draws while training only, one lot per expert; those with the highest lots stay."""

    def __init__(self, config: ExpertDropout) -> None:
        super().__init__()
        self.config = config

    def forward(self, logits_TE: Tensor, x_TD: Tensor, context: Context) -> Tensor:
        """[T, E] -> [T, E], minus infinity in the columns of masked experts."""
        if not context.training:
            return logits_TE
        lot_GE = torch.rand_like(logits_TE[0]).unflatten(0, (self.config.num_groups, -1))
        stays_GE = lot_GE >= lot_GE.topk(self.config.at_least).values[:, -1:]
        return logits_TE.masked_fill(~(stays_GE | (lot_GE >= self.config.rate)).flatten(), -torch.inf)


Noise = slot(Gaussian, Gumbel, Visible, ExpertDropout)
