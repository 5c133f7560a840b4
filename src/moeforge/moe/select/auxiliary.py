"""A selector of which some choices do not run."""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from moeforge.moe.context import Context
from moeforge.moe.route import Route
from moeforge.moe.select.selector import PerToken, Selection, top_k


class Auxiliary(PerToken):
    """Top-k, of which the ``main`` best run; each of the others is a vector that what these read is multiplied with.

    Main experts keep the weights that they have among all k; the vectors are summed by the others' weights, divided by
    their sum (Compressed Experts, arXiv:2503.00634). Vectors start as ones: then nothing is multiplied.
    """

    type: Literal["auxiliary"] = "auxiliary"
    main: int = Field(1, ge=1)
    """Of the k, how many run."""

    @model_validator(mode="after")
    def _some_are_auxiliary(self) -> Self:
        if self.main >= self.k:
            raise ValueError(f"main = {self.main} of k = {self.k} leaves none auxiliary; lower it, or use top_k")
        return self

    @property
    def auxiliary(self) -> int:  # type: ignore[override]
        """What is chosen and does not run."""
        return self.k - self.main

    def mean_experts(self, num_experts: int) -> float:
        """Experts that run."""
        return self.main

    def __call__(self, scores_TE: Tensor, context: Context) -> Selection:
        """[T, E] scores (bias included) -> ids [T, K], best first."""
        return Selection(ids=top_k(scores_TE, self.k))

    def route(self, scores_TE: Tensor, biased_TE: Tensor, weigh: Callable[..., Tensor], context: Context) -> Route:
        """The route to those that run, with shares of the others."""
        chosen = self(biased_TE, context)
        weight_TK, ids_TK = weigh(scores_TE, chosen, context), chosen.ids
        assert ids_TK is not None
        route = Route.from_top_k(ids_TK[:, : self.main], weight_TK[:, : self.main], scores_TE.shape[1])
        rest_TA = weight_TK[:, self.main :]
        share_TA = rest_TA / rest_TA.sum(1, keepdim=True).clamp_min(1e-20)
        return replace(route, auxiliary=torch.zeros_like(scores_TE).scatter(1, ids_TK[:, self.main :], share_TA))
