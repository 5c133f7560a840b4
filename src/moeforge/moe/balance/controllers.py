"""Controllers: what moves a bias, or the weight of the losses, once after each step."""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from moeforge.config import Config


class ExpertBias(Config):
    """Loss-free balancing: a bias that only selection sees moves against the load (arXiv:2408.15664, algorithm 1)."""

    type: Literal["expert_bias"] = "expert_bias"
    moves: ClassVar[str] = "expert_bias"
    rate: float = Field(0.001, ge=0)
    """How far a bias moves per optimizer step; 0 keeps it as it was loaded."""
    by: Literal["sign", "share"] = "sign"
    """All biases by ``rate``, or each by ``rate`` times how far its load is from even, in units of the even load."""

    def __call__(self, expert_bias_E: Tensor, tokens_per_expert_E: Tensor, num_tokens: int) -> None:
        """Moves the bias in place, once per step, by the counts of the whole step."""
        load_E = tokens_per_expert_E.float()  # whatever the model's type: bf16 cannot count
        away_E = load_E.mean() - load_E
        expert_bias_E += self.rate * (torch.sign(away_E) if self.by == "sign" else away_E / load_E.mean().clamp_min(1))


class Sparsity(Config):
    """Multiplies the losses by ``factor`` while tokens have more than ``k`` experts on average, else divides.

    ReMoE, arXiv:2412.14711: lambda <- lambda * alpha^sign(target sparsity - sparsity).
    """

    type: Literal["sparsity"] = "sparsity"
    moves: ClassVar[str] = "loss_scale"
    k: float = Field(2.0, gt=0)
    """Experts per token that are wanted."""
    factor: float = Field(1.2, gt=1)
    """How fast the losses' weight moves."""

    def __call__(self, loss_scale: Tensor, tokens_per_expert_E: Tensor, num_tokens: int) -> None:
        """Moves the scale in place, once per step."""
        mean_k = tokens_per_expert_E.sum() / max(1, num_tokens)
        loss_scale *= self.factor ** torch.sign(mean_k - self.k)


class Overflow(Config):
    """Weight of the losses follows what a capacity of one even share would drop (Skywork-MoE, arXiv:2406.06563).

    scale <- memory * scale + (1 - memory) * min(factor * overflow, most).
    """

    type: Literal["overflow"] = "overflow"
    moves: ClassVar[str] = "loss_scale"
    memory: float = Field(0.99, ge=0, lt=1)
    """How slowly it follows."""
    factor: float = Field(5.0, gt=0)
    """Scale per share of choices over the even load."""
    most: float = Field(2.0, gt=0)
    """Upper bound of the scale."""

    def __call__(self, loss_scale: Tensor, tokens_per_expert_E: Tensor, num_tokens: int) -> None:
        """Moves the scale in place, once per step."""
        load_E = tokens_per_expert_E.float()
        overflow = (load_E - load_E.mean()).clamp_min(0).sum() / load_E.sum().clamp_min(1)
        loss_scale.mul_(self.memory).add_((1 - self.memory) * (self.factor * overflow).clamp_max(self.most))
