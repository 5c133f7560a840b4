"""Losses about how the tokens are spread over the experts."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from moeforge.config import Config
from moeforge.moe.balance.prices import Prices, check_prices, priced
from moeforge.moe.route import Route

if TYPE_CHECKING:
    from moeforge.moe.router import RouterConfig, Routing
    from moeforge.moe.shared import Shared


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
    prices: Prices = None
    """What a unit of each expert's load costs: cheap ones are preferred (arXiv:2408.10681, arXiv:2410.07348)."""
    free: Literal["each", "together"] = "each"
    """Experts without work share their load evenly among themselves, whoever got it (AdaMoE, arXiv:2406.13233)."""

    @model_validator(mode="after")
    def _does_something(self) -> Self:
        if self.over == "sequence" and self.free == "together":
            raise ValueError("over: sequence does not know free: together")
        return self

    def check_costs(self, costs: Sequence[int]) -> None:
        """Raises ValueError when all experts cost the same, or none is free, and a setting tells them apart."""
        check_prices(self.prices, costs)
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
        if self.free == "together":
            fraction_E = _shared_when_free(fraction_E, routing)
        return probs_TE.shape[1] * (priced(fraction_E, self.prices, routing) * probs_TE.mean(0)).sum()

    def _per_sequence(self, routing: "Routing", probs_TE: Tensor, batch_size: int) -> Tensor:
        """Mean over sequences of each one's own loss (arXiv:2412.19437, equations 17 to 20)."""
        length, num_experts = len(probs_TE) // batch_size, probs_TE.shape[1]
        if self.choices == "first":
            expert_N = probs_TE.argmax(-1)
            sequence_N = torch.arange(len(expert_N), device=expert_N.device) // length
        else:
            assert isinstance(routing.chosen, Route)
            sequence_N, expert_N = routing.chosen.token // length, routing.chosen.expert
        cell_N = sequence_N * (num_experts + 1) + expert_N  # one more column: for the padding of a compiled route
        counts_BE = torch.bincount(cell_N, minlength=batch_size * (num_experts + 1)).view(batch_size, -1)[:, :-1]
        fraction_BE = counts_BE / counts_BE.sum(1, keepdim=True).clamp_min(1)
        priced_BE = priced(fraction_BE, self.prices, routing)
        return num_experts * (priced_BE * probs_TE.view(batch_size, length, -1).mean(1)).sum(1).mean()


def _shared_when_free(fraction_E: Tensor, routing: "Routing") -> Tensor:
    """Experts without work have equal shares of what they have together."""
    idle_E = fraction_E.new_tensor(routing.cost or [1.0]) == 0
    return torch.where(idle_E, fraction_E[idle_E].mean(), fraction_E) if idle_E.any() else fraction_E


class ImportanceLoss(Config):
    """Squared coefficient of variation of the summed probabilities (arXiv:1701.06538, equation 7).

    With prices 0 is reached where load is in inverse proportion to them (arXiv:2306.06446, latency-aware importance).
    """

    type: Literal["importance_loss"] = "importance_loss"
    weight: float = Field(0.01, gt=0)
    """Factor in the total loss."""
    prices: Prices = None
    """What a unit of each expert's load costs: its latency, say."""

    def check_costs(self, costs: Sequence[int]) -> None:
        """Raises ValueError when the prices tell no experts apart."""
        check_prices(self.prices, costs)

    def __call__(self, routing: "Routing", batch_size: int, step_counts: Tensor | None = None) -> Tensor:
        """Scalar, per micro-batch."""
        assert routing.probs is not None
        return _unevenness(priced(routing.probs.sum(0), self.prices, routing))


class LoadLoss(Config):
    """Squared coefficient of variation of the loads as another draw of the noise would make them (arXiv:1701.06538).

    Appendix A: P(x, i) = Phi((x W_i - the k-th best of the other noisy logits) / deviation_i); load_i = sum_x P(x, i).
    """

    type: Literal["load_loss"] = "load_loss"
    reads_noise: ClassVar[bool] = True
    weight: float = Field(0.01, gt=0)
    """Factor in the total loss."""
    prices: Prices = None
    """What a unit of each expert's load costs: its latency, say (arXiv:2306.06446)."""

    def check_costs(self, costs: Sequence[int]) -> None:
        """Raises ValueError when the prices tell no experts apart."""
        check_prices(self.prices, costs)

    def check_router(self, router: "RouterConfig", num_experts: int) -> None:
        """Raises ValueError where no Gaussian noise decides who is among the k best."""
        select = router.select
        plain = select.type == "top_k" and select.num_groups == 1 and select.train_k is None and select.k < num_experts
        if not plain or [part.type for part in router.noise] != ["gaussian"]:
            raise ValueError(
                "losses: load_loss needs noise: [gaussian] alone and select: top_k with one k < num_experts, no groups"
            )

    def __call__(self, routing: "Routing", batch_size: int, step_counts: Tensor | None = None) -> Tensor:
        """Scalar, per micro-batch."""
        noisy_TE, clean_TE, k = routing.logits, routing.clean, getattr(routing.chosen, "top_k", None)
        assert noisy_TE is not None and clean_TE is not None and k is not None and routing.noise_std is not None
        last_T1, next_T1 = noisy_TE.topk(k + 1).values[:, k - 1 :].split(1, dim=1)
        bar_TE = torch.where(noisy_TE >= last_T1, next_T1, last_T1)
        load_E = torch.special.ndtr((clean_TE - bar_TE) / routing.noise_std).sum(0)
        return _unevenness(priced(load_E, self.prices, routing))


class BudgetLoss(Config):
    """|mean share of the output that comes from experts - budget|, the rest being the shared branch's.

    Conditional MoE routing (arXiv:2207.04672; arXiv:2212.07571).
    """

    type: Literal["budget_loss"] = "budget_loss"
    weight: float = Field(0.1, gt=0)
    """Factor in the total loss."""
    budget: float = Field(0.8, ge=0, le=1)
    """Wanted mean share of the experts."""

    def watch(self, routing: "Routing", x_TD: Tensor, shared: "Shared | None") -> "Routing":
        """The routing with the share of the experts in each token's output."""
        assert shared is not None
        return replace(routing, routed_share=shared.routed_share(x_TD))

    def __call__(self, routing: "Routing", batch_size: int, step_counts: Tensor | None = None) -> Tensor:
        """Scalar, per micro-batch."""
        assert routing.routed_share is not None
        return (routing.routed_share.mean() - self.budget).abs()


def _unevenness(load_E: Tensor) -> Tensor:
    """Squared coefficient of variation."""
    return load_E.var(unbiased=False) / load_E.mean().square()
