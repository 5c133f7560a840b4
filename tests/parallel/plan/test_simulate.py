"""The players of a step against one that takes process by process and looks at the clock of each."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeforge.config import build
from moeforge.models import ModelConfig
from moeforge.parallel.plan.amounts import Work
from moeforge.parallel.plan.cluster import Cluster, Link
from moeforge.parallel.plan.job import Arrangement, Job, skewed
from moeforge.parallel.plan.messages import Message
from moeforge.parallel.plan.simulate import (
    busy_seconds,
    message_seconds,
    neighbours,
    play,
    step_seconds,
    work_seconds,
)
from moeforge.parallel.plan.step import Operation, Part, step_of

MODEL = {
    "vocab_size": 64,
    "d_model": 32,
    "num_layers": 3,
    "d_ff": 64,
    "first_dense_layers": 1,
    "moe": {"experts": {"num_experts": 8, "d_expert": 32}, "router": {"select": {"k": 2}}, "shared": {"d_expert": 32}},
}
CLUSTER = Cluster(
    nodes=2,
    devices_per_node=4,
    memory=1e9,
    flops=1e9,
    bandwidth=1e9,
    overhead=1e-5,
    inside=Link(latency=1e-5, bandwidth=1e8),
    between=Link(latency=1e-4, bandwidth=1e7),
)


SLICED = [
    Arrangement(8, 2, tensor=2),
    Arrangement(8, 2, True, tensor=2, way="by_index"),
    Arrangement(8, 4, tensor=2, node=4),
    Arrangement(8, 4, node=2),
    Arrangement(8, 4, way="fetch"),
]


def model(**changes: object) -> ModelConfig:
    return build(ModelConfig, {**MODEL, **changes})


def group(rank: int, axis: str, arrangement: Arrangement) -> list[int]:
    """Ranks that a process meets."""
    tensor, inside = arrangement.tensor, arrangement.inside

    def where(rank: int) -> dict[str, int]:
        data, place = divmod(rank // tensor, arrangement.expert)
        return {"data": data, "machine": place // inside, "place": place % inside, "slice": rank % tensor}

    differ = {
        "tensor": ["slice"],
        "inside": ["place"],
        "across": ["machine"],
        "expert": ["machine", "place"],
        "data": ["data"],
        "same": ["data", "slice"],
        "slice": ["data", "machine", "place"],
        "world": ["data", "machine", "place", "slice"],
    }[axis]
    ours = where(rank)
    return [r for r in range(arrangement.size) if all(where(r)[key] == ours[key] for key in ours if key not in differ)]


def at(values: torch.Tensor, rank: int, arrangement: Arrangement) -> float:
    return float(values.expand(arrangement.data, arrangement.team).flatten()[rank])


def slow_play(part: Part, arrangement: Arrangement, cluster: Cluster) -> list[dict[int, float]]:
    """When each operation ends on each process."""
    ends: list[dict[int, float]] = []
    lanes = {(lane, rank): 0.0 for lane in (Work, Message) for rank in range(arrangement.size)}
    for operation in part.operations:
        lane = type(operation.does) if cluster.overlap else Work
        ready = {
            rank: max([lanes[lane, rank], *(ends[place][rank] for place in operation.after)])
            for rank in range(arrangement.size)
        }
        if isinstance(operation.does, Work):
            took = work_seconds(operation.does, cluster)
            ended = {rank: ready[rank] + at(took, rank, arrangement) for rank in ready}
        else:
            took = message_seconds(operation.does, arrangement, cluster)
            axis = operation.does.axis
            begin = {rank: max(ready[other] for other in group(rank, axis, arrangement)) for rank in ready}
            ended = {rank: begin[rank] + at(took, rank, arrangement) for rank in ready}
        ends.append(ended)
        lanes |= {(lane, rank): end for rank, end in ended.items()}
    return ends


@pytest.mark.parametrize("batch_size", [8, 11], ids=["all alike", "uneven rows"])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("like", [*(Arrangement(8, *each) for each in ((1,), (2, True), (4,), (8,))), *SLICED], ids=str)
def test_all_at_once_is_one_by_one(like, chunks, overlap, batch_size):
    arrangement = replace(like, chunks=chunks)
    loads = {2: skewed(8, 3.0)}
    job = Job(model(), batch_size, 16, accumulate=2, loads=loads)
    cluster = CLUSTER.replace(overlap=overlap)
    for played in play(step_of(job, arrangement), arrangement, cluster):
        wanted = slow_play(played.part, arrangement, cluster)
        for event, ends in zip(played.events, wanted, strict=True):
            assert [at(event.end, rank, arrangement) for rank in range(8)] == pytest.approx(list(ends.values()))


@given(
    sizes=st.lists(st.integers(0, 10**6), min_size=16, max_size=16),
    near=st.sampled_from([1, 2, 4]),
)
@settings(max_examples=50, deadline=None)
def test_an_exchange_takes_as_long_as_its_busiest_process(sizes, near):
    sent_PP = torch.tensor(sizes, dtype=torch.float64).view(4, 4) * (1 - torch.eye(4))
    cluster = CLUSTER.replace(nodes=4 // near, devices_per_node=near)
    took = float(message_seconds(Message("all_to_all", "expert", sent_PP[None]), Arrangement(4, 4), cluster))
    wanted = 0.0
    for line, far in ((cluster.inside, False), (cluster.between, True)):
        peers = [[q for q in range(4) if q != p and (q // near != p // near) == far] for p in range(4)]
        if peers[0]:
            most = max(
                max(sum(sent_PP[p, q] for q in peers[p]), sum(sent_PP[q, p] for q in peers[p])) for p in range(4)
            )
            wanted = max(wanted, len(peers[0]) * line.latency + float(most) / line.bandwidth)
    assert took == pytest.approx(wanted)


AXES = ["tensor", "expert", "inside", "across", "data", "slice", "same", "world"]


@pytest.mark.parametrize("arrangement", [*(Arrangement(8, expert) for expert in (1, 2, 4, 8)), *SLICED], ids=str)
@pytest.mark.parametrize("axis", AXES)
def test_neighbours_are_those_on_the_first_ones_node(axis, arrangement):
    members = group(0, axis, arrangement)
    assert neighbours(arrangement, axis, CLUSTER) == sum(rank // CLUSTER.devices_per_node == 0 for rank in members)


def test_a_ring_by_hand():
    sent = torch.tensor(2 * 7 * 1000.0)
    took = float(message_seconds(Message("all_reduce", "world", sent), Arrangement(8), CLUSTER))
    assert took == pytest.approx(14 * 1e-4 + 14000 / 4e7)


def test_pieces_hide_the_exchange_behind_experts():
    """By hand: two pieces of an exchange of 4 s each way and experts of 4 s; one lane sends, the other computes."""
    second = CLUSTER.replace(flops=1.0, overhead=0.0, nodes=1, devices_per_node=2, between=None)
    second = second.replace(inside={"latency": 1e-12, "bandwidth": 1.0})
    off, none = torch.tensor([[[0.0, 2.0], [2.0, 0.0]]]), torch.zeros(1, 1)
    send, work = Message("all_to_all", "expert", off), Work(torch.full((1, 1), 2.0), none, none, 0)
    names = [("out", send, ()), ("out", send, ()), ("experts", work, (0,)), ("experts", work, (1,))]
    names += [("back", send, (2,)), ("back", send, (3,))]
    (played,) = play([Part("layer", [Operation(*each) for each in names], 1)], Arrangement(2, 2), second)
    assert played.seconds == pytest.approx(8)  # 12 one after another


@pytest.mark.parametrize("chunks", [1, 2, 4])
def test_what_is_done_at_once_takes_less_time(chunks):
    job, free = Job(model(), 8, 64), CLUSTER.replace(overhead=0.0, inside={"latency": 1e-12, "bandwidth": 1e8})
    arrangement = Arrangement(8, 4, chunks=chunks)
    parts = step_of(job, arrangement)
    together, apart = (play(parts, arrangement, free.replace(overlap=overlap)) for overlap in (True, False))
    assert step_seconds(together) < step_seconds(apart)
    assert sum(busy_seconds(apart)) == pytest.approx(step_seconds(apart))


def test_imbalance_costs_time():
    seconds = []
    for imbalance in (1.0, 2.0, 4.0):
        job = Job(model(), 8, 64, loads={depth: skewed(8, imbalance) for depth in (1, 2)})
        seconds.append(step_seconds(play(step_of(job, Arrangement(8, 8)), Arrangement(8, 8), CLUSTER)))
    assert seconds == sorted(set(seconds))


def test_a_shortcut_hides_the_exchange_behind_attention():
    slow = CLUSTER.replace(inside={"latency": 1e-5, "bandwidth": 3e6})  # more than the shared branch alone hides
    arrangement, seconds = Arrangement(8, 4), []
    for shortcut in (False, True):
        moe = {**MODEL["moe"], "shortcut": shortcut}  # type: ignore[dict-item]
        job = Job(model(moe=moe), 8, 64)
        seconds.append(play(step_of(job, arrangement), arrangement, slow)[0].seconds)
    assert seconds[1] < 0.95 * seconds[0]


def test_thousands_of_processes_take_no_longer_than_one_group():
    arrangement = Arrangement(8192, 8)
    job, cluster = Job(model(), 8192, 16), CLUSTER.replace(nodes=2048)
    played = play(step_of(job, arrangement), arrangement, cluster)
    assert max(event.end.numel() for each in played for event in each.events) == 8
    computing, sending = busy_seconds(played)
    assert computing + sending == pytest.approx(step_seconds(played), rel=0.2)
