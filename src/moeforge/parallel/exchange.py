"""The exchange: rows travel to the processes that hold their experts, and their outputs travel back.

A route's edges are sorted by expert, so by owner too. Counts go first, then rows with their combine weights; the owner
runs its experts over them and returns weighted rows. Nothing is padded or dropped: a process may send or get no row at
all. In the backward pass the same ways are gone in reverse, with the gradients of rows and of weights.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from moeforge.errors import UserError
from moeforge.kernels import sum_by_token
from moeforge.moe.bank import Bank
from moeforge.moe.route import Route
from moeforge.parallel.wire import Wire, transfer

Run = Callable[[Tensor, Route], Tensor]


def install(bank: Bank, group: ProcessGroup, wire: Wire) -> None:
    """From now on the bank, which holds its process' share of the experts, is called with routes over all of them."""
    bank.forward = partial(exchanged, bank.forward, group, wire)  # type: ignore[method-assign,assignment]


def exchanged(run: Run, group: ProcessGroup, wire: Wire, x_TD: Tensor, route: object) -> Tensor:
    """[T, D] -> [T, D] weighted sum over a route over all experts; ``run`` is the bank of the local ones.

    Collective over the group. Raises UserError for mixed tokens or mixed parameters, which have no edges.
    """
    if not isinstance(route, Route):
        raise UserError("select: soft and merged mix all tokens or all experts: they need an expert size of 1")
    send_RE = route.counts.view(group.size(), -1)
    come_RE = wire.all_to_all(send_RE, [1] * len(send_RE), [1] * len(send_RE), group)
    to, come = torch.stack([send_RE.sum(1), come_RE.sum(1)]).tolist()
    local_RE = torch.arange(send_RE.shape[1], device=x_TD.device).expand_as(send_RE)
    expert_M1 = local_RE.flatten().repeat_interleave(come_RE.flatten())[:, None]
    rows_MD = transfer(route.gather(_as_computed(x_TD)), to, come, group, wire)
    weight_M = transfer(route.weight, to, come, group, wire)
    weighted_MD = run(rows_MD, Route.from_top_k(expert_M1, weight_M[:, None], send_RE.shape[1]))
    y_TD = sum_by_token(transfer(weighted_MD, come, to, group, wire), route)
    return route.add_carry(y_TD.to(weighted_MD.dtype), x_TD)


def _as_computed(x_TD: Tensor) -> Tensor:
    """In the type of matrix products: under autocast the experts would cast the rows anyway, the wire carries half."""
    device = x_TD.device.type
    return x_TD.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x_TD
