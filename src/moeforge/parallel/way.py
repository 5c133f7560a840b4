"""The way of rows to the processes that hold their experts: one all-to-all, or one per level of links.

With two levels (arXiv:2203.14685, section 4.2; arXiv:2212.05191) a row goes first to the neighbour that has, inside its
own machine, the place its owner has in the other one, then across. Every process so writes to one process of each other
machine instead of to all of them: fewer, larger messages over the slow links, for more bytes over the fast ones.

Blocks of rows, one per owner, are sorted by where they go last. At each level those [A, B] for the B processes of its
group are put in the order [B, A] and sent, and arrive sorted by who sent them: B as the new first dimension. After the
last level, rows lie as a single all-to-all would have them: by sender, then by expert.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from moeforge.parallel.wire import Flight, Wire


@dataclass(frozen=True)
class Hop:
    """One all-to-all of rows."""

    group: ProcessGroup
    to: list[int]
    """Rows for each process of the group."""
    come: list[int]
    """Rows from each."""
    order: Tensor | None
    """[N] int64: the row that goes first, second ... None: as they are."""


@dataclass(frozen=True)
class Way:
    """There and back; gradients take the other direction."""

    hops: list[Hop]
    wire: Wire

    def depart(self, rows: Tensor) -> Flight:
        """[N, ...] sorted by owner -> [M, ...] by sender, once they arrive. Only the last hop is left under way."""
        for hop in self.hops[:-1]:
            rows = self._flight(rows, hop).arrive()
        return self._flight(rows, self.hops[-1])

    def _flight(self, rows: Tensor, hop: Hop) -> Flight:
        rows = rows if hop.order is None else rows.index_select(0, hop.order)
        return Flight(rows, hop.to, hop.come, hop.group, self.wire)

    def depart_home(self, rows: Tensor) -> Flight:
        """[M, ...] as they came -> on their way home by the hop that came last."""
        return self._flight_back(rows, self.hops[-1])

    def arrive_home(self, flight: Flight) -> Tensor:
        """[N, ...] as they were before ``depart``."""
        rows = _as_before(flight.arrive(), self.hops[-1])
        for hop in reversed(self.hops[:-1]):
            rows = _as_before(self._flight_back(rows, hop).arrive(), hop)
        return rows

    def _flight_back(self, rows: Tensor, hop: Hop) -> Flight:
        return Flight(rows, hop.come, hop.to, hop.group, self.wire)


def _as_before(rows: Tensor, hop: Hop) -> Tensor:
    return rows if hop.order is None else rows.index_select(0, hop.order.argsort())


def find_way(counts_S: Tensor, held: Sequence[int], levels: Sequence[ProcessGroup], wire: Wire) -> tuple[Way, Tensor]:
    """The way of rows of which there are ``counts_S``, and how many come to this process, [senders, own places].

    S are the places of experts, sorted by process, of which each has as many as ``held`` says. ``levels`` are the
    groups inside a machine and across machines, or one group of all. The counts go the way themselves. Collective.
    """
    hops, blocks = [], torch.tensor(held)
    for group in levels:
        blocks_AB, size = blocks.view(-1, group.size()), group.size()
        here_A = blocks_AB[:, group.rank()]
        order_S = _transposed(blocks_AB.to(counts_S.device))
        ordered_S = counts_S if order_S is None else counts_S[order_S]
        arrived_S = wire.all_to_all(ordered_S, blocks_AB.sum(0).tolist(), [int(here_A.sum())] * size, group)
        blocks = here_A.repeat(size)
        rows_AB = _sums(counts_S, blocks_AB)
        come_BA = _sums(arrived_S, blocks.view(size, -1))
        to, come = torch.stack([rows_AB.sum(0), come_BA.sum(1)]).tolist()
        hops.append(Hop(group, to, come, _transposed(rows_AB)))
        counts_S = arrived_S
    return Way(hops, wire), counts_S.view(len(held), -1)


def _sums(counts_S: Tensor, blocks_AB: Tensor) -> Tensor:
    """[A, B]: the sum of each block of counts, where ``blocks_AB`` says how many it has."""
    total = torch.cat([counts_S.new_zeros(1), counts_S.cumsum(0)])
    ends = blocks_AB.flatten().cumsum(0).to(counts_S.device)
    return total[ends].diff(prepend=total[:1]).view_as(blocks_AB)


def _transposed(sizes_AB: Tensor) -> Tensor | None:
    """The order that makes blocks of these sizes, which lie by A, then B, lie by B, then A; None: they do already."""
    if 1 in sizes_AB.shape:
        return None
    starts_AB = (sizes_AB.flatten().cumsum(0)).view_as(sizes_AB) - sizes_AB
    sizes, starts = sizes_AB.T.flatten(), starts_AB.T.flatten()
    moved = (starts - (sizes.cumsum(0) - sizes)).repeat_interleave(sizes)
    return torch.arange(len(moved), device=moved.device) + moved
