"""Capacity: which edges of a route are kept. Nothing is dropped unless one of these parts is named.

A limit is called with (route, probs [T, E], weigh, context): what it sends elsewhere goes by the probabilities, and
gets its weights from ``weigh(selection)``, the router's own.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from moeforge.config import Config, slot
from moeforge.moe.context import Context
from moeforge.moe.route import Route
from moeforge.moe.select import Selection, top_k

Weighing = Callable[[Selection], Tensor]


class Capacity(Config):
    """Each expert takes at most factor * edges / E; further edges are dropped (GShard, arXiv:2006.16668).

    Whether an edge is kept depends on other tokens: not for decoding.
    """

    type: Literal["capacity"] = "capacity"
    leaks: ClassVar[bool] = True
    capacity_factor: float = Field(1.25, gt=0)
    """Room of an expert, in units of its share."""
    shares: tuple[float, ...] | None = None
    """Room of each expert in proportion: kinds of experts may have less (arXiv:2410.07348). Null: even."""
    eval_capacity_factor: float | None = Field(None, gt=0)
    """Outside training; null: the same."""
    keep: Literal["first", "heaviest", "random"] = "first"
    """By position, by combine weight over the whole batch (V-MoE, arXiv:2106.05974), or by lot."""
    overflow: Literal["drop", "next"] = "drop"
    """What does not fit is left out, or goes to the token's next best expert with room (arXiv:2101.03961, app. B)."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.overflow == "next" and self.keep != "first":
            raise ValueError(f"overflow: next admits tokens by position; keep: {self.keep} would not be heard")
        return self

    def check_costs(self, costs: Sequence[int]) -> None:
        """Raises ValueError when the shares are not one for each expert, above zero."""
        if self.shares is not None and (len(self.shares) != len(costs) or min(self.shares) <= 0):
            raise ValueError(
                f"capacity.shares wants {len(costs)} numbers above zero, one for each expert, not {list(self.shares)}"
            )

    def __call__(self, route: Route, probs_TE: Tensor, weigh: Weighing, context: Context) -> Route:
        """The route without, or with another place for, what does not fit."""
        factor = self.capacity_factor
        if not context.training and self.eval_capacity_factor is not None:
            factor = self.eval_capacity_factor
        asked = factor * route.ends[-1].double()
        if self.shares is None:
            room = (asked / route.num_experts).ceil().expand(route.num_experts)
        else:
            share_E = torch.tensor(self.shares, dtype=torch.double, device=asked.device)
            room = (asked * share_E / share_E.sum()).ceil()
        if self.overflow == "next":
            taken_TE = next_with_room(route, probs_TE, room)
            return Route.from_mask(taken_TE, weigh(Selection(mask=taken_TE)), route.carry)
        room_N = F.pad(room, (0, 1))[route.expert]  # padding is nobody's, and has no room
        return keep_edges(route, place_in_expert(route, self._rank(route)) < room_N)

    def _rank(self, route: Route) -> Tensor:
        """[N]: the edges with the smallest are kept."""
        if self.keep == "heaviest":
            return -route.weight.detach()
        return torch.rand_like(route.weight) if self.keep == "random" else route.token


class Drop(Config):
    """While training, leave out edges or whole tokens by lot (EOM and FOM, arXiv:2212.07571)."""

    type: Literal["drop"] = "drop"
    leaks: ClassVar[bool] = False
    rate: float = Field(0.1, gt=0, lt=1)
    """Share that is left out."""
    what: Literal["edge", "token"] = "edge"
    """One expert's output for a token, or all of them."""

    def __call__(self, route: Route, probs_TE: Tensor, weigh: Weighing, context: Context) -> Route:
        """The route without what was drawn."""
        if not context.training:
            return route
        if self.what == "edge":
            return keep_edges(route, torch.rand_like(route.weight) >= self.rate)
        return keep_edges(route, (torch.rand(route.num_tokens, device=route.token.device) >= self.rate)[route.token])


def next_with_room(route: Route, probs_TE: Tensor, room: Tensor | int) -> Tensor:
    """[T, E] bool: as many experts per token as it has edges, where experts with room are left.

    In round r every token that still wants an expert asks its r-th best one, and experts admit by position: what was
    chosen is asked first, then the others by probability; an expert of probability zero is never asked.
    """
    num_tokens, num_experts = probs_TE.shape
    chosen_TE = torch.zeros_like(probs_TE, dtype=torch.bool)
    chosen_TE[route.token, route.expert] = True
    by_prob_TE = top_k(probs_TE.detach(), num_experts)
    chosen_first_TE = top_k(chosen_TE.gather(1, by_prob_TE).float(), num_experts)
    wanted_T = torch.bincount(route.token, minlength=num_tokens)
    taken_TE, open_TE = torch.zeros_like(chosen_TE), chosen_TE | (probs_TE > 0)
    for asked_T in by_prob_TE.gather(1, chosen_first_TE).T:
        wants_T = taken_TE.sum(1) < wanted_T
        asks_TE = torch.zeros_like(taken_TE).scatter(1, asked_T[:, None], wants_T[:, None]) & open_TE
        taken_TE |= asks_TE & (asks_TE.cumsum(0) <= room - taken_TE.sum(0))
    return taken_TE


def place_in_expert(route: Route, rank_N: Tensor) -> Tensor:
    """[N] int64: how many edges of the same expert rank before each edge; ties in the route's order."""
    by_rank_N, expert_N = rank_N.argsort(stable=True), route.expert
    order_N = by_rank_N[expert_N[by_rank_N].argsort(stable=True)]
    first_N = F.pad(route.ends.long(), (1, 0))[expert_N]
    place_N = torch.empty_like(order_N)
    place_N[order_N] = torch.arange(len(order_N), device=order_N.device) - first_N
    return place_N


def keep_edges(route: Route, keep_N: Tensor) -> Route:
    """The route with some of its edges: still sorted, no longer K of each token."""
    ends_E = F.pad(keep_N.cumsum(0), (1, 0))[route.ends.long()].to(torch.int32)
    if torch.compiler.is_compiling():  # as many edges as before: those left out join the padding behind
        order_N = (~keep_N).to(torch.uint8).argsort(stable=True)
        weight_N = torch.where(keep_N, route.weight, 0)[order_N]
    else:
        order_N = keep_N.nonzero().flatten()
        weight_N = route.weight[order_N]
    return replace(route, token=route.token[order_N], weight=weight_N, ends=ends_E, top_k=None, slot=None)


Limit = slot(Capacity, Drop)
