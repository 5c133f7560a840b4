"""The mesh for a job on a cluster: all that can be, the fastest of those that fit."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product

from moeforge.errors import UserError
from moeforge.parallel.mesh import divisors
from moeforge.parallel.plan.cluster import Cluster
from moeforge.parallel.plan.job import Arrangement, Job
from moeforge.parallel.plan.memory import Memory, memory_of
from moeforge.parallel.plan.simulate import Played, play, step_seconds
from moeforge.parallel.plan.step import Part, step_of

CHUNKS = (1, 2, 4)
"""Parts of an exchange that are tried, where devices compute while they send."""
MOST_NODES = 1 << 14
"""Where the search for a cluster that is large enough ends."""


@dataclass(frozen=True)
class Candidate:
    """A mesh, and what it comes to."""

    arrangement: Arrangement
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
    chunks: tuple[int, ...] = (1,)
    """Parts of an exchange that are tried."""
    like: Arrangement = field(default_factory=partial(Arrangement, 1))
    """All else that a mesh is told; ``node`` is any number, where rows go by two levels of links."""


def candidate(job: Job, arrangement: Arrangement, cluster: Cluster) -> Candidate:
    """One mesh."""
    parts = step_of(job, arrangement)
    return Candidate(arrangement, memory_of(job, arrangement), parts, play(parts, arrangement, cluster))


def arrangements(job: Job, cluster: Cluster, wanted: Wanted) -> Iterator[Arrangement]:
    """All meshes. Raises UserError for one that is wanted and cannot be, and where none can."""
    size, like, found, refused = cluster.size, wanted.like, 0, None
    if like.offload and cluster.host is None:
        raise UserError(f"--offload: {cluster.name} says nothing of the way to the host: give it `host: 25 GB/s`, say")
    like = replace(like, size=size, node=None if like.node is None else cluster.devices_per_node)
    experts = [wanted.expert] if wanted.expert else divisors(size // like.tensor)
    if replace(like, tensor=1, offload=False) != Arrangement(size):  # about experts on several processes
        experts = experts[1:] or experts
    sharded = (False, True) if wanted.shard is None and size > like.tensor else (bool(wanted.shard),)
    for expert, shard in product(experts, sharded):
        asked = len(wanted.chunks) == 1 and (wanted.expert is not None or like.way != "exchange")
        chunks = wanted.chunks if asked or (expert > 1 and like.way == "exchange") else (1,)
        for recompute in (False, True) if wanted.recompute is None else (wanted.recompute,):
            for parts in chunks:
                tried = replace(like, expert=expert, shard=shard, recompute=recompute, chunks=parts)
                try:
                    tried.layout.check(size)
                    tried.layout.check_model(job.model)
                except UserError as error:
                    refused = refused or error
                    continue
                found += 1
                yield tried
    if refused is not None and not found:
        raise refused


def search(job: Job, cluster: Cluster, wanted: Wanted) -> list[Candidate]:
    """Those that fit, the fastest first. Raises UserError when none does, and says on how many nodes one would."""
    fitting = [
        arrangement
        for arrangement in arrangements(job, cluster, wanted)
        if memory_of(job, arrangement).total <= cluster.memory
    ]
    if not fitting:
        raise UserError(_too_large(job, cluster, wanted))
    return sorted((candidate(job, arrangement, cluster) for arrangement in fitting), key=lambda each: each.seconds)


def _smallest(job: Job, cluster: Cluster, wanted: Wanted) -> tuple[int, Arrangement]:
    return min(
        (
            (memory_of(job, arrangement).total, arrangement)
            for arrangement in arrangements(job, cluster, replace(wanted, chunks=(1,)))
        ),
        key=lambda found: found[0],
    )


def _too_large(job: Job, cluster: Cluster, wanted: Wanted) -> str:
    least, arrangement = _smallest(job, cluster, wanted)
    has, most = _gigabytes(cluster.memory), memory_of(job, arrangement)
    said = (
        f"the model fits on no mesh of {cluster.size} devices with {has} each: the smallest needs {_gigabytes(least)} "
        f"({describe(arrangement)}: {_gigabytes(most.total - most.activations)} of weights and what belongs to them, "
        f"{_gigabytes(most.activations)} of activations)"
    )
    nodes = cluster.nodes
    while nodes < MOST_NODES:
        nodes *= 2
        needed, arrangement = _smallest(job, cluster.replace(nodes=nodes), wanted)
        if needed <= cluster.memory:
            low, high = nodes // 2, nodes
            while high - low > 1:
                middle = (low + high) // 2
                tried = _smallest(job, cluster.replace(nodes=middle), wanted)
                if tried[0] <= cluster.memory:
                    high, arrangement = middle, tried[1]
                else:
                    low = middle
            return f"{said}. It would fit on {high} nodes of {cluster.devices_per_node} ({describe(arrangement)})"
    return f"{said}. More nodes do not help: take fewer or shorter sequences at a time, or devices with more memory"


def describe(arrangement: Arrangement) -> str:
    """``data 4 x expert 2, sharded``."""
    marks = [f"data {arrangement.data} x expert {arrangement.expert}"]
    marks[0] += f" x tensor {arrangement.tensor}" * (arrangement.tensor > 1)
    marks += ["offloaded" if arrangement.offload else "sharded"] * arrangement.shard
    marks += ["activations made again"] * arrangement.recompute
    marks += [f"{arrangement.chunks} chunks"] * (arrangement.chunks > 1)
    marks += ["two levels"] * (arrangement.node is not None) + [arrangement.way] * (arrangement.way != "exchange")
    return ", ".join(marks)


def _gigabytes(number: float) -> str:
    return f"{number / 1e9:,.3g} GB"
