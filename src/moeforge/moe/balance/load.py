"""Losses about how the tokens are spread over the experts."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from moeforge.config import Config
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
    by_cost: bool = False
    """Weigh each expert by its work over the mean work: cheap ones are preferred (HMoE, arXiv:2408.10681)."""
    free: Literal["each", "together"] = "each"
    """Experts without work share their load evenly among themselves, whoever got it (AdaMoE, arXiv:2406.13233)."""

    @model_validator(mode="after")
    def _does_something(self) -> Self:
        if self.over == "sequence" and (self.by_cost or self.free == "together"):
            raise ValueError("over: sequence knows neither by_cost nor free: together")
        return self

    def check_costs(self, costs: Sequence[int]) -> None:
        """Raises ValueError when all experts cost the same, or none is free, and a setting tells them apart."""
        if self.by_cost and len(set(costs)) == 1:
            raise ValueError("losses: load_balancing_loss by_cost does nothing where all experts cost the same")
        if self.free == "together" and 0 not in costs:
            raise ValueError("losses: load_balancing_loss free: together does nothing where no expert is without work")

    def counts(self, routing: "Routing") -> Tensor:
        """[E] choices per expert in this micro-batch."""
        assert routing.probs is not None
        if self.choices == "first":
            return torch.bincount(routing.probs.argmax(-1), minlength=routing.probs.shape[1])
        return routing.choices

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
        if routing.cost is not None and (self.by_cost or self.free == "together"):
            fraction_E = self._priced(fraction_E, fraction_E.new_tensor(routing.cost))
        return probs_TE.shape[1] * (fraction_E * probs_TE.mean(0)).sum()

    def _priced(self, fraction_E: Tensor, cost_E: Tensor) -> Tensor:
        idle_E = cost_E == 0
        if self.free == "together" and idle_E.any():
            fraction_E = torch.where(idle_E, fraction_E[idle_E].mean(), fraction_E)
        return fraction_E * cost_E / cost_E.mean() if self.by_cost else fraction_E

    def _per_sequence(self, routing: "Routing", probs_TE: Tensor, batch_size: int) -> Tensor:
        """Mean over sequences of each one's own loss (arXiv:2412.19437, equations 17 to 20)."""
        length, num_experts = len(probs_TE) // batch_size, probs_TE.shape[1]
        if self.choices == "first":
            expert_N = probs_TE.argmax(-1)
            sequence_N = torch.arange(len(expert_N), device=expert_N.device) // length
        else:
            assert isinstance(routing.chosen, Route)
            sequence_N, expert_N = routing.chosen.token // length, routing.chosen.expert
        cell_N = sequence_N * num_experts + expert_N
        counts_BE = torch.bincount(cell_N, minlength=batch_size * num_experts).view(batch_size, num_experts)
        fraction_BE = counts_BE / counts_BE.sum(1, keepdim=True).clamp_min(1)
        return num_experts * (fraction_BE * probs_TE.view(batch_size, length, -1).mean(1)).sum(1).mean()


class ImportanceLoss(Config):
    """Squared coefficient of variation of the summed probabilities (arXiv:1701.06538, equation 7)."""

    type: Literal["importance_loss"] = "importance_loss"
    weight: float = Field(0.01, gt=0)
    """Factor in the total loss."""

    def __call__(self, routing: "Routing", batch_size: int, step_counts: Tensor | None = None) -> Tensor:
        """Scalar, per micro-batch."""
        assert routing.probs is not None
        importance_E = routing.probs.sum(0)
        return importance_E.var(unbiased=False) / importance_E.mean().square()
