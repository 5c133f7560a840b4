"""Weigh: scores of the chosen experts -> combine weights."""

from typing import Literal

import torch
from torch import Tensor

from moeforge.config import Config, slot
from moeforge.moe.select import Selection


class Scores(Config):
    """The scores themselves, optionally normalised to sum to one per token, then scaled."""

    type: Literal["scores"] = "scores"
    normalize_weights: bool = False
    """Divide by the sum over the chosen experts. After softmax scores this equals a softmax over the chosen ones."""
    weight_scale: float = 1.0
    """Multiplies every weight."""

    def __call__(self, scores_TE: Tensor, selection: Selection) -> Tensor:
        """[T, E] scores -> weights in the shape of ``selection.take``."""
        weights = selection.take(scores_TE)
        if self.normalize_weights:
            # A sum of scores is zero only where every chosen score underflowed; the guard keeps that row at zero.
            total = weights.sum(-1, keepdim=True)
            weights = weights / torch.where(total.abs() < 1e-20, 1e-20, total)
        return weights if self.weight_scale == 1.0 else weights * self.weight_scale


class SoftmaxChosen(Config):
    """Softmax over the chosen scores: softmax after selection, as Mixtral has it (arXiv:2401.04088, section 2.1)."""

    type: Literal["softmax"] = "softmax"
    weight_scale: float = 1.0
    """Multiplies every weight."""

    def __call__(self, scores_TE: Tensor, selection: Selection) -> Tensor:
        """[T, E] scores (use ``score: logits``) -> weights in the shape of ``selection.take``."""
        weights = selection.softmax(scores_TE)
        return weights if self.weight_scale == 1.0 else weights * self.weight_scale


Weigh = slot(Scores, SoftmaxChosen)
