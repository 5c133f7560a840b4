"""Weights travel, rows stay: each process fetches the experts that its tokens need (FSSDP, arXiv:2502.02581).

The experts are cut over the group as for the exchange, their gradients and optimizer state too. What a process fetches,
a sparse all-gather, is gone after the forward pass and fetched again in the backward pass; gradients of fetched experts
go to their owners, who add them up, a sparse reduce-scatter. It pays where a process has many rows for few experts.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from moeforge.errors import UserError
from moeforge.moe.bank import Bank
from moeforge.moe.route import Route
from moeforge.parallel.placement import Placement
from moeforge.parallel.wire import Flight, Wire


@dataclass(frozen=True)
class Fetch:
    """In place of an ``Exchange``."""

    group: ProcessGroup
    """Holds all experts between its processes."""
    wire: Wire

    def install(self, bank: Bank, where: Callable[[], Placement]) -> None:
        """As ``Exchange.install``."""
        worker = copy.deepcopy(bank).to("meta")  # computes with whatever weights it is given
        bank.forward = partial(self.run, worker, bank, where)  # type: ignore[method-assign,assignment]

    def run(self, worker: Bank, bank: Bank, where: Callable[[], Placement], x_TD: Tensor, route: object) -> Tensor:
        """[T, D] -> [T, D] weighted sum over a route over all experts. Collective over the group.

        Raises UserError for mixed tokens or mixed parameters, which need all experts.
        """
        if not isinstance(route, Route):
            raise UserError("select: soft and merged mix all tokens or all experts: they need an expert size of 1")
        placement = where()
        route = placement.route(route, self.group.rank())
        needed_S, sizes = route.counts > 0, placement.sizes
        mine = sizes[self.group.rank()]
        asked_RE = self.wire.all_to_all(needed_S.byte(), sizes, [mine] * len(sizes), self.group).view(-1, mine)
        to, come = asked_RE.sum(1).tolist(), [int(part.sum()) for part in needed_S.split(sizes)]
        names, stacks = zip(*bank.named_parameters(recurse=False), strict=True)

        def compute(x_TD: Tensor, weight_N: Tensor, *stacks: Tensor) -> Tensor:
            asked_N = asked_RE.nonzero()[:, 1]
            flights = [Flight(stack.index_select(0, asked_N), to, come, self.group, self.wire) for stack in stacks]
            fetched = [flight.arrive() for flight in flights]
            if not sum(come):
                return route.add_carry(_nothing(x_TD, [x_TD[:0], weight_N, *fetched]), x_TD)
            few = replace(route, weight=weight_N, ends=route.ends[needed_S])
            return functional_call(worker, dict(zip(names, fetched, strict=True)), (x_TD, few))

        return checkpoint(compute, x_TD, route.weight, *stacks, use_reentrant=False)


def _nothing(x_TD: Tensor, empty: list[Tensor]) -> Tensor:
    """What no expert adds, made of tensors without rows, whose gradients and what is made again for them are empty too.

    So this process takes part in whatever the others send each other in their backward pass.
    """
    zero = x_TD.new_zeros(())
    return torch.zeros_like(x_TD) + sum((tensor.sum() * zero for tensor in empty), start=zero)
