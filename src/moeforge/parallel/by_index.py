"""Rows go to everyone, experts stay: each process picks by index the rows of its own experts (arXiv:2304.11414).

The paper divides experts over a group whose processes all have the same rows; then picking is all there is to do, and
one all-reduce sums what the experts of each have added. Here processes have rows of their own: a gather before and a
reduce-scatter after, which are the two halves of an all-reduce. Edges travel alone, without rows. It sends less than
the exchange where a row has more experts than a group has processes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from moeforge.errors import UserError
from moeforge.moe.bank import Bank
from moeforge.moe.route import Route
from moeforge.parallel.exchange import Run, as_computed
from moeforge.parallel.placement import Placement
from moeforge.parallel.way import find_way
from moeforge.parallel.wire import Wire, gather_rows, sum_rows


@dataclass(frozen=True)
class ByIndex:
    """In place of an ``Exchange``."""

    group: ProcessGroup
    """Holds all experts between its processes."""
    wire: Wire

    def install(self, bank: Bank, where: Callable[[], Placement]) -> None:
        """As ``Exchange.install``."""
        bank.forward = partial(self.run, bank.forward, where)  # type: ignore[method-assign,assignment]

    def run(self, run: Run, where: Callable[[], Placement], x_TD: Tensor, route: object) -> Tensor:
        """[T, D] -> [T, D] weighted sum over a route over all experts. Collective over the group.

        Raises UserError for mixed tokens or mixed parameters, which have no edges.
        """
        if not isinstance(route, Route):
            raise UserError("select: soft and merged mix all tokens or all experts: they need an expert size of 1")
        placement = where()
        placed = placement.route(route, self.group.rank())
        way, come_RE = find_way(placed.counts, placement.sizes, (self.group,), self.wire)
        ones = [1] * self.group.size()
        size_R = self.wire.all_gather(placed.token.new_tensor([len(x_TD)]), ones, self.group)
        token_M, weight_M = way.depart(placed.token).arrive(), way.depart(placed.weight).arrive()
        token_M = token_M + (size_R.cumsum(0) - size_R).repeat_interleave(come_RE.sum(1))
        expert_M = torch.arange(come_RE.shape[1], device=token_M.device).repeat(len(come_RE))
        order_M = expert_M.repeat_interleave(come_RE.flatten()).argsort(stable=True)
        ends, sizes = come_RE.sum(0).cumsum(0).to(torch.int32), size_R.tolist()
        all_TD = gather_rows(as_computed(x_TD), sizes, self.group, self.wire)
        own = Route(token_M[order_M], weight_M[order_M], ends, len(all_TD))
        return route.add_carry(sum_rows(run(all_TD, own), sizes, self.group, self.wire), x_TD)
