"""Collectives that count what they send: every byte that leaves a process for another one, by kind and by link."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

_Call = Callable[..., Tensor]
KINDS = ("all_to_all", "all_reduce", "all_gather", "reduce_scatter")


@dataclass
class Wire:
    """Counts bytes that this process sends; of reductions, what the ring algorithm sends, which nothing undercuts.

    Of n processes, each sends in an all-to-all what is for others, in an all-gather its shard n - 1 times, in a
    reduce-scatter n - 1 shards, in an all-reduce 2 (n - 1) times an n-th of the tensor, rounded up to whole bytes.
    In a ring, all of that goes to the next process of the group.
    """

    node_size: int | None = None
    """Processes of one machine, neighbours by rank; None: all are on one."""
    sent: Counter[str] = field(default_factory=Counter)
    """By kind, to whomever."""
    far: Counter[str] = field(default_factory=Counter)
    """By kind, to other machines; ``messages`` are those of all-to-alls, one to each process there."""

    def clear(self) -> None:
        """Counts from zero."""
        self.sent.clear()
        self.far.clear()

    def all_to_all(self, rows: Tensor, to: list[int], come: list[int], group: ProcessGroup) -> Tensor:
        """[sum(to), ...] -> [sum(come), ...]: the first ``to[0]`` rows go to the group's first process, and so on."""
        received, work = self.begin_all_to_all(rows, to, come, group)
        work.wait()
        return received

    def all_gather(self, rows: Tensor, sizes: list[int], group: ProcessGroup) -> Tensor:
        """[own, ...] -> [sum(sizes), ...]: the rows of all, in order, of whom each may have another number."""
        to = [len(rows)] * group.size()
        received, work = self.begin_all_to_all(torch.cat([rows] * group.size()), to, sizes, group, "all_gather")
        work.wait()
        return received

    def reduce_scatter(self, rows: Tensor, sizes: list[int], group: ProcessGroup) -> Tensor:
        """[sum(sizes), ...] -> [own, ...]: the sum over all of this process' rows."""
        come = [sizes[group.rank()]] * group.size()
        received, work = self.begin_all_to_all(rows, sizes, come, group, "reduce_scatter")
        work.wait()
        return received.unflatten(0, (group.size(), -1)).sum(0) if come[0] else received

    def begin_all_to_all(
        self, rows: Tensor, to: list[int], come: list[int], group: ProcessGroup, kind: str = "all_to_all"
    ) -> tuple[Tensor, dist.Work]:
        """The same under way: what has been received can be read after ``wait``. ``kind`` is what it counts as."""
        row_bytes = rows.shape[1:].numel() * rows.element_size()
        for peer, count in enumerate(to):
            if peer != group.rank():
                self._count(kind, count * row_bytes, peer, group)
                self.far["messages"] += self._is_far(peer, group) and kind == "all_to_all"
        received = rows.new_empty(sum(come), *rows.shape[1:])
        work = dist.all_to_all_single(received, rows.contiguous(), come, to, group=group, async_op=True)
        assert work is not None  # this process is one of the group
        return received, work

    def all_reduce(self, tensor: Tensor, group: ProcessGroup) -> None:
        """Sum over the group, in place."""
        if group.size() > 1:
            part = -(-tensor.numel() * tensor.element_size() // group.size())
            self._around("all_reduce", 2 * part, group)
            dist.all_reduce(tensor, group=group)

    def gathers(self, shard: Tensor, group: ProcessGroup) -> None:
        """Counts an all-gather of this shard that somebody else does."""
        self._around("all_gather", shard.numel() * shard.element_size(), group)

    def scatters(self, shard: Tensor, group: ProcessGroup) -> None:
        """Counts a reduce-scatter into this shard that somebody else does."""
        self._around("reduce_scatter", shard.numel() * shard.element_size(), group)

    def _around(self, kind: str, part: int, group: ProcessGroup) -> None:
        """A ring: to the next process, as many parts as there are others."""
        self._count(kind, (group.size() - 1) * part, (group.rank() + 1) % group.size(), group)

    def _count(self, kind: str, size: int, peer: int, group: ProcessGroup) -> None:
        self.sent[kind] += size
        if self._is_far(peer, group):
            self.far[kind] += size

    def _is_far(self, peer: int, group: ProcessGroup) -> bool:
        if self.node_size is None:
            return False
        ranks = dist.get_process_group_ranks(group)
        return ranks[peer] // self.node_size != ranks[group.rank()] // self.node_size


class Flight:
    """Rows under way to other processes, whose gradients will be under way back while other gradients are computed.

    Autograd runs what was last made first: what was computed between departure and arrival comes between the two in
    the backward pass also, in the same order on all processes.
    """

    def __init__(self, rows: Tensor, to: list[int], come: list[int], group: ProcessGroup, wire: Wire) -> None:
        """Departs: as ``Wire.all_to_all``."""
        self.there, self.back, self.wire = (to, come, group), (come, to, group), wire
        self.departed: Tensor = _Depart.apply(rows, self)

    def begin(self, rows: Tensor, direction: tuple[list[int], list[int], ProcessGroup]) -> Tensor:
        """Where rows, or gradients, will have come to after ``landed``."""
        self.received, self.work = self.wire.begin_all_to_all(rows, *direction)
        return self.received

    def landed(self) -> Tensor:
        """What has come, once it has. Keeps nothing of it."""
        self.work.wait()
        received = self.received
        del self.received, self.work
        return received

    def arrive(self) -> Tensor:
        """``landed``, to be computed with."""
        departed = self.departed
        del self.departed  # whose graph knows of this flight
        return _Arrive.apply(departed, self)


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, flight: Flight) -> Tensor:
        ctx.flight = flight
        return flight.begin(rows, flight.there)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        return ctx.flight.landed(), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, departed: Tensor, flight: Flight) -> Tensor:
        ctx.flight = flight
        return flight.landed().view_as(departed)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        ctx.flight.begin(grad_outputs[0], ctx.flight.back)
        return grad_outputs[0], None  # of the right shape; what is under way has the one of what departed


def gather_rows(rows: Tensor, sizes: list[int], group: ProcessGroup, wire: Wire) -> Tensor:
    """[own, ...] -> [sum(sizes), ...]: ``Wire.all_gather``; gradients are added up over the group."""
    return _ThereAndBack.apply(rows, wire.all_gather, wire.reduce_scatter, sizes, group)


def sum_rows(rows: Tensor, sizes: list[int], group: ProcessGroup, wire: Wire) -> Tensor:
    """[sum(sizes), ...] -> [own, ...]: ``Wire.reduce_scatter``; gradients are gathered."""
    return _ThereAndBack.apply(rows, wire.reduce_scatter, wire.all_gather, sizes, group)


class _ThereAndBack(torch.autograd.Function):
    """One collective for rows, its counterpart for their gradients."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, there: _Call, back: _Call, *where: Any) -> Tensor:
        ctx.back, ctx.where = back, where
        return there(rows, *where)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        return ctx.back(grad_outputs[0], *ctx.where), None, None, None, None
