"""The exchange: rows travel to the processes that hold their experts, and their outputs travel back.

A route's edges are sorted by expert, so by owner too. Counts go first, then rows with their combine weights; the owner
runs its experts over them and returns weighted rows. Nothing is padded or dropped: a process may send or get no row at
all. In the backward pass the same ways are gone in reverse, with the gradients of rows and of weights.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule

from moeforge.errors import UserError
from moeforge.kernels import sum_by_token
from moeforge.moe.bank import Bank
from moeforge.moe.route import Route
from moeforge.parallel.chunks import Chunks
from moeforge.parallel.placement import Placement
from moeforge.parallel.way import Way, find_way
from moeforge.parallel.wire import Flight, Wire

Run = Callable[[Tensor, Route], Tensor]


@dataclass(frozen=True)
class Exchange:
    """Who exchanges rows, by which links, in how many chunks of tokens."""

    levels: tuple[ProcessGroup, ...]
    """As ``Mesh.levels``."""
    wire: Wire
    chunks: Chunks
    """While one is computed, the next one is on its way, and the one before on its way back."""

    position: int
    """Of this process among those that hold all experts."""

    def install(self, bank: Bank, where: Callable[[], Placement]) -> None:
        """From now on the bank, which holds its process' share of the experts, is called with routes over all.

        ``where`` says who holds which experts now.
        """
        bank.forward = partial(self.run, bank.forward, where)  # type: ignore[method-assign,assignment]
        bank.begin = partial(self.begin, bank, where)  # type: ignore[method-assign,assignment]

    def begin(self, bank: Bank, where: Callable[[], Placement], x_TD: Tensor, route: Any) -> Callable[[], Tensor]:
        """``Bank.begin``: the first chunk is on its way when this returns.

        FSDP gives back its weights when the gradient of a call's input is there: such a bank is one call.
        """
        if isinstance(bank, FSDPModule):
            return Bank.begin(bank, x_TD, route)
        begun = self._depart(where(), x_TD, route)
        return lambda: bank(x_TD, begun)

    def run(self, run: Run, where: Callable[[], Placement], x_TD: Tensor, route: object) -> Tensor:
        """[T, D] -> [T, D] weighted sum over a route over all experts; ``run`` is the bank of the local ones.

        Collective over the group. Raises UserError for mixed tokens or mixed parameters, which have no edges.
        """
        begun = route if isinstance(route, Begun) else self._depart(where(), x_TD, route)
        homeward, arriving = [], begun.flights
        for part, following in zip(begun.parts, [*begun.parts[1:], None], strict=True):
            departed = None if following is None else following.depart()
            homeward.append(part.compute(run, arriving))
            arriving = departed or arriving
        y_TD = torch.cat([part.arrive_home(flight) for part, flight in zip(begun.parts, homeward, strict=True)])
        return begun.route.add_carry(y_TD, x_TD)

    def _depart(self, placement: Placement, x_TD: Tensor, route: object) -> "Begun":
        if not isinstance(route, Route):
            raise UserError("select: soft and merged mix all tokens or all experts: they need an expert size of 1")
        rows_TD, parts, chunks = as_computed(x_TD), [], self.chunks.now
        for number in range(chunks):
            low, high = (len(x_TD) * edge // chunks for edge in (number, number + 1))
            piece = route if chunks == 1 else _of_tokens(route, low, high)
            piece = placement.route(piece, self.position)
            way, come_RE = find_way(piece.counts, placement.sizes, self.levels, self.wire)
            parts.append(Part(rows_TD[low:high], piece, way, come_RE))
        return Begun(route, parts, parts[0].depart())


class Part(NamedTuple):
    """A chunk of tokens and its way."""

    x: Tensor
    """[T, D]."""
    route: Route
    """Of these tokens."""
    way: Way
    come: Tensor
    """[R, E] rows that come here, by sender and own expert."""

    def depart(self) -> tuple[Flight, Flight]:
        """Rows and their combine weights."""
        return self.way.depart(self.route.gather(self.x)), self.way.depart(self.route.weight)

    def compute(self, run: Run, flights: tuple[Flight, Flight]) -> Flight:
        """What arrives through the experts, and home."""
        rows_MD, weight_M = (flight.arrive() for flight in flights)
        local_RE = torch.arange(self.come.shape[1], device=rows_MD.device).expand_as(self.come)
        expert_M1 = local_RE.flatten().repeat_interleave(self.come.flatten())[:, None]
        weighted_MD = run(rows_MD, Route.from_top_k(expert_M1, weight_M[:, None], self.come.shape[1]))
        return self.way.depart_home(weighted_MD)

    def arrive_home(self, flight: Flight) -> Tensor:
        """[tokens of the chunk, D]."""
        rows_ND = self.way.arrive_home(flight)
        return sum_by_token(rows_ND, self.route).to(rows_ND.dtype)


class Begun(NamedTuple):
    """An exchange whose first part is on its way."""

    route: Route
    parts: list[Part]
    flights: tuple[Flight, Flight]


def _of_tokens(route: Route, low: int, high: int) -> Route:
    """The edges of these tokens, counted from ``low``. Without the carry."""
    kept_N = (route.token >= low) & (route.token < high)
    ends_F = torch.cat([kept_N.new_zeros(1, dtype=torch.int32), kept_N.cumsum(0, dtype=torch.int32)])
    slot = None if route.slot is None else route.slot[kept_N] - low * (route.top_k or 0)
    token, weight = route.token[kept_N] - low, route.weight[kept_N]
    return Route(token, weight, ends_F[route.ends], high - low, route.top_k, slot)


def as_computed(x_TD: Tensor) -> Tensor:
    """In the type of matrix products: under autocast the experts would cast the rows anyway, the wire carries half."""
    device = x_TD.device.type
    return x_TD.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x_TD
