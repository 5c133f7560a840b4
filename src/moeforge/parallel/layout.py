"""What a user says about how processes share the work: no settings of a run, for its results are the same."""

import os
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from moeforge.errors import UserError

if TYPE_CHECKING:
    from moeforge.models import ModelConfig


@dataclass(frozen=True)
class Layout:
    """Options of ``moeforge train``, by their names there."""

    ep: int = 1
    """Processes that share the experts between them."""
    shard: bool = False
    """FSDP cuts what would else be on several processes."""
    node_size: int | None = None
    """Processes of one machine; None: as the launcher says."""
    two_level: bool = False
    """Rows go to other machines by a neighbour."""
    chunks: int = 1
    """Parts in which tokens are exchanged, so that one travels while another is computed; 0: what proves fastest."""
    uneven: bool = False
    """Experts may be dealt out in shares that differ by one."""
    placement: str | None = None
    """File that says which process of an expert group holds which experts."""
    fetch: bool = False
    """Weights of the experts that are needed travel, not rows."""
    tp: int = 1
    """Processes that hold slices of the same matrices."""
    by_index: bool = False
    """Rows go to all who share the experts; each picks those of its own."""
    rebalance: int = 0
    """Steps after which experts move to where they share the rows of these steps best; 0: never."""
    offload: bool = False
    """What FSDP has cut, its gradients and the optimizer's state are in the host's memory, and so is the update."""

    def check(self, size: int) -> None:
        """Raises UserError when ``size`` processes cannot be laid out so, or an option would do nothing."""
        from moeforge.parallel.mesh import check_levels, check_mesh

        check_mesh(size, self.ep, self.tp)
        if self.shard and size == 1:
            raise UserError("--shard does nothing with one process: leave it out, or start more")
        if self.node_size is not None and (self.node_size < 1 or size % self.node_size):
            raise UserError(f"--node-size: {size} processes do not fill machines of {self.node_size}")
        for flag in self.flags if self.ep == 1 else ():
            if flag.startswith(("--chunks", "--uneven", "--placement", "--fetch", "--by-index", "--rebalance")):
                raise UserError(f"{flag.partition('=')[0]} is about experts on several processes: add --ep")
        if self.fetch and (self.two_level or self.chunks != 1):
            raise UserError("--fetch sends no rows: leave --two-level and --chunks out")
        if self.by_index and (self.fetch or self.two_level or self.chunks != 1):
            raise UserError("--by-index gathers all rows at once: leave --fetch, --two-level and --chunks out")
        if self.shard and size == self.tp:
            raise UserError("--shard does nothing where one tensor group is all: leave it out, or take a smaller --tp")
        if self.offload and not self.shard:
            raise UserError("--offload is about what FSDP has cut: add --shard")
        if self.two_level:
            check_levels(self.ep, self.processes_per_node(size), self.tp)

    def check_device(self, kind: str) -> None:
        """Raises UserError when an option would do nothing on devices of this kind."""
        if self.offload and kind == "cpu":
            raise UserError("--offload: the model is on the CPU already: leave it out")

    def check_model(self, config: "ModelConfig") -> None:
        """Raises UserError when the model cannot be laid out so."""
        from moeforge.parallel.sharding import dealt
        from moeforge.parallel.slices import check_slices

        placements = dealt(config, self)
        for name, placement in placements.items() if self.rebalance else ():
            if len({*placement.sizes}) > 1:
                raise UserError(
                    f"--rebalance: {name} has more experts on one process than on another: give all as many"
                )
        check_slices(config, self.tp)

    def processes_per_node(self, size: int) -> int:
        """Processes on each machine, as given or as torchrun says."""
        return self.node_size or int(os.environ.get("LOCAL_WORLD_SIZE", size))

    @property
    def flags(self) -> list[str]:
        """As on the command line."""
        told = []
        for option in fields(self):
            value, name = getattr(self, option.name), "--" + option.name.replace("_", "-")
            if value != option.default:
                told.append(name if value is True else f"{name}={value}")
        return told
