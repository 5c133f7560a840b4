"""Rebalancing: every so many steps, experts move to where the rows of these steps would have been shared best."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from moeforge.config import Tree
from moeforge.models import Decoder
from moeforge.parallel.piece import local
from moeforge.parallel.placement import Placement
from moeforge.parallel.plan.places import busiest, greedy
from moeforge.parallel.sharding import Sharding
from moeforge.parallel.wire import Wire


class Rebalance:
    """Counts what experts got, and moves them with their optimizer's state. All processes come to the same decision."""

    def __init__(self, every: int, model: Decoder, sharding: Sharding, wire: Wire) -> None:
        """``every`` so many steps."""
        self.every, self.sharding, self.wire = every, sharding, wire
        self.loads: dict[str, Tensor] = {}
        """By bank, [E] rows since experts last could move."""
        names = {bank: name for name, bank in model.named_modules()}
        self.parts = [
            (f"layer_{depth:02d}", names[bank], span)
            for depth, moe in model.moe_layers.items()
            for bank, span in zip(moe.banks, moe.config.spans, strict=True)
            if names[bank] in sharding.banks
        ]
        """(router, bank, its experts among the router's); a layer that is passed several times has several routers."""

    def after(self, step: int, loads: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
        """After ``step`` steps, the last of which gave experts these ``loads``, by router. Collective."""
        for router, name, span in self.parts:
            self.loads[name] = self.loads.get(name, 0) + loads[router][span.start : span.stop].cpu()
        if step % self.every:
            return
        for name, load_E in self.loads.items():
            self._settle(name, load_E, optimizer)
        self.loads = {}

    def whereabouts(self) -> Tree:
        """By bank: the experts of each process, and the rows that they got since they last could move."""
        banks = self.sharding.banks
        loads = {name: load_E.tolist() for name, load_E in self.loads.items()}
        return {name: {"held": banks[name].held, "loads": loads.get(name)} for _, name, _ in self.parts}

    def take_up(self, whereabouts: Tree) -> None:
        """Experts are to be there; whoever calls this will fill them with what they were. Of another grid: stays."""
        for name, there in whereabouts.items():
            held, here = tuple(map(tuple, there["held"])), self.sharding.banks.get(name)
            if here is not None and [*map(len, held)] == here.sizes:
                self.sharding.move(name, Placement(held))
            if there["loads"] is not None:
                self.loads[name] = torch.tensor(there["loads"])

    def _settle(self, name: str, load_E: Tensor, optimizer: torch.optim.Optimizer) -> None:
        old = self.sharding.banks[name]
        size, places = len(old.held), len(old.experts)
        new = renumbered(Placement.of_holders(greedy(load_E, size, places - len(load_E)), size), old)
        if busiest(load_E, new.holders, size) >= busiest(load_E, old.holders, size):
            return
        parameters = [p for key, p in self.sharding.parameters.items() if key.rpartition(".")[0] == name]
        states = [value for p in parameters for value in optimizer.state[p].values() if value.ndim]
        mesh, tensors = self.sharding.mesh, [local(tensor) for tensor in (*parameters, *states)]
        if isinstance(parameters[0], DTensor):
            data = mesh.grid["data"].size()
            move(tensors, cut(old, data), cut(new, data), mesh.same_slice.get_group(), self.wire)
        else:
            move(tensors, old, new, mesh.expert_group, self.wire)
        self.sharding.move(name, new)


def cut(placement: Placement, size: int) -> Placement:
    """What FSDP leaves of it to each of [``size`` x expert] processes: even shares, the last ones less or none."""

    def part(held: tuple[int, ...], at: int) -> tuple[int, ...]:
        share = -(-len(held) // size)
        return held[at * share :][:share]

    return Placement(tuple(part(held, at) for at in range(size) for held in placement.held))


def renumbered(new: Placement, old: Placement) -> Placement:
    """The same shares, each on a process that has much of it already: by the largest overlap first."""
    size = len(old.held)
    pairs = [
        (-len({*new.held[share]} & {*old.held[rank]}), share, rank) for share in range(size) for rank in range(size)
    ]
    held: dict[int, tuple[int, ...]] = {}
    taken: set[int] = set()
    for _, share, rank in sorted(pairs):
        if share not in taken and rank not in held:
            held[rank] = new.held[share]
            taken.add(share)
    return Placement(tuple(held[rank] for rank in range(size)))


@torch.no_grad()
def move(tensors: list[Tensor], old: Placement, new: Placement, group: ProcessGroup, wire: Wire) -> None:
    """Rows of each tensor, one per expert held, become those of the new placement, in place. Collective.

    A process sends what others do not have yet; of an expert that several hold, they take turns.
    """
    size, here = len(old.held), group.rank()

    def source(expert: int, rank: int) -> int:
        holders = old.holders[expert]
        return rank if rank in holders else holders[rank % len(holders)]

    to = [[expert for expert in new.held[rank] if source(expert, rank) == here] for rank in range(size)]
    come = [[expert for expert in new.held[here] if source(expert, here) == rank] for rank in range(size)]
    rows = [old.held[here].index(expert) for experts in to for expert in experts]
    places = [new.held[here].index(expert) for experts in come for expert in experts]
    for tensor in tensors:
        tensor[places] = wire.all_to_all(tensor[rows], [*map(len, to)], [*map(len, come)], group)
