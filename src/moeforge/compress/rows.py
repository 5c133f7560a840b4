"""The rows that experts read of a text, one layer in memory at a time."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moeforge.compress.source import Source
from moeforge.config import Activation
from moeforge.data.packing import Batch
from moeforge.errors import UserError
from moeforge.kernels.allocator import return_freed_memory
from moeforge.moe.bank.mlp import MLPBank
from moeforge.moe.route import Route

FLOOR = 32
"""Tokens below which an expert's own statistics are no estimate: it gets those of all tokens."""
ROWS = 256
"""How many of all tokens those are then, spread evenly."""


class Read(NamedTuple):
    """What came to a bank."""

    rows: Tensor
    """[T, D]."""
    route: Route
    """One over all of them."""
    activation: Activation
    """Of its experts."""


class Watch:
    """The rows and the route of a bank, as they come by batch."""

    def __init__(self, bank: MLPBank) -> None:
        self.activation: Activation = bank.config.activation
        self.rows: list[Tensor] = []
        self.routes: list[Route] = []
        self.hook = bank.register_forward_hook(self._see)

    def _see(self, module: Any, inputs: tuple[Tensor, Any], output: Tensor) -> None:
        x_TD, route = inputs
        if not isinstance(route, Route):
            raise UserError("experts that are merged or mixed for each token cannot be profiled one by one")
        self.rows.append(x_TD)
        self.routes.append(route)

    def done(self) -> Read:
        """Of all batches."""
        self.hook.remove()
        starts = torch.tensor([0, *map(len, self.rows)]).cumsum(0)
        rows_TD = self.rows[0].new_empty(int(starts[-1]), self.rows[0].shape[1])
        for start in starts[:-1].tolist():  # each leaves memory when it is copied: a text may have many rows
            rows = self.rows.pop(0)
            rows_TD[start : start + len(rows)] = rows
        token_N = torch.cat([route.token + start for route, start in zip(self.routes, starts, strict=False)])
        expert_N = torch.cat([route.expert for route in self.routes])
        weight_N = torch.cat([route.weight for route in self.routes])
        route = Route.from_edges(token_N, expert_N, weight_N.float(), len(rows_TD), self.routes[0].num_experts)
        return Read(rows_TD, route, self.activation)


def tokens_of(route: Route, expert: int) -> tuple[Tensor, Tensor]:
    """Tokens [N] that an expert has and their combine weights; with fewer than ``FLOOR``, some of all tokens."""
    low, high = (0, *route.ends.tolist())[expert : expert + 2]
    if high - low >= FLOOR:
        return route.token[low:high], route.weight[low:high]
    token_N = torch.arange(0, route.num_tokens, max(1, route.num_tokens // ROWS))[:ROWS]
    return token_N, torch.full((len(token_N),), float(route.weight.mean()))


class Reading:
    """A model on its way through a text, for what comes to its experts."""

    def __init__(self, streamed: Source, batches: Sequence[Batch]) -> None:
        self.streamed, self.next, self.text = streamed, 0, streamed.text(batches)

    def layer(self, index: int, banks: Mapping[str, int]) -> dict[str, Read]:
        """What came to ``banks`` of layer ``index``, which lies ahead; by their names, given with their numbers."""
        read: dict[str, Read] = {}
        for at in range(self.next, index + 1):
            block: Any = self.streamed.block(at)
            watches = {name: Watch(block.moe.banks[number]) for name, number in banks.items() if at == index}
            try:
                self.text.pass_layer(block)
            finally:
                for watch in watches.values():
                    watch.hook.remove()
            read = {name: watch.done() for name, watch in watches.items()}
            del block  # before there is the next one
            return_freed_memory()
        self.next = index + 1
        return read
