"""Who works with whom: the processes as a grid, one axis for the experts, one for the data.

Every process trains on rows of its own. Those of one ``expert`` group hold all experts between them and exchange rows;
those of one ``data`` group hold the same experts. Neighbouring ranks share an expert group, so that its traffic, the
most of all, stays inside a machine.
"""

from dataclasses import dataclass

import torch
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from moeforge.errors import UserError


@dataclass(frozen=True)
class Mesh:
    """One process' view of the grid: ``size`` is ``expert_size`` times the data axis.

    As a ``DeviceMesh`` the expert axis comes first: a tensor cut along both is cut by experts, then by data.
    """

    grid: DeviceMesh
    """[expert, data]"""
    world: DeviceMesh
    """[all]"""
    links: DeviceMesh | None = None
    """[data, across machines, inside]: the expert axis in two; None where all links count as one."""

    @classmethod
    def build(cls, size: int, expert_size: int, device: str, node_size: int | None = None) -> "Mesh":
        """With a ``node_size``, machines of so many processes. Collective: every process calls it alike.

        Raises UserError where ``check_mesh`` and ``check_levels`` do.
        """
        check_mesh(size, expert_size)
        ranks = torch.arange(size)
        grid = DeviceMesh(device, ranks.view(-1, expert_size).T, mesh_dim_names=("expert", "data"))
        links = None
        if node_size is not None:
            check_levels(expert_size, node_size)
            names = ("data", "across", "inside")
            links = DeviceMesh(device, ranks.view(-1, expert_size // node_size, node_size), mesh_dim_names=names)
        return cls(grid, DeviceMesh(device, ranks, mesh_dim_names=("world",)), links)

    @property
    def size(self) -> int:
        """Processes."""
        return self.world.size()

    @property
    def expert_size(self) -> int:
        """Processes that share the experts."""
        return self.grid.size(0)

    @property
    def rank(self) -> int:
        """This process' number."""
        return self.world.get_rank()

    @property
    def expert_group(self) -> ProcessGroup:
        """Those that exchange rows with this process."""
        return self.grid.get_group("expert")

    @property
    def levels(self) -> tuple[ProcessGroup, ...]:
        """The expert group, or in its place those of it inside this machine, then one of each machine."""
        if self.links is None:
            return (self.expert_group,)
        return self.links.get_group("inside"), self.links.get_group("across")

    @property
    def data_group(self) -> ProcessGroup:
        """Those that hold the same experts as this process."""
        return self.grid.get_group("data")

    @property
    def world_group(self) -> ProcessGroup:
        """All."""
        return self.world.get_group()


def check_mesh(size: int, expert_size: int) -> None:
    """Raises UserError when ``size`` processes cannot form groups of ``expert_size``."""
    if expert_size < 1 or size % expert_size:
        raise UserError(
            f"{size} processes cannot form expert groups of {expert_size}: take an expert size of "
            f"{_listed(divisors(size))}, or a multiple of {max(1, expert_size)} processes"
        )


def check_levels(expert_size: int, node_size: int) -> None:
    """Raises UserError when an expert group has no two levels of links: it must fill several machines."""
    if not 1 < node_size < expert_size or expert_size % node_size:
        raise UserError(
            f"two levels need expert groups that fill several machines of several processes each: "
            f"an expert size of {expert_size} and a node size of {node_size} do not make them"
        )


def check_experts(num_experts: int, expert_size: int, where: str, uneven: bool) -> None:
    """Raises UserError when the experts of a bank cannot be dealt out, evenly unless ``uneven``."""
    if uneven and num_experts < expert_size:
        raise UserError(f"{where}: {num_experts} experts are too few for {expert_size} processes: take fewer")
    if num_experts % expert_size and not uneven:
        raise UserError(
            f"{where}: {num_experts} experts cannot be spread evenly over {expert_size} processes: take an expert size "
            f"of {_listed(divisors(num_experts))}, or a multiple of {expert_size} experts, or add --uneven"
        )


def divisors(number: int) -> list[int]:
    """Ascending."""
    return [part for part in range(1, number + 1) if number % part == 0]


def _listed(numbers: list[int]) -> str:
    return " or ".join(filter(None, [", ".join(map(str, numbers[:-1])), str(numbers[-1])]))
