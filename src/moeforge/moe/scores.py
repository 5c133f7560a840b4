"""Score: router logits [T, E] -> scores [T, E] that selection compares and weights are made of."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from moeforge.config import Config, slot
from moeforge.moe.context import Context
from moeforge.moe.schedule import Scheduled, at
from moeforge.moe.select import check_groups


class Softmax(Config):
    """Scores of a token sum to one over all experts, or over each group of experts."""

    type: Literal["softmax"] = "softmax"
    temperature: Scheduled = 1.0
    """Divides the logits; a falling ramp goes from dense to sparse."""
    standardize: bool = False
    """Logits of a token first get mean 0 and deviation 1 (arXiv:2406.06563)."""
    num_groups: int = Field(1, ge=1)
    """Experts form this many equal groups, in order, each with a softmax of its own (arXiv:2105.15082)."""

    def check(self, num_experts: int) -> None:
        """Raises ValueError when the experts cannot form the groups."""
        check_groups(num_experts, self.num_groups, "score.num_groups")

    def __call__(self, router_logits_TE: Tensor, context: Context) -> Tensor:
        """[T, E] -> [T, E]."""
        if self.standardize:
            centred_TE = router_logits_TE - router_logits_TE.mean(-1, keepdim=True)
            router_logits_TE = centred_TE / router_logits_TE.std(-1, keepdim=True).clamp_min(1e-6)
        temperature = at(self.temperature, context.step)
        if temperature != 1.0:
            router_logits_TE = router_logits_TE / temperature
        if self.num_groups == 1:
            return router_logits_TE.softmax(-1)
        return router_logits_TE.unflatten(1, (self.num_groups, -1)).softmax(-1).flatten(1)

    def probs(self, scores_TE: Tensor) -> Tensor:
        """[T, E] distribution over experts, for the balance losses."""
        return scores_TE / self.num_groups if self.num_groups > 1 else scores_TE


class Sigmoid(Config):
    """Every expert is scored on its own (DeepSeek-V3, arXiv:2412.19437, equation 15)."""

    type: Literal["sigmoid"] = "sigmoid"

    def __call__(self, router_logits_TE: Tensor, context: Context) -> Tensor:
        """[T, E] -> [T, E] in (0, 1)."""
        return router_logits_TE.sigmoid()

    def probs(self, scores_TE: Tensor) -> Tensor:
        """[T, E] scores divided by their sum (arXiv:2412.19437, equation 19)."""
        return scores_TE / scores_TE.sum(-1, keepdim=True)


class Relu(Config):
    """Scores of zero are common and exact: with ``select: threshold`` routing is continuous (arXiv:2412.14711)."""

    type: Literal["relu"] = "relu"

    def __call__(self, router_logits_TE: Tensor, context: Context) -> Tensor:
        """[T, E] -> [T, E], none negative."""
        return router_logits_TE.relu()

    def probs(self, scores_TE: Tensor) -> Tensor:
        """[T, E] scores divided by their sum; a token without any has probability zero everywhere."""
        return scores_TE / scores_TE.sum(-1, keepdim=True).clamp_min(torch.finfo(scores_TE.dtype).tiny)


class Logits(Config):
    """The logits themselves: for weights that take their softmax after selection (``weigh: softmax``)."""

    type: Literal["logits"] = "logits"

    def __call__(self, router_logits_TE: Tensor, context: Context) -> Tensor:
        """[T, E], unchanged."""
        return router_logits_TE

    def probs(self, scores_TE: Tensor) -> Tensor:
        """[T, E] softmax over all experts."""
        return scores_TE.softmax(-1)


Score = slot(Softmax, Sigmoid, Relu, Logits, default=Softmax)
