"""Balance: losses that push the router towards even loads, and controllers that move a bias after each step.

All are functions of what the router returned; none keeps state. A loss is the value for one micro-batch, to be
weighted by that micro-batch's share of the step's tokens: then the sum over micro-batches is the value for the step.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
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
        cell_N = sequence_N * (num_experts + 1) + expert_N  # one more column: for the padding of a compiled route
        counts_BF = torch.bincount(cell_N, minlength=batch_size * (num_experts + 1)).view(batch_size, -1)
        counts_BE = counts_BF[:, :num_experts]
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
        tiny = torch.finfo(routing.probs.dtype).tiny  # the entropy's slope at zero is infinite
        of_token = torch.special.entr(routing.probs.clamp_min(tiny)).sum(1).mean()
        return self.token * of_token + self.batch * torch.special.entr(routing.probs.mean(0).clamp_min(tiny)).sum()


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


class ExpertBias(Config):
    """Loss-free balancing: a bias that only selection sees moves against the load (arXiv:2408.15664, algorithm 1)."""

    type: Literal["expert_bias"] = "expert_bias"
    moves: ClassVar[str] = "expert_bias"
    rate: float = Field(0.001, gt=0)
    """How far a bias moves per optimizer step."""
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


BalanceLoss = slot(LoadBalancingLoss, ZLoss, ImportanceLoss, EntropyLoss, SparsityLoss)
Controller = slot(ExpertBias, Sparsity, Overflow)
