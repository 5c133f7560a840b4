"""Score: router logits [T, E] -> scores [T, E] that selection compares and weights are made of."""

from typing import Literal

from torch import Tensor

from moeforge.config import Config, slot


class Softmax(Config):
    """Scores of a token sum to one over all experts."""

    type: Literal["softmax"] = "softmax"

    def __call__(self, router_logits_TE: Tensor) -> Tensor:
        """[T, E] -> [T, E]."""
        return router_logits_TE.softmax(-1)

    def probs(self, scores_TE: Tensor) -> Tensor:
        """[T, E] distribution over experts, for the balance losses."""
        return scores_TE


class Sigmoid(Config):
    """Every expert is scored on its own (DeepSeek-V3, arXiv:2412.19437, equation 15)."""

    type: Literal["sigmoid"] = "sigmoid"

    def __call__(self, router_logits_TE: Tensor) -> Tensor:
        """[T, E] -> [T, E] in (0, 1)."""
        return router_logits_TE.sigmoid()

    def probs(self, scores_TE: Tensor) -> Tensor:
        """[T, E] scores divided by their sum (arXiv:2412.19437, equation 19)."""
        return scores_TE / scores_TE.sum(-1, keepdim=True)


class Logits(Config):
    """The logits themselves: for weights that take their softmax after selection (``weigh: softmax``)."""

    type: Literal["logits"] = "logits"

    def __call__(self, router_logits_TE: Tensor) -> Tensor:
        """[T, E], unchanged."""
        return router_logits_TE

    def probs(self, scores_TE: Tensor) -> Tensor:
        """[T, E] softmax over all experts."""
        return scores_TE.softmax(-1)


Score = slot(Softmax, Sigmoid, Logits)
