"""Which process of an expert group holds which experts: in order, or as a file says, hot ones on several."""

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from moeforge.config import Tree, read_yaml
from moeforge.errors import UserError
from moeforge.moe.route import Route


@dataclass(frozen=True)
class Placement:
    """Of one bank. A *place* is an expert on a process; places are numbered by process, then as it holds them."""

    held: tuple[tuple[int, ...], ...]
    """Experts of each process."""

    @classmethod
    def in_order(cls, num_experts: int, size: int) -> "Placement":
        """As even shares as there are, neighbours together."""
        return cls(tuple(tuple(part.tolist()) for part in torch.arange(num_experts).tensor_split(size)))

    @classmethod
    def of_holders(cls, holders: list[list[int]], size: int) -> "Placement":
        """From the processes that hold each expert."""
        held = [[expert for expert, ranks in enumerate(holders) if rank in ranks] for rank in range(size)]
        return cls(tuple(map(tuple, held)))

    @cached_property
    def experts(self) -> Tensor:
        """[places]: the expert at each."""
        return torch.tensor([*chain(*self.held)])

    @cached_property
    def holders(self) -> list[list[int]]:
        """Of each expert, the processes that hold it, ascending."""
        return [[rank for rank, held in enumerate(self.held) if e in held] for e in range(len(self.copies))]

    @cached_property
    def copies(self) -> Tensor:
        """[E]: places of each expert."""
        return self.experts.bincount()

    @property
    def replicated(self) -> list[int]:
        """Experts with several places."""
        return (self.copies > 1).nonzero().flatten().tolist()

    @property
    def sizes(self) -> list[int]:
        """Places of each process."""
        return [len(experts) for experts in self.held]

    @cached_property
    def _places(self) -> Tensor:
        """[E, most copies]: the places of each expert; what is left over is never read."""
        places = torch.zeros(len(self.copies), int(self.copies.max()), dtype=torch.int64)
        for expert in range(len(places)):
            found = (self.experts == expert).nonzero().flatten()
            places[expert, : len(found)] = found
        return places

    def route(self, route: Route, sender: int) -> Route:
        """A route over experts as one over places. Each sender spreads an expert's edges evenly over its places.

        Which place gets the edge that is left over goes by the sender, so that not all burden the same one.
        """
        device = route.token.device
        if torch.equal(self.experts, torch.arange(len(self.copies))):
            return route
        expert_N, count_E, copies_E = route.expert, route.counts, self.copies.to(device)
        rank_N = torch.arange(len(expert_N), device=device) - (count_E.cumsum(0) - count_E)[expert_N]
        copies_N = copies_E[expert_N]
        copy_N = (rank_N * copies_N // count_E[expert_N] + sender) % copies_N
        place_N = self._places.to(device)[expert_N, copy_N]
        order_N = place_N.argsort(stable=True)
        ends = place_N.bincount(minlength=len(self.experts)).cumsum(0).to(torch.int32)
        slot = None if route.slot is None else route.slot[order_N]
        return replace(route, token=route.token[order_N], weight=route.weight[order_N], ends=ends, slot=slot)


def read_placements(file: Path) -> Tree:
    """``layer_01: [0, 1, [0, 1], null]``: per layer, the process, or processes, of each expert as the router counts.

    Null is for experts that are everywhere anyway. Raises UserError for a file that says something else.
    """
    tree = read_yaml(file)
    for layer, entries in tree.items():
        if not isinstance(entries, list) or not all(_is_entry(entry) for entry in entries):
            raise UserError(
                f"{file}: {layer}: a list is wanted, with a process, a list of different processes, or null per expert"
            )
    return tree


def _is_entry(entry: object) -> bool:
    if isinstance(entry, list):
        return bool(entry) and all(type(rank) is int for rank in entry) and len({*entry}) == len(entry)
    return entry is None or type(entry) is int


def placed(entries: list[int | list[int] | None], size: int, where: str) -> Placement:
    """Of one bank's entries. Raises UserError where an expert is nowhere, or a process has none."""
    if None in entries:
        raise UserError(f"{where}: expert {entries.index(None)} of its bank is null, but must be somewhere")
    holders = [entry if isinstance(entry, list) else [entry] for entry in entries if entry is not None]
    beyond = sorted({rank for ranks in holders for rank in ranks} - {*range(size)})
    if beyond:
        raise UserError(f"{where}: there is no process {beyond[0]} in a group of {size}: 0 to {size - 1}")
    placement = Placement.of_holders(holders, size)
    if not all(placement.held):
        raise UserError(f"{where}: process {placement.held.index(())} of {size} would hold no expert of a bank")
    return placement
