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

    @classmethod
    def build(cls, size: int, expert_size: int, device: str) -> "Mesh":
        """Collective: every process calls it alike. Raises UserError where ``check_mesh`` does."""
        check_mesh(size, expert_size)
        ranks = torch.arange(size)
        grid = DeviceMesh(device, ranks.view(-1, expert_size).T, mesh_dim_names=("expert", "data"))
        return cls(grid, DeviceMesh(device, ranks, mesh_dim_names=("world",)))

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


def check_experts(num_experts: int, expert_size: int, where: str) -> None:
    """Raises UserError when the experts of a bank cannot be dealt out evenly."""
    if num_experts % expert_size:
        fitting = divisors(num_experts)
        raise UserError(
            f"{where}: {num_experts} experts cannot be spread evenly over {expert_size} processes: take an expert size "
            f"of {_listed(fitting)}, or a multiple of {expert_size} experts"
        )


def divisors(number: int) -> list[int]:
    """Ascending."""
    return [part for part in range(1, number + 1) if number % part == 0]


def _listed(numbers: list[int]) -> str:
    return " or ".join(filter(None, [", ".join(map(str, numbers[:-1])), str(numbers[-1])]))
