"""Collectives that count what they send: every byte that leaves a process for another one, by kind."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

KINDS = ("all_to_all", "all_reduce", "all_gather", "reduce_scatter")


@dataclass
class Wire:
    """Counts bytes that this process sends; of reductions, what the ring algorithm sends, which nothing undercuts.

    Of n processes, each sends in an all-to-all what is for others, in an all-gather its shard n - 1 times, in a
    reduce-scatter n - 1 shards, in an all-reduce 2 (n - 1) times an n-th of the tensor, rounded up to whole bytes.
    """

    sent: Counter[str] = field(default_factory=Counter)

    def all_to_all(self, rows: Tensor, to: list[int], come: list[int], group: ProcessGroup) -> Tensor:
        """[sum(to), ...] -> [sum(come), ...]: the first ``to[0]`` rows go to the group's first process, and so on."""
        away = len(rows) - to[group.rank()]
        self.sent["all_to_all"] += away * rows.shape[1:].numel() * rows.element_size()
        received = rows.new_empty(sum(come), *rows.shape[1:])
        dist.all_to_all_single(received, rows.contiguous(), come, to, group=group)
        return received

    def all_reduce(self, tensor: Tensor, group: ProcessGroup) -> None:
        """Sum over the group, in place."""
        if group.size() > 1:
            part = -(-tensor.numel() * tensor.element_size() // group.size())
            self.sent["all_reduce"] += 2 * (group.size() - 1) * part
            dist.all_reduce(tensor, group=group)

    def gathers(self, shard: Tensor, group: ProcessGroup) -> None:
        """Counts an all-gather of this shard that somebody else does."""
        self.sent["all_gather"] += (group.size() - 1) * shard.numel() * shard.element_size()

    def scatters(self, shard: Tensor, group: ProcessGroup) -> None:
        """Counts a reduce-scatter into this shard that somebody else does."""
        self.sent["reduce_scatter"] += (group.size() - 1) * shard.numel() * shard.element_size()


class _Transfer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, to: list[int], come: list[int], group: ProcessGroup, wire: Wire) -> Tensor:
        ctx.way_back = come, to, group, wire
        return wire.all_to_all(rows, to, come, group)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        to, come, group, wire = ctx.way_back
        return wire.all_to_all(grad_outputs[0], to, come, group), None, None, None, None


def transfer(rows: Tensor, to: list[int], come: list[int], group: ProcessGroup, wire: Wire) -> Tensor:
    """``Wire.all_to_all``; gradients take the way back."""
    return _Transfer.apply(rows, to, come, group, wire)
