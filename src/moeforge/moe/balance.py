"""Balance: losses that push the router towards even loads, and controllers that move a bias after each step.

All are functions of what the router returned; none keeps state. A loss is the value for one micro-batch, to be
weighted by that micro-batch's share of the step's tokens: then the sum over micro-batches is the value for the step.
"""

from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import Tensor

from moeforge.config import Config, slot
from moeforge.moe.route import Route

if TYPE_CHECKING:
    from moeforge.moe.router import Routing


class LoadBalancingLoss(Config):
    """E * sum_i f_i P_i: f the fraction of choices that went to expert i, P its mean probability. 1 when even.

    Switch Transformer, arXiv:2101.03961, equations 4 to 6; GShard, arXiv:2006.16668, algorithm 1.
    """

    type: Literal["load_balancing_loss"] = "load_balancing_loss"
    weight: float = Field(0.01, gt=0)
    """Factor in the total loss."""
    over: Literal["batch", "micro_batch", "sequence"] = "batch"
    """Whose tokens f is counted over. ``batch`` is exact under gradient accumulation, for one more forward pass."""
    choices: Literal["all", "first"] = "all"
    """Count every chosen expert, or only the most probable one as GShard does."""

    def counts(self, routing: "Routing") -> Tensor:
        """[E] choices per expert in this micro-batch."""
        assert routing.probs is not None
        if self.choices == "first":
            return torch.bincount(routing.probs.argmax(-1), minlength=routing.probs.shape[1])
        return routing.route.counts

    def __call__(self, routing: "Routing", batch_size: int, step_counts: Tensor | None = None) -> Tensor:
        """Scalar. ``step_counts`` [E] are the choices of the whole step; None means this micro-batch is all of it."""
        probs_TE = routing.probs
        assert probs_TE is not None
        if self.over == "sequence" and batch_size > 1:
            return self._per_sequence(routing, probs_TE, batch_size)
        own = step_counts is None or self.over != "batch"
        counts_E = self.counts(routing) if own else step_counts
        assert counts_E is not None
        fraction_E = counts_E / counts_E.sum().clamp_min(1)
        return probs_TE.shape[1] * (fraction_E * probs_TE.mean(0)).sum()

    def _per_sequence(self, routing: "Routing", probs_TE: Tensor, batch_size: int) -> Tensor:
        """Mean over sequences of each one's own loss (arXiv:2412.19437, equations 17 to 20)."""
        length, num_experts = len(probs_TE) // batch_size, probs_TE.shape[1]
        if self.choices == "first":
            expert_N = probs_TE.argmax(-1)
            sequence_N = torch.arange(len(expert_N), device=expert_N.device) // length
        else:
            assert isinstance(routing.route, Route)
            sequence_N, expert_N = routing.route.token // length, routing.route.expert
        cell_N = sequence_N * num_experts + expert_N
        counts_BE = torch.bincount(cell_N, minlength=batch_size * num_experts).view(batch_size, num_experts)
        fraction_BE = counts_BE / counts_BE.sum(1, keepdim=True).clamp_min(1)
        return num_experts * (fraction_BE * probs_TE.view(batch_size, length, -1).mean(1)).sum(1).mean()


class ZLoss(Config):
    """Mean squared logsumexp of the router logits: keeps them small (ST-MoE, arXiv:2202.08906, equation 5)."""

    type: Literal["z_loss"] = "z_loss"
    weight: float = Field(0.001, gt=0)
    """Factor in the total loss."""

    def __call__(self, routing: "Routing", batch_size: int, step_counts: Tensor | None = None) -> Tensor:
        """Scalar; linear in tokens, so it needs no counts of the step."""
        assert routing.logits is not None
        return routing.logits.logsumexp(-1).square().mean()


class ExpertBias(Config):
    """Loss-free balancing: a bias that only selection sees moves against the load (arXiv:2408.15664, algorithm 1)."""

    type: Literal["expert_bias"] = "expert_bias"
    rate: float = Field(0.001, gt=0)
    """How far a bias moves per optimizer step."""

    def __call__(self, expert_bias_E: Tensor, tokens_per_expert_E: Tensor) -> None:
        """Moves the bias in place, once per step, by the counts of the whole step."""
        load_E = tokens_per_expert_E.float()  # whatever the model's type: bf16 cannot count
        expert_bias_E += self.rate * torch.sign(load_E.mean() - load_E)


BalanceLoss = slot(LoadBalancingLoss, ZLoss)
Controller = slot(ExpertBias)
