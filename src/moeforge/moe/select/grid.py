"""Selection among so many experts that not even their scores are ever written down."""

from collections.abc import Callable
from math import isqrt
from typing import ClassVar, Literal

import torch
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
    rank: int = Field(0, ge=0)
    """Above 0, those logits only name k rows and k columns, and (i, j) scores the product of two vectors of this length
    (arXiv:2411.12364); needs ``gate: query`` of the same rank. The best of the whole grid may then be missed."""

    def columns(self, num_experts: int) -> int:
        """Logits per token: of each head, what the grid's rows are named and scored by, then its columns."""
        return self.heads * 2 * (1 + self.rank) * isqrt(num_experts)

    def check(self, num_experts: int) -> None:
        """Raises ValueError when the experts form no square."""
        if isqrt(num_experts) ** 2 != num_experts:
            raise ValueError(f"select: product_keys needs a square: num_experts = {num_experts} is none")
        check_k(self.k, num_experts)

    def mean_experts(self, num_experts: int) -> float:
        """Experts a token uses."""
        return self.heads * self.k

    def route(self, scores_TE: Tensor, biased_TE: Tensor, weigh: Callable[..., Tensor], context: Context) -> Route:
        """[T, columns] -> heads * k experts of each token. X is a head of a token, S the grid's side, R the rank."""
        num_tokens, side = len(scores_TE), scores_TE.shape[1] // self.columns(1)
        naming_2XS = biased_TE.view(-1, 2, 1 + self.rank, side)[:, :, 0].unbind(1)
        best_2XK = [top_k(half_XS, min(self.k, side)) for half_XS in naming_2XS]
        halves_2XRS = scores_TE.view(-1, 2, 1 + self.rank, side).unbind(1)
        row_XRK, column_XRK = (
            half_XRS.gather(2, ids_XK[:, None].expand(-1, 1 + self.rank, -1))
            for half_XRS, ids_XK in zip(halves_2XRS, best_2XK, strict=True)
        )
        first_C, second_C = self._cells(row_XRK.shape[2], row_XRK.device)
        if self.rank:
            scores_XC = torch.einsum("xri,xrj->xij", row_XRK[:, 1:], column_XRK[:, 1:]).flatten(1)
        else:
            scores_XC = row_XRK[:, 0, first_C] + column_XRK[:, 0, second_C]
        place_XK = top_k(scores_XC.detach(), self.k)
        weights_XK = weigh(scores_XC, Selection(ids=place_XK), context)
        ids_XK = best_2XK[0].gather(1, first_C[place_XK]) * side + best_2XK[1].gather(1, second_C[place_XK])
        return Route.from_top_k(ids_XK.view(num_tokens, -1), weights_XK.view(num_tokens, -1), side * side)

    def _cells(self, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """[C] places of a row and of a column, best first, whose pair may be chosen.

        Of sums, pair (i, j) has i * j - 1 at least as good ones before it, counted from one: k of them rule it out.
        """
        places = range(width)
        pairs = [(i, j) for i in places for j in places if self.rank or (i + 1) * (j + 1) <= self.k]
        first_C, second_C = torch.tensor(pairs, device=device).T
        return first_C, second_C
