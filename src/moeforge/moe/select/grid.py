"""Selection among so many experts that not even their scores are ever written down."""

from collections.abc import Callable
from math import isqrt
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from moeforge.moe.context import Context
from moeforge.moe.route import Route
from moeforge.moe.select.selector import Selection, Selector, check_k, top_k


class ProductKeys(Selector):
    """Expert (i, j) of a square grid scores row_i + column_j: the best of all sums are among those of the best halves.

    Product keys, arXiv:1907.05242, section 3.1. Time and memory grow with the root of the number of experts. Every
    head chooses for itself, so a token may have an expert more than once.
    """

    type: Literal["product_keys"] = "product_keys"
    scores_experts: ClassVar[bool] = False
    k: int = Field(8, ge=1)
    """Experts per token and head."""
    heads: int = Field(1, ge=1)
    """Choices per token, each by 2 sqrt(E) logits of its own."""

    def columns(self, num_experts: int) -> int:
        """Logits per token: of each head, the grid's rows, then its columns."""
        return self.heads * 2 * isqrt(num_experts)

    def check(self, num_experts: int) -> None:
        """Raises ValueError when the experts form no square."""
        if isqrt(num_experts) ** 2 != num_experts:
            raise ValueError(f"select: product_keys needs a square: num_experts = {num_experts} is none")
        check_k(self.k, num_experts)

    def mean_experts(self, num_experts: int) -> float:
        """Experts a token uses."""
        return self.heads * self.k

    def route(self, scores_TE: Tensor, biased_TE: Tensor, weigh: Callable[..., Tensor], context: Context) -> Route:
        """[T, heads * 2 * sqrt(E)] -> heads * k experts of each token. X is a head of a token, S the grid's side."""
        side = scores_TE.shape[1] // (2 * self.heads)
        best_2XK = [top_k(half_XS, min(self.k, side)) for half_XS in biased_TE.view(-1, 2, side).unbind(1)]
        halves_2XS = scores_TE.view(-1, 2, side).unbind(1)
        row_XK, column_XK = (half_XS.gather(1, ids) for half_XS, ids in zip(halves_2XS, best_2XK, strict=True))
        sums_XC = (row_XK[:, :, None] + column_XK[:, None]).flatten(1)
        selection = Selection(ids=(place_XK := top_k(sums_XC.detach(), self.k)))
        weights_XK, width = weigh(sums_XC, selection, context), row_XK.shape[1]
        ids_XK = best_2XK[0].gather(1, place_XK // width) * side + best_2XK[1].gather(1, place_XK % width)
        num_tokens = len(scores_TE)
        return Route.from_top_k(ids_XK.view(num_tokens, -1), weights_XK.view(num_tokens, -1), side * side)
