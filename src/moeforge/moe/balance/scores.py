"""Losses about the scores of single tokens: their size, and how sure they are."""

from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import Tensor

from moeforge.config import Config

if TYPE_CHECKING:
    from moeforge.moe.router import Routing


class ZLoss(Config):
    """Mean squared logsumexp of the router logits: keeps them small (ST-MoE, arXiv:2202.08906, equation 5)."""

    type: Literal["z_loss"] = "z_loss"
    weight: float = Field(0.001, gt=0)
    """Factor in the total loss."""

    def __call__(self, routing: "Routing", batch_size: int, step_counts: Tensor | None = None) -> Tensor:
        """Scalar; linear in tokens, so it needs no counts of the step."""
        assert routing.logits is not None
        return routing.logits.logsumexp(-1).square().mean()


class EntropyLoss(Config):
    """token * (mean entropy of a token's probabilities) + batch * (entropy of the mean probabilities), in nats.

    token 1, batch 0 makes routers sure (arXiv:2403.07652); token 0, batch -1 evens out loads (arXiv:2310.10837);
    token 1, batch -1 is minus the mutual information of token and expert (arXiv:2404.05567).
    """

    type: Literal["entropy_loss"] = "entropy_loss"
    weight: float = Field(0.01, gt=0)
    """Factor in the total loss."""
    token: float = 1.0
    """Factor of the first."""
    batch: float = 0.0
    """Factor of the second."""

    def __call__(self, routing: "Routing", batch_size: int, step_counts: Tensor | None = None) -> Tensor:
        """Scalar; the second part is per micro-batch."""
        assert routing.probs is not None
        of_token = torch.special.entr(routing.probs).sum(1).mean()
        return self.token * of_token + self.batch * torch.special.entr(routing.probs.mean(0)).sum()


class SparsityLoss(Config):
    """Mean sum of a token's scores: with relu scores it leaves fewer experts on (ReMoE, arXiv:2412.14711).

    ``even`` multiplies each expert's score by its load over the even load, so that busy experts give way first.
    """

    type: Literal["sparsity_loss"] = "sparsity_loss"
    weight: float = Field(1e-4, gt=0)
    """Factor in the total loss; ``controller: sparsity`` moves it."""
    even: bool = True
    """Whether busy experts pay more."""

    @property
    def over(self) -> str:
        """Loads are those of the whole step, so the loss is exact under gradient accumulation."""
        return "batch" if self.even else "micro_batch"

    def counts(self, routing: "Routing") -> Tensor:
        """[E] choices per expert in this micro-batch."""
        return routing.choices

    def __call__(self, routing: "Routing", batch_size: int, step_counts: Tensor | None = None) -> Tensor:
        """Scalar. ``step_counts`` [E] are the choices of the whole step; None means this micro-batch is all of it."""
        assert routing.scores is not None
        if not self.even:
            return routing.scores.sum(1).mean()
        counts_E = routing.choices if step_counts is None else step_counts
        load_E = counts_E / counts_E.double().mean().clamp_min(1)
        return (routing.scores * load_E.to(routing.scores.dtype)).sum(1).mean()
