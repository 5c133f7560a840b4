"""Who works with whom: the processes as a grid, one axis for slices of matrices, one for experts, one for the data.

Every process trains on rows of its own. Those of one ``tensor`` group hold slices of the same matrices and give each
other all of their rows; those of one ``expert`` group hold all experts between them and exchange rows; those of one
``data`` group hold the same of all. Neighbouring ranks share a tensor group, neighbouring tensor groups an expert
group, so that the most traffic stays inside a machine.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from moeforge.errors import UserError


@dataclass(frozen=True)
class Mesh:
    """One process' view of the grid: ``size`` is the product of its axes."""

    grid: DeviceMesh
    """[tensor, expert, data]"""
    world: DeviceMesh
    """[all]"""
    same_slice: DeviceMesh
    """[data x expert]: who holds the same slice of what only the tensor axis cuts."""
    same_experts: DeviceMesh
    """[tensor x data]: who holds the same experts, where the tensor axis does not cut them."""
    links: DeviceMesh | None = None
    """[data, across machines, inside]: the expert axis in two; None where all links count as one."""

    @classmethod
    def build(
        cls, size: int, expert_size: int, device: str, node_size: int | None = None, tensor_size: int = 1
    ) -> "Mesh":
        """With a ``node_size``, machines of so many processes. Collective: every process calls it alike.

        Raises UserError where ``check_mesh`` and ``check_levels`` do.
        """
        check_mesh(size, expert_size, tensor_size)

        def mesh(ranks: Tensor, *names: str) -> DeviceMesh:
            return DeviceMesh(device, ranks, mesh_dim_names=names)

        ranks_TED = torch.arange(size).view(-1, expert_size, tensor_size).permute(2, 1, 0)
        grid, world, links = mesh(ranks_TED, "tensor", "expert", "data"), mesh(torch.arange(size), "world"), None
        same_slice, same_experts = world, grid["data"]
        if tensor_size > 1:
            # Ascending, as groups are: FSDP goes by the places in a group, DTensor by those in a mesh.
            same_slice = mesh(ranks_TED.mT.flatten(1), "tensor", "same")["same"]
            same_experts = mesh(ranks_TED.transpose(0, 1).flatten(1), "expert", "same")["same"]
        if node_size is not None:
            check_levels(expert_size, node_size, tensor_size)
            inside = node_size // tensor_size
            by_machine = ranks_TED.mT.unflatten(2, (expert_size // inside, inside))
            links = mesh(by_machine, "tensor", "data", "across", "inside")["data", "across", "inside"]
        return cls(grid, world, same_slice, same_experts, links)

    @property
    def size(self) -> int:
        """Processes."""
        return self.world.size()

    @property
    def expert_size(self) -> int:
        """Processes that share the experts."""
        return self.grid.size(1)

    @property
    def tensor_size(self) -> int:
        """Processes that hold slices of the same matrices."""
        return self.grid.size(0)

    @property
    def rank(self) -> int:
        """This process' number."""
        return self.world.get_rank()

    @property
    def tensor_group(self) -> ProcessGroup:
        """Those that hold the other slices of this process' matrices."""
        return self.grid.get_group("tensor")

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

    def holders(self, dealt: bool, cut: bool) -> DeviceMesh:
        """Those that hold the same as this process of what is dealt out by experts, or cut by the tensor axis."""
        if dealt:
            return self.grid["data"] if cut else self.same_experts
        return self.same_slice if cut else self.world

    @property
    def world_group(self) -> ProcessGroup:
        """All."""
        return self.world.get_group()


def check_mesh(size: int, expert_size: int, tensor_size: int = 1) -> None:
    """Raises UserError when ``size`` processes cannot form expert groups of so many tensor groups of that size."""
    if tensor_size < 1 or size % tensor_size:
        raise UserError(
            f"{size} processes cannot form tensor groups of {tensor_size}: take a tensor size of "
            f"{_listed(divisors(size))}, or a multiple of {max(1, tensor_size)} processes"
        )
    groups = size // tensor_size
    if expert_size < 1 or groups % expert_size:
        what = f"tensor groups of {tensor_size}" if tensor_size > 1 else "processes"
        raise UserError(
            f"{groups} {what} cannot form expert groups of {expert_size}: "
            f"take an expert size of {_listed(divisors(groups))}, or a multiple of {max(1, expert_size) * tensor_size} "
            "processes"
        )


def check_levels(expert_size: int, node_size: int, tensor_size: int = 1) -> None:
    """Raises UserError when an expert group has no two levels of links: it must fill several machines."""
    inside = node_size // tensor_size
    if node_size % tensor_size or not 1 < inside < expert_size or expert_size % inside:
        who = f"tensor groups of {tensor_size}" if tensor_size > 1 else "processes"
        raise UserError(
            f"two levels need expert groups that fill several machines of several {who} each: "
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
