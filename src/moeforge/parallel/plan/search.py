"""The mesh for a job on a cluster: all that can be, the fastest of those that fit."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from moeforge.errors import UserError
from moeforge.parallel.mesh import check_mesh, divisors
from moeforge.parallel.plan.cluster import Cluster
from moeforge.parallel.plan.job import Job, Layout
from moeforge.parallel.plan.memory import Memory, memory_of
from moeforge.parallel.plan.simulate import Played, play, step_seconds
from moeforge.parallel.plan.step import Part, step_of
from moeforge.parallel.sharding import dealt

CHUNKS = (1, 2, 4, 8)
"""Pieces of an exchange that are tried, where it may run beside the experts."""
MOST_NODES = 1 << 14
"""Where the search for a cluster that is large enough ends."""


@dataclass(frozen=True)
class Candidate:
    """A mesh, and what it comes to."""

    layout: Layout
    memory: Memory
    parts: list[Part]
    played: list[Played]

    @property
    def seconds(self) -> float:
        """Of a step."""
        return step_seconds(self.played)


@dataclass(frozen=True)
class Wanted:
    """What was decided beforehand; None: to be searched for."""

    expert: int | None = None
    shard: bool | None = None
    recompute: bool | None = None
    overlap: bool = False
    """Whether an exchange may run beside other work."""
    chunks: int | None = None


def candidate(job: Job, layout: Layout, cluster: Cluster) -> Candidate:
    """One mesh."""
    parts = step_of(job, layout)
    return Candidate(layout, memory_of(job, layout), parts, play(parts, layout, cluster))


def layouts(job: Job, size: int, wanted: Wanted) -> Iterator[Layout]:
    """All meshes of ``size`` processes. Raises UserError for one that is wanted and cannot be."""
    if wanted.expert is not None:
        check_mesh(size, wanted.expert)
        dealt(job.model, wanted.expert)
    sizes = [wanted.expert] if wanted.expert else [p for p in divisors(size) if _deals(job, p)]
    for expert in sizes:
        for shard in (False, True) if wanted.shard is None else (wanted.shard,):
            for recompute in (False, True) if wanted.recompute is None else (wanted.recompute,):
                if shard and size == 1:
                    continue
                pieces = CHUNKS if wanted.chunks is None and expert > 1 else (wanted.chunks or 1,)
                for chunks in pieces if wanted.overlap else (0,):
                    yield Layout(size, expert, shard, recompute, chunks)


def search(job: Job, cluster: Cluster, wanted: Wanted) -> list[Candidate]:
    """Those that fit, the fastest first. Raises UserError when none does, and says on how many nodes one would."""
    fitting = [
        layout for layout in layouts(job, cluster.size, wanted) if memory_of(job, layout).total <= cluster.memory
    ]
    if not fitting:
        raise UserError(_too_large(job, cluster, wanted))
    return sorted((candidate(job, layout, cluster) for layout in fitting), key=lambda each: each.seconds)


def _deals(job: Job, expert: int) -> bool:
    try:
        dealt(job.model, expert)
    except UserError:
        return False
    return True


def _smallest(job: Job, size: int, wanted: Wanted) -> tuple[int, Layout]:
    return min(
        ((memory_of(job, layout).total, layout) for layout in layouts(job, size, replace(wanted, overlap=False))),
        key=lambda found: found[0],
    )


def _too_large(job: Job, cluster: Cluster, wanted: Wanted) -> str:
    least, layout = _smallest(job, cluster.size, wanted)
    has, most = _gigabytes(cluster.memory), memory_of(job, layout)
    said = (
        f"the model fits on no mesh of {cluster.size} devices with {has} each: the smallest needs {_gigabytes(least)} "
        f"({describe(layout)}: {_gigabytes(most.total - most.activations)} of weights and what belongs to them, "
        f"{_gigabytes(most.activations)} of activations)"
    )
    nodes = cluster.nodes
    while nodes < MOST_NODES:
        nodes *= 2
        needed, layout = _smallest(job, nodes * cluster.devices_per_node, wanted)
        if needed <= cluster.memory:
            low, high = nodes // 2, nodes
            while high - low > 1:
                middle = (low + high) // 2
                tried = _smallest(job, middle * cluster.devices_per_node, wanted)
                if tried[0] <= cluster.memory:
                    high, layout = middle, tried[1]
                else:
                    low = middle
            return f"{said}. It would fit on {high} nodes of {cluster.devices_per_node} ({describe(layout)})"
    return f"{said}. More nodes do not help: take fewer or shorter sequences at a time, or devices with more memory"


def describe(layout: Layout) -> str:
    """``data 4 x expert 2, sharded``."""
    marks = [f"data {layout.data} x expert {layout.expert}"]
    marks += ["sharded"] * layout.shard + ["activations made again"] * layout.recompute
    if layout.chunks:
        marks.append("exchange beside experts" + (f" in {layout.chunks} pieces" if layout.chunks > 1 else ""))
    return ", ".join(marks)


def _gigabytes(number: float) -> str:
    return f"{number / 1e9:,.3g} GB"
