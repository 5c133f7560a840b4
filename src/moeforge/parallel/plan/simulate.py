"""Plays a step on a cluster, all processes at once: when each of them does what, and how long it waits.

A process has two lanes, one that computes and one that sends, or a single one where the two do not go together. In
each, operations run in their order, each when what it needs has ended. A collective begins when the last of its group
is there, and ends for all of it alike. Times are [D or 1, P] float64: where all data groups do the same, one stands for
all, so thousands of processes cost no more.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moeforge.parallel.plan.amounts import Work
from moeforge.parallel.plan.cluster import Cluster
from moeforge.parallel.plan.job import Arrangement
from moeforge.parallel.plan.messages import Message
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
            start = arrangement.latest(ready, operation.does.axis)
            end = start + message_seconds(operation.does, arrangement, cluster)
        start, end = torch.broadcast_tensors(start, end)
        events.append(Event(operation, start, end))
        free[lane] = end
    return events


def work_seconds(work: Work, cluster: Cluster) -> Tensor:
    """[D or 1, P or 1]: the roofline."""
    multiplied = (work.flops + cluster.half_width * work.strips) / cluster.flops
    busy = torch.maximum(multiplied, work.traffic / cluster.bandwidth)
    return work.kernels * cluster.overhead + busy + (work.hosted / cluster.host if cluster.host else 0)


def message_seconds(message: Message, arrangement: Arrangement, cluster: Cluster) -> Tensor:
    """[D or 1, Q or 1]: latencies and bytes, of the slowest of the group."""
    count = arrangement.group(message.axis)
    if count == 1:
        return torch.zeros(1, 1, dtype=torch.float64)
    near = neighbours(arrangement, message.axis, cluster)
    inside = cluster.inside.line(message.kind)
    between = cluster.between.line(message.kind) if cluster.between and near < count else None
    if message.kind == "all_to_all":
        return _exchange_seconds(message, near, (inside, between), arrangement)
    steps = (count - 1) * (2 if message.kind == "all_reduce" else 1)
    latency, bandwidth = inside.latency, inside.bandwidth
    if between is not None:
        # As many rings as a node has members share its links to others.
        latency, bandwidth = between.latency, min(bandwidth, near * between.bandwidth)
    most = message.sent.view(1, 1) if message.sent.ndim == 0 else arrangement.latest(message.sent, message.axis)
    return message.calls * steps * latency + most / bandwidth


def _exchange_seconds(message: Message, near: int, lines: tuple, arrangement: Arrangement) -> Tensor:
    """Near and far at the same time; the slower of sending and receiving, of the busiest process."""
    count, team = arrangement.group(message.axis), message.sent.shape[-1]
    node_Q = torch.arange(team) // (near * STRIDES[message.axis](arrangement))
    same_QQ = node_Q[:, None] == node_Q
    took = []
    for line, some_QQ, peers in zip(lines, (same_QQ, ~same_QQ), (near - 1, count - near), strict=True):
        if line is not None:
            sent_DQQ = message.sent * some_QQ
            most_DQ = arrangement.latest(torch.maximum(sent_DQQ.sum(2), sent_DQQ.sum(1)), message.axis)
            took.append(message.calls * max(0, peers) * line.latency + most_DQ / line.bandwidth)
    return torch.stack(took).amax(0)


STRIDES = {
    "world": lambda _: 1,
    "tensor": lambda _: 1,
    "expert": lambda arrangement: arrangement.tensor,
    "inside": lambda arrangement: arrangement.tensor,
    "across": lambda arrangement: arrangement.tensor * arrangement.inside,
    "slice": lambda arrangement: arrangement.tensor,
    "data": lambda arrangement: arrangement.team,
}
"""How far apart neighbours in a group along an axis are."""


def neighbours(arrangement: Arrangement, axis: str, cluster: Cluster) -> int:
    """How many of a group are on the node of its first process."""
    node, tensor = cluster.devices_per_node, arrangement.tensor
    if axis == "same":  # the tensor group, and those of other teams in its place
        whole, rest = divmod(min(node, arrangement.size), arrangement.team)
        return max(1, whole * tensor + min(tensor, rest))
    return min(arrangement.group(axis), max(1, -(-node // STRIDES[axis](arrangement))))
