"""The exchange: rows travel to the processes that hold their experts, and their outputs travel back.

A route's edges are sorted by expert, so by owner too. Counts go first, then rows with their combine weights; the owner
runs its experts over them and returns weighted rows. Nothing is padded or dropped: a process may send or get no row at
all. In the backward pass the same ways are gone in reverse, with the gradients of rows and of weights.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from moeforge.errors import UserError
from moeforge.kernels import sum_by_token
from moeforge.moe.bank import Bank
from moeforge.moe.route import Route
from moeforge.parallel.way import find_way
from moeforge.parallel.wire import Wire

Run = Callable[[Tensor, Route], Tensor]


@dataclass(frozen=True)
class Exchange:
    """Who exchanges rows, and by which links."""

    levels: tuple[ProcessGroup, ...]
    """As ``Mesh.levels``."""
    wire: Wire

    def install(self, bank: Bank) -> None:
        """From now on the bank, which holds its process' share of the experts, is called with routes over all."""
        bank.forward = partial(self.run, bank.forward)  # type: ignore[method-assign,assignment]

    def run(self, run: Run, x_TD: Tensor, route: object) -> Tensor:
        """[T, D] -> [T, D] weighted sum over a route over all experts; ``run`` is the bank of the local ones.

        Collective over the group. Raises UserError for mixed tokens or mixed parameters, which have no edges.
        """
        if not isinstance(route, Route):
            raise UserError("select: soft and merged mix all tokens or all experts: they need an expert size of 1")
        size = torch.Size(group.size() for group in self.levels).numel()
        way, come_RE = find_way(route.counts, [route.num_experts // size] * size, self.levels, self.wire)
        local_RE = torch.arange(come_RE.shape[1], device=x_TD.device).expand_as(come_RE)
        expert_M1 = local_RE.flatten().repeat_interleave(come_RE.flatten())[:, None]
        rows_MD = way.there(route.gather(_as_computed(x_TD)))
        weight_M = way.there(route.weight)
        weighted_MD = run(rows_MD, Route.from_top_k(expert_M1, weight_M[:, None], come_RE.shape[1]))
        y_TD = sum_by_token(way.back(weighted_MD), route)
        return route.add_carry(y_TD.to(weighted_MD.dtype), x_TD)


def _as_computed(x_TD: Tensor) -> Tensor:
    """In the type of matrix products: under autocast the experts would cast the rows anyway, the wire carries half."""
    device = x_TD.device.type
    return x_TD.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x_TD
