"""Measures the machine that these processes run on, all of them at work at the same time, and writes a cluster file.

Single operations show the most: FLOP/s of a large matrix product, memory bandwidth of a sum of vectors, the cost of a
kernel in a chain of tiny ones. What a device reaches in training is then fitted to steps of small decoders. Of every
kind of collective, latency and bandwidth are fitted to several sizes.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from torch import Tensor
from torch.distributed import ProcessGroup

from moeforge.parallel.plan.amounts import Work
from moeforge.parallel.plan.cluster import Cluster, Line, Link
from moeforge.parallel.plan.job import Arrangement, Job
from moeforge.parallel.plan.step import Part, step_of
from moeforge.parallel.together import Together

SIZES = tuple(1 << power for power in range(10, 23, 2))
"""Bytes that a process sends in a collective: 1 KiB to 4 MiB."""
ROUNDS = 9
VECTOR = 2 << 20
"""Numbers in the vectors of the memory's test: 8 MiB, more than a core's own cache."""
WIDTH = 2048
"""Of the square matrices that are multiplied."""
CHAIN = 200
"""Kernels of the chain."""
# Before torch 2.13 these had other names.
ALL_GATHER = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def profile(ranks: Together, path: Path, dtype: torch.dtype, measured: list[tuple[Job, float]]) -> None:
    """Collective, of two processes or more.

    ``measured`` are seconds of steps that every process did by itself; the first one writes ``path``.
    """
    device, local = torch.device(ranks.mesh.world.device_type), int(os.environ["LOCAL_WORLD_SIZE"])
    limits = _flops(ranks, device, dtype), _bandwidth(ranks, device), _overhead(ranks, device)
    (flops, bandwidth, overhead, half_width), error = fit_device(measured, limits)
    nodes = ranks.size // local
    near = _link(ranks, device, [range(first, first + local) for first in range(0, ranks.size, local)])
    far = _link(ranks, device, [range(first, ranks.size, local) for first in range(local)])
    found = Cluster(
        name=f"{nodes} x {local} {device.type}",
        nodes=nodes,
        devices_per_node=local,
        memory=_memory(device) / (local if device.type == "cpu" else 1),
        flops=flops,
        half_width=half_width,
        bandwidth=bandwidth,
        overhead=overhead,
        overlap=device.type != "cpu",  # there, who sends computes less
        inside=near or far,  # type: ignore[arg-type]
        between=far,
        source=f"moeforge plan --profile: {len(measured)} steps in {dtype}, fitted within {error:.0%}",
    )
    if ranks.first:
        text = yaml.safe_dump(found.model_dump(mode="json", exclude_none=True), sort_keys=False)
        path.write_text(text, encoding="utf-8")


def fit_device(
    measured: list[tuple[Job, float]], limits: tuple[float, float, float]
) -> tuple[tuple[float, ...], float]:
    """(FLOP/s, bytes/s, seconds per kernel, half width) with which steps take nearest to what they took; how far off.

    ``limits`` are what single operations showed: no step is computed faster.
    """
    alone = Arrangement(1)
    table = [(_rows(step_of(job, alone)), took) for job, took in measured]

    def wrong(device: tuple[float, ...]) -> float:
        flops, bandwidth, overhead, half_width = device
        ratios = []
        for (flops_N, strips_N, traffic_N, kernels_N), took in table:
            busy_N = torch.maximum((flops_N + half_width * strips_N) / flops, traffic_N / bandwidth)
            ratios.append((busy_N + overhead * kernels_N).sum() / took)
        return float(torch.stack(ratios).log().square().mean().sqrt())

    best: tuple[float, ...] = (*limits, 32.0)
    stride = 2.0
    while stride > 1.01:
        tries = [
            tuple(value * factor if place == moved else value for place, value in enumerate(best))
            for moved in range(4)
            for factor in (stride, 1 / stride)
        ]
        allowed = [t for t in tries if t[0] <= limits[0] and t[1] <= limits[1] and t[2] >= limits[2]]
        nearest = min([best, *allowed], key=wrong)
        if nearest == best:
            stride **= 0.5
        best = nearest
    return best, wrong(best)


def _rows(parts: list[Part]) -> Tensor:
    """[4, operations] of a process that is alone: FLOPs, strips, bytes, kernels; what comes often is many columns."""
    works = [(o.does, part.times) for part in parts for o in part.operations if isinstance(o.does, Work)]
    columns = [
        (float(w.flops.sum()), float(w.strips.sum()), float(w.traffic.sum()), w.kernels)
        for w, times in works
        for _ in range(times)
    ]
    return torch.tensor(columns, dtype=torch.float64).T


def _link(ranks: Together, device: torch.device, groups: list[range]) -> Link | None:
    """Of each kind of collective in groups of these ranks, all at once; None where a group is one rank."""
    if len(groups[0]) == 1:
        return None
    own, _ = dist.new_subgroups_by_enumeration([list(group) for group in groups])
    assert isinstance(own, ProcessGroup)
    kinds = {kind: _line(ranks, device, own, kind) for kind in COLLECTIVES}
    lines = list(kinds.values())
    latency, bandwidth = max(line.latency for line in lines), min(line.bandwidth for line in lines)
    return Link(latency=latency, bandwidth=bandwidth, kinds=kinds)  # type: ignore[arg-type]


def _line(ranks: Together, device: torch.device, group: ProcessGroup, kind: str) -> Line:
    """Times of several sizes, as latency times messages plus bytes over bandwidth."""
    count, rows = group.size(), []
    prepare, messages = COLLECTIVES[kind]
    for size in SIZES:
        each = max(1, size // 4 // max(1, count - 1))
        run, sent = prepare(each, count, device, group)
        rows.append((messages * (count - 1), sent, _seconds(ranks, device, run, 1)))
    latency, per_byte = fit(rows)
    return Line(latency=latency, bandwidth=1 / per_byte)


def fit(rows: list[tuple[int, int, float]]) -> tuple[float, float]:
    """(messages, bytes, seconds) -> seconds per message and per byte, positive: least squares of relative errors."""
    table = torch.tensor([[count, size] for count, size, _ in rows], dtype=torch.float64)
    seconds = torch.tensor([took for *_, took in rows], dtype=torch.float64)
    scaled = table / seconds[:, None]
    both = torch.linalg.lstsq(scaled, torch.ones(len(rows), 1, dtype=torch.float64)).solution.flatten()
    latency, per_byte = both.tolist()
    alone = [float(column.sum() / column.square().sum()) for column in scaled.T]
    if latency <= 0:
        latency, per_byte = 1e-12, alone[1]
    if per_byte <= 0:
        latency, per_byte = alone[0], 1e-15
    return latency, per_byte


def _exchange(each: int, count: int, device: torch.device, group: ProcessGroup) -> tuple[Callable[[], object], int]:
    rows, into = torch.zeros(each * count, device=device), torch.zeros(each * count, device=device)
    return lambda: dist.all_to_all_single(into, rows, group=group), 4 * each * (count - 1)


def _reduce(each: int, count: int, device: torch.device, group: ProcessGroup) -> tuple[Callable[[], object], int]:
    rows = torch.zeros(each * count, device=device)
    return lambda: dist.all_reduce(rows, group=group), 2 * 4 * each * (count - 1)


def _gather(each: int, count: int, device: torch.device, group: ProcessGroup) -> tuple[Callable[[], object], int]:
    rows, into = torch.zeros(each, device=device), torch.zeros(each * count, device=device)
    return lambda: ALL_GATHER(into, rows, group=group), 4 * each * (count - 1)


def _scatter(each: int, count: int, device: torch.device, group: ProcessGroup) -> tuple[Callable[[], object], int]:
    rows, into = torch.zeros(each * count, device=device), torch.zeros(each, device=device)
    return lambda: REDUCE_SCATTER(into, rows, group=group), 4 * each * (count - 1)


COLLECTIVES: dict[str, tuple[Callable[..., Any], int]] = {
    "all_to_all": (_exchange, 1),
    "all_reduce": (_reduce, 2),
    "all_gather": (_gather, 1),
    "reduce_scatter": (_scatter, 1),
}
"""How each is run, and how often a process sends to each other one."""


def _seconds(ranks: Together, device: torch.device, run: Callable[[], object], calls: int) -> float:
    """Of one call: the median over rounds, of the slowest process."""
    took = []
    for number in range(ROUNDS + 2):
        dist.barrier()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if number > 1:
            took.append((time.perf_counter() - start) / calls)
    return max(ranks.gather(sorted(took)[len(took) // 2]))


def _flops(ranks: Together, device: torch.device, dtype: torch.dtype) -> float:
    one, two = (torch.ones(WIDTH, WIDTH, device=device, dtype=dtype) for _ in range(2))
    return 2 * WIDTH**3 / _seconds(ranks, device, lambda: one @ two, 1)


def _bandwidth(ranks: Together, device: torch.device) -> float:
    one, two, into = (torch.ones(VECTOR, device=device) for _ in range(3))
    return 3 * one.nbytes / _seconds(ranks, device, lambda: torch.add(one, two, out=into), 4)


def _overhead(ranks: Together, device: torch.device) -> float:
    """A kernel forward starts two on the way back."""
    weight: Tensor = torch.ones(1, 8, device=device, requires_grad=True)

    def run() -> None:
        x = weight
        for _ in range(CHAIN):
            x = x * weight
        x.sum().backward()

    return _seconds(ranks, device, run, 1) / (3 * CHAIN)


def _memory(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
