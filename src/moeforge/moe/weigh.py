"""Weigh: scores of the chosen experts -> combine weights."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from moeforge.config import Config, slot
from moeforge.moe.context import Context
from moeforge.moe.select import Selection

if TYPE_CHECKING:
    from moeforge.moe.router import RouterConfig


class Scores(Config):
    """The scores themselves, optionally normalised to sum to one per token, then scaled."""

    type: Literal["scores"] = "scores"
    normalize_weights: bool = False
    """Divide by the sum over the chosen experts. After softmax scores this equals a softmax over the chosen ones."""
    min_total: float = Field(1e-20, gt=0)
    """Smallest sum that is divided by."""
    weight_scale: float = 1.0
    """Multiplies every weight."""
    over: Literal["chosen", "computed"] = "chosen"
    """What is normalised over: every chosen expert, or only those that compute something (arXiv:2406.13233)."""

    @model_validator(mode="after")
    def _does_something(self) -> Self:
        if self.over == "computed" and not self.normalize_weights:
            raise ValueError("over: computed does nothing without normalize_weights: true")
        if self.min_total != 1e-20 and not self.normalize_weights:
            raise ValueError("min_total does nothing without normalize_weights: true")
        return self

    def check_costs(self, costs: Sequence[int]) -> None:
        """Raises ValueError when every expert computes something and a setting tells them apart."""
        if self.over == "computed" and 0 not in costs:
            raise ValueError("weigh: over: computed does nothing where no expert is without work")

    def __call__(self, scores_TE: Tensor, selection: Selection, context: Context) -> Tensor:
        """[T, E] scores -> weights in the shape of ``selection.take``."""
        if self.over == "computed" and context.cost is not None:
            scores_TE = torch.where(scores_TE.new_tensor(context.cost) > 0, scores_TE, 0)
        weights = selection.take(scores_TE)
        if self.normalize_weights:
            # A sum of scores is zero only where every chosen score underflowed; the guard keeps that row at zero.
            total = weights.sum(-1, keepdim=True)
            weights = weights / torch.where(total.abs() < self.min_total, self.min_total, total)
        return weights if self.weight_scale == 1.0 else weights * self.weight_scale


class SoftmaxChosen(Config):
    """Softmax over the chosen scores: softmax after selection, as Mixtral has it (arXiv:2401.04088, section 2.1)."""

    type: Literal["softmax"] = "softmax"
    weight_scale: float = 1.0
    """Multiplies every weight."""

    def __call__(self, scores_TE: Tensor, selection: Selection, context: Context) -> Tensor:
        """[T, E] scores (use ``score: logits``) -> weights in the shape of ``selection.take``."""
        weights = selection.softmax(scores_TE)
        return weights if self.weight_scale == 1.0 else weights * self.weight_scale


class Ones(Config):
    """Weight one each, or their mean, with the gradient of the score itself: straight-through (arXiv:1308.3432)."""

    type: Literal["ones"] = "ones"
    average: bool = False
    """Divide by the number of chosen experts, as a gate that keeps any number does (arXiv:2405.14297)."""

    def __call__(self, scores_TE: Tensor, selection: Selection, context: Context) -> Tensor:
        """[T, E] scores -> weights in the shape of ``selection.take``."""
        chosen, passed = selection.take(torch.ones_like(scores_TE)), selection.take(scores_TE)
        weights = chosen + (passed - passed.detach())
        return weights / chosen.sum(-1, keepdim=True).clamp_min(1) if self.average else weights


class Complement(Config):
    """K / (K - 1) times what an expert's share of the K chosen scores leaves to the others.

    It sums up a mixture, by the shares, of all chosen experts but one (arXiv:2005.06537, section 3): with even shares
    every weight is one.
    """

    type: Literal["complement"] = "complement"

    def __call__(self, scores_TE: Tensor, selection: Selection, context: Context) -> Tensor:
        """[T, E] scores, none negative -> weights in the shape of ``selection.take``."""
        chosen, scores = selection.take(torch.ones_like(scores_TE)), selection.take(scores_TE)
        count, total = chosen.sum(-1, keepdim=True), scores.sum(-1, keepdim=True)
        share = scores / torch.where(total < 1e-20, 1e-20, total)
        return (chosen - share) * count / (count - 1).clamp_min(1)


RULES = {"midpoint": (1 / 2, 1 / 2, 2.0), "heun": (1 / 3, 3 / 4, 1.0)}
"""How far a weight shrinks, how often, and the factor of its gradient."""


class Drawn(Config):
    """The probability that each choice of ``select: draw`` had, with an estimate of the gradient of the draw itself.

    A change of the loss L between no expert and the chosen one is integrated along its weight: at half of it and the
    whole of it (midpoint rule, SparseMixer, arXiv:2310.00811, which also keeps the gradient of the weight, hence the
    factor 2), or at a third, three times in four, and the whole (Heun's third-order rule, GRIN, arXiv:2409.12136). The
    place is chosen by lot; the likeliest expert is always taken whole. Gradients are those of the unshrunk probability.
    """

    type: Literal["drawn"] = "drawn"
    rule: Literal["midpoint", "heun"] = "heun"
    """Where the integral is looked at."""

    def check_router(self, router: "RouterConfig", num_experts: int) -> None:
        """Raises ValueError when choices are not drawn, or may be changed after their draw."""
        if router.select.type != "draw":
            raise ValueError("weigh: drawn needs select: draw: no other selector says what it chose among")
        if router.select.k > 1 and any(part.type == "visible" for part in router.noise):
            raise ValueError("weigh: drawn: noise: visible shows some tokens one expert: no second one can be drawn")
        if any(getattr(limit, "overflow", "drop") == "next" for limit in router.capacity):
            raise ValueError("weigh: drawn cannot weigh what a capacity with overflow: next chooses afterwards")

    def __call__(self, scores_TE: Tensor, selection: Selection, context: Context) -> Tensor:
        """[T, E] logits -> weights [T, K]."""
        assert selection.ids is not None and selection.among is not None
        among_TKE, ids_TK1 = selection.among, selection.ids[:, :, None]
        probs_TKE = scores_TE[:, None].masked_fill(~among_TKE, -torch.inf).softmax(-1)
        prob_TK = probs_TKE.gather(2, ids_TK1)[:, :, 0]
        if not context.training:
            return prob_TK
        shrunk, often, gain = RULES[self.rule]
        shrink_TK = (torch.rand_like(prob_TK) < often) & (probs_TKE.argmax(2) != selection.ids)
        value_TK = torch.where(shrink_TK, shrunk * prob_TK, prob_TK).detach()
        return value_TK + gain * (prob_TK - prob_TK.detach())


Weigh = slot(Scores, SoftmaxChosen, Ones, Drawn, Complement, default=Scores)
