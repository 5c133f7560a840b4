"""Plays a step on a cluster, all processes at once: when each of them does what, and how long it waits.

A process has two lanes, one that computes and one that sends, or a single one where the two do not go together. In
each, operations run in their order, each when what it needs has ended. A collective begins when the last of its group
is there, and ends for all of it alike. Times are [D or 1, P] float64: where all data groups do the same, one stands for
all, so thousands of processes cost no more.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moeforge.parallel.plan.amounts import Message, Work
from moeforge.parallel.plan.cluster import Cluster
from moeforge.parallel.plan.job import Arrangement
from moeforge.parallel.plan.step import Operation, Part


@dataclass(frozen=True)
class Event:
    """One operation on all processes, in seconds from the start of its part."""

    operation: Operation
    start: Tensor
    """[D or 1, P]"""
    end: Tensor
    """[D or 1, P]"""


@dataclass(frozen=True)
class Played:
    """A part, played once."""

    part: Part
    events: list[Event]

    @property
    def seconds(self) -> float:
        """Until the last process is done."""
        return max((float(event.end.max()) for event in self.events), default=0.0)


def play(parts: list[Part], arrangement: Arrangement, cluster: Cluster) -> list[Played]:
    """Every part, once."""
    return [Played(part, _play(part, arrangement, cluster)) for part in parts]


def step_seconds(played: list[Played]) -> float:
    """Of one optimizer step."""
    return sum(each.part.times * each.seconds for each in played)


def busy_seconds(played: list[Played]) -> tuple[float, float]:
    """Of one step, of the process that has most: (computing, sending or waiting for others to send)."""
    lanes = []
    for kind in (Work, Message):
        spent = [
            each.part.times * (event.end - event.start)
            for each in played
            for event in each.events
            if isinstance(event.operation.does, kind)
        ]
        lanes.append(float(sum(spent, torch.zeros(1, 1)).max()))
    return lanes[0], lanes[1]


def _play(part: Part, arrangement: Arrangement, cluster: Cluster) -> list[Event]:
    events: list[Event] = []
    free = [torch.zeros(1, 1, dtype=torch.float64)] * 2
    for operation in part.operations:
        lane = int(cluster.overlap and isinstance(operation.does, Message))
        ready = free[lane]
        for place in operation.after:
            ready = torch.maximum(ready, events[place].end)
        if isinstance(operation.does, Work):
            start, took = ready, work_seconds(operation.does, cluster)
            end = start + took
        else:
            # Waiting for the others is no sending: it shows as a gap.
            start = _together(ready, operation.does.axis)
            end = start + message_seconds(operation.does, arrangement, cluster)
        start, end = torch.broadcast_tensors(start, end)
        events.append(Event(operation, start, end))
        free[lane] = end
    return events


def _together(ready_DP: Tensor, axis: str) -> Tensor:
    """When the last of each group is there."""
    if axis == "world":
        return ready_DP.amax().view(1, 1)
    return ready_DP.amax(1 if axis == "expert" else 0, keepdim=True)


def work_seconds(work: Work, cluster: Cluster) -> Tensor:
    """[D or 1, P or 1]: the roofline."""
    multiplied = (work.flops + cluster.half_width * work.strips) / cluster.flops
    busy = torch.maximum(multiplied, work.traffic / cluster.bandwidth)
    return work.kernels * cluster.overhead + busy


def message_seconds(message: Message, arrangement: Arrangement, cluster: Cluster) -> Tensor:
    """[D or 1, 1] for groups along ``expert``, else [1, 1]: latencies and bytes, of the slowest of the group."""
    count = arrangement.group(message.axis)
    if count == 1:
        return torch.zeros(1, 1, dtype=torch.float64)
    near = neighbours(arrangement, message.axis, cluster)
    inside = cluster.inside.line(message.kind)
    between = cluster.between.line(message.kind) if cluster.between and near < count else None
    if message.kind == "all_to_all":
        return _exchange_seconds(message, near, (inside, between))
    steps = (count - 1) * (2 if message.kind == "all_reduce" else 1)
    latency, bandwidth = inside.latency, inside.bandwidth
    if between is not None:
        # As many rings as a node has members share its links to others.
        latency, bandwidth = between.latency, min(bandwidth, near * between.bandwidth)
    return (message.calls * steps * latency + message.sent / bandwidth).view(1, 1)


def _exchange_seconds(message: Message, near: int, lines: tuple) -> Tensor:
    """Near and far at the same time; the slower of sending and receiving, of the busiest process."""
    count = message.sent.shape[-1]
    node_P = torch.arange(count) // near
    same_PP = node_P[:, None] == node_P
    took = []
    for line, some_PP, peers in zip(lines, (same_PP, ~same_PP), (min(near, count) - 1, count - near), strict=True):
        if line is not None:
            sent_DPP = message.sent * some_PP
            most_D = torch.maximum(sent_DPP.sum(2).amax(1), sent_DPP.sum(1).amax(1))
            took.append(message.calls * max(0, peers) * line.latency + most_D / line.bandwidth)
    return torch.stack(took).amax(0)[:, None]


def neighbours(arrangement: Arrangement, axis: str, cluster: Cluster) -> int:
    """How many of a group are on the node of its first process; neighbouring ranks share an expert group."""
    node = cluster.devices_per_node
    apart = arrangement.expert if axis == "data" else 1
    return min(arrangement.group(axis), max(1, -(-node // apart)))
