"""Which process of an expert group should hold which experts, from the rows that experts got.

``greedy`` gives hot experts replicas and fills processes evenly. ``assign`` is an integer program over several layers:
it weighs the busiest process against tokens that change processes from one layer's expert to the next one's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from moeforge.errors import UserError

Holders = list[list[int]]
"""Of each expert, the processes that hold it, ascending."""
JOINT = 20_000
"""Pairs of experts and processes up to which layers are placed all at once; beyond, one after another, again and
again."""


def greedy(load_E: Tensor, size: int, replicas: int = 0) -> Holders:
    """[E] loads -> holders; as many places on each process. ``replicas`` are places beyond one for each expert.

    The expert whose copies carry most gets another one, until there are no more; then the heaviest copy goes to the
    lightest process that has room and no copy of it (as github.com/deepseek-ai/EPLB does it on one level). Raises
    UserError for places that cannot be shared evenly.
    """
    count = len(load_E)
    if (count + replicas) % size:
        fits = (-count) % size
        raise UserError(
            f"{count} experts and {replicas} replicas are not as many for each of {size} processes: "
            f"take {fits} replicas, or {fits + size}, {fits + 2 * size} ..."
        )
    if replicas > count * (size - 1):
        raise UserError(f"{replicas} replicas are more than {count} experts can have on {size} processes")
    loads, copies = load_E.double().tolist(), [1] * count
    for _ in range(replicas):
        hottest = max((e for e in range(count) if copies[e] < size), key=lambda e: loads[e] / copies[e])
        copies[hottest] += 1
    return _packed(loads, copies, size)


def _packed(loads: list[float], copies: list[int], size: int) -> Holders:
    """Experts with most copies first where loads are equal, so that room is left on as many processes as they need."""
    room, carried = [sum(copies) // size] * size, [0.0] * size
    holders: Holders = [[] for _ in loads]
    for expert in sorted(range(len(loads)), key=lambda e: (-loads[e] / copies[e], -copies[e])):
        for _ in range(copies[expert]):
            free = [rank for rank in range(size) if room[rank] and rank not in holders[expert]]
            if not free:
                _make_room(expert, holders, room, carried, [load / n for load, n in zip(loads, copies, strict=True)])
                free = [rank for rank in range(size) if room[rank] and rank not in holders[expert]]
            rank = min(free, key=lambda rank: carried[rank])
            holders[expert].append(rank)
            room[rank] -= 1
            carried[rank] += loads[expert] / copies[expert]
    return [sorted(ranks) for ranks in holders]


def _make_room(expert: int, holders: Holders, room: list[int], carried: list[float], each: list[float]) -> None:
    """All processes with room hold the expert: the lightest other expert moves there from one that does not."""
    there = next(rank for rank in range(len(room)) if room[rank])
    moves = [
        (each[other], other, rank)
        for other, ranks in enumerate(holders)
        for rank in ranks
        if other != expert and rank not in holders[expert] and there not in ranks
    ]
    load, other, rank = min(moves)
    holders[other][holders[other].index(rank)] = there
    room[rank], room[there] = room[rank] + 1, room[there] - 1
    carried[rank], carried[there] = carried[rank] - load, carried[there] + load


def busiest(load_E: Tensor, holders: Holders, size: int) -> float:
    """Load of the busiest process over the mean; copies of an expert share its load evenly."""
    carried = [0.0] * size
    for load, ranks in zip(load_E.double().tolist(), holders, strict=True):
        for rank in ranks:
            carried[rank] += load / len(ranks)
    return max(carried) / max(1e-300, sum(carried) / size)


@dataclass(frozen=True)
class Traffic:
    """What was measured, in consecutive layers with as many experts each."""

    loads: list[Tensor]
    """Of each layer, [E]."""
    moves: list[Tensor]
    """From each layer to the next, [E, E]: tokens that went to the one expert, then to the other."""

    def cost(self, places: Sequence[Sequence[int]], size: int, balance: float) -> float:
        """What ``assign`` minimises, of the process of each expert of each layer."""
        return self.moved(places) + balance * sum(
            float(load.new_zeros(size).index_add(0, torch.tensor(place), load).max())
            for load, place in zip(self.loads, places, strict=True)
        )

    def moved(self, places: Sequence[Sequence[int]]) -> float:
        """Tokens that change processes between layers."""
        found = 0.0
        for move_EE, (before, after) in zip(self.moves, pairwise(places), strict=True):
            found += float(move_EE[torch.tensor(before)[:, None] != torch.tensor(after)].sum())
        return found


def assign(traffic: Traffic, size: int, balance: float | None = None, seconds: float = 60.0) -> list[list[int]]:
    """The process of each expert, by layer; equally many on each (MoETuner, arXiv:2502.06643, section 4).

    A row more on a layer's busiest process, for which all others wait, weighs as ``balance`` tokens that change
    processes; None: as many as there are processes. Raises UserError without SciPy, and for experts that do not divide.
    """
    balance = float(size) if balance is None else balance
    count, layers = len(traffic.loads[0]), len(traffic.loads)
    if any(len(load) != count for load in traffic.loads):
        raise UserError("an integer program over layers needs as many experts in each: place them by load alone")
    if count % size:
        raise UserError(f"{count} experts cannot be spread evenly over {size} processes: place them by load alone")
    if (layers - 1) * count * count * size <= JOINT:
        return _solve(traffic, size, balance, seconds, range(layers), [[]] * layers)
    places = [[ranks[0] for ranks in greedy(load, size)] for load in traffic.loads]
    best = traffic.cost(places, size, balance)
    while True:
        for layer in range(layers):
            places = _solve(traffic, size, balance, seconds / layers, range(layer, layer + 1), places)
        now = traffic.cost(places, size, balance)
        if now >= best * (1 - 1e-6):
            return places
        best = now


def _solve(
    traffic: Traffic, size: int, balance: float, seconds: float, free: range, places: list[list[int]]
) -> list[list[int]]:
    """Places the layers in ``free``, all others staying where they are."""
    program = _Program(traffic, size, free, places)
    values = program.solve(balance, seconds)
    found = [list(place) for place in places]
    for layer in free:
        found[layer] = values[layer].argmax(1).tolist()
    return found


class _Program:
    """Variables: x[layer, e, g] whether process g holds expert e; the most of a layer's processes; and, for experts of
    two free layers with traffic between them, y[e, f, g] <= min(x[e, g], x[f, g]): whether both are on g."""

    def __init__(self, traffic: Traffic, size: int, free: range, places: list[list[int]]) -> None:
        self.traffic, self.size, self.free = traffic, size, free
        self.count = len(traffic.loads[0])
        self.pairs = [
            (layer, first, second, float(traffic.moves[layer][first, second]))
            for layer in free[:-1]
            for first, second in traffic.moves[layer].nonzero().tolist()
        ]
        self.start_of_most = len(free) * self.count * size
        self.start_of_pairs = self.start_of_most + len(free)
        self.variables = self.start_of_pairs + len(self.pairs) * size
        self.gain = self._gains(places)

    def held(self, layer: int, expert: int, rank: int) -> int:
        """Number of a variable x."""
        return ((layer - self.free.start) * self.count + expert) * self.size + rank

    def _gains(self, places: list[list[int]]) -> Tensor:
        """[variables]: tokens that stay where they are for a variable that is one."""
        gain = torch.zeros(self.variables, dtype=torch.float64)
        for layer in self.free:
            for beside in {layer - 1, layer + 1} - {*self.free}:
                if not 0 <= beside < len(places):
                    continue
                move_EE = self.traffic.moves[layer].T if beside > layer else self.traffic.moves[beside]
                for neighbour, rank in enumerate(places[beside]):
                    for expert in range(self.count):
                        gain[self.held(layer, expert, rank)] += float(move_EE[neighbour, expert])
        for number, (*_, tokens) in enumerate(self.pairs):
            start = self.start_of_pairs + number * self.size
            gain[start : start + self.size] = tokens
        return gain

    def _rows(self) -> list[tuple[dict[int, float], float, float]]:
        """Constraints: coefficients by variable, least, most."""
        rows: list[tuple[dict[int, float], float, float]] = []
        ranks, infinity = range(self.size), float("inf")
        for place, layer in enumerate(self.free):
            experts, load = range(self.count), self.traffic.loads[layer].tolist()
            rows += [({self.held(layer, e, g): 1.0 for g in ranks}, 1, 1) for e in experts]
            each = self.count // self.size
            rows += [({self.held(layer, e, g): 1.0 for e in experts}, each, each) for g in ranks]
            for g in ranks:
                carried = {self.held(layer, e, g): load[e] for e in experts}
                rows.append((carried | {self.start_of_most + place: -1.0}, -infinity, 0))
        for number, (layer, first, second, _) in enumerate(self.pairs):
            for g in ranks:
                both = self.start_of_pairs + number * self.size + g
                rows += [({both: 1.0, self.held(layer, first, g): -1.0}, -infinity, 0)]
                rows += [({both: 1.0, self.held(layer + 1, second, g): -1.0}, -infinity, 0)]
        return rows

    def solve(self, balance: float, seconds: float) -> dict[int, Tensor]:
        """[E, processes] by layer."""
        optimize, sparse = _scipy()
        rows = self._rows()
        entries = [(row, column, value) for row, (some, *_) in enumerate(rows) for column, value in some.items()]
        row, column, value = zip(*entries, strict=True)
        matrix = sparse.csr_array((value, (row, column)), shape=(len(rows), self.variables))
        limits = optimize.LinearConstraint(matrix, [least for _, least, _ in rows], [most for *_, most in rows])
        cost = -self.gain
        cost[self.start_of_most : self.start_of_pairs] = balance
        whole = torch.zeros(self.variables)
        whole[: self.start_of_most] = 1
        top = torch.ones(self.variables, dtype=torch.float64)
        top[self.start_of_most : self.start_of_pairs] = float("inf")
        done = optimize.milp(
            cost.numpy(),
            integrality=whole.numpy(),
            bounds=optimize.Bounds(0, top.numpy()),
            constraints=limits,
            options={"time_limit": seconds},
        )
        if done.x is None:
            raise UserError(f"no placement was found in {seconds:.0f} s: {done.message}")
        x = torch.from_numpy(done.x)[: self.start_of_most].view(len(self.free), self.count, self.size)
        return dict(zip(self.free, x, strict=True))


def _scipy() -> tuple[Any, Any]:
    try:
        from scipy import optimize, sparse
    except ImportError as error:
        raise UserError("an integer program needs SciPy: pip install 'moeforge[compress]'") from error
    return optimize, sparse
