"""Capacity: which edges of a route are kept. Nothing is dropped unless one of these parts is named."""

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from moeforge.config import Config, slot
from moeforge.moe.context import Context
from moeforge.moe.route import Route


class Capacity(Config):
    """Each expert takes at most factor * edges / E; further edges are dropped (GShard, arXiv:2006.16668).

    Whether an edge is kept depends on other tokens: not for decoding.
    """

    type: Literal["capacity"] = "capacity"
    leaks: ClassVar[bool] = True
    capacity_factor: float = Field(1.25, gt=0)
    """Room of an expert, in units of its even share."""
    eval_capacity_factor: float | None = Field(None, gt=0)
    """Outside training; null: the same."""
    keep: Literal["first", "heaviest", "random"] = "first"
    """By position, by combine weight over the whole batch (V-MoE, arXiv:2106.05974), or by lot."""

    def __call__(self, route: Route, context: Context) -> Route:
        """The route without what does not fit."""
        factor = self.capacity_factor
        if not context.training and self.eval_capacity_factor is not None:
            factor = self.eval_capacity_factor
        room = (factor * route.ends[-1].double() / route.num_experts).ceil()
        return keep_edges(route, place_in_expert(route, self._rank(route)) < room)

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

    def __call__(self, route: Route, context: Context) -> Route:
        """The route without what was drawn."""
        if not context.training:
            return route
        if self.what == "edge":
            return keep_edges(route, torch.rand_like(route.weight) >= self.rate)
        return keep_edges(route, (torch.rand(route.num_tokens, device=route.token.device) >= self.rate)[route.token])


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
