"""What is computed while rows are on their way, in both directions; and the choice of how many chunks."""

import pytest
import torch
from torch import distributed as dist

from moeforge.parallel.chunks import CANDIDATES, TRIES, Chunks
from moeforge.parallel.layout import Layout
from moeforge.parallel.mesh import Mesh
from moeforge.parallel.together import Together
from moeforge.parallel.wire import Flight
from moeforge.train.config import AdamW
from moeforge.train.optimizer import build_optimizer
from moeforge.train.step import accumulate_gradients, apply_gradients
from tests.parallel.test_training import batches, decoder

pytestmark = pytest.mark.dist
STEPS = len(CANDIDATES) * TRIES + 1


class Log(list[str]):
    """Rows depart and land, modules run and get their gradients: in order."""

    def watch(self, module: torch.nn.Module, name: str) -> None:
        module.register_forward_hook(lambda *_: self.append(name))
        module.register_full_backward_hook(lambda *_: self.append(f"gradient of {name}"))

    def fly(self, patch: pytest.MonkeyPatch) -> None:
        begin, landed = Flight.begin, Flight.landed
        patch.setattr(Flight, "begin", lambda flight, *given: (self.append("depart"), begin(flight, *given))[1])
        patch.setattr(Flight, "landed", lambda flight: (self.append("land"), landed(flight))[1])


def logged(name: str, layout: Layout) -> list[str]:
    ranks, model, log = Together(Mesh.build(dist.get_world_size(), layout.ep, "cpu"), layout), None, Log()
    model = decoder(name, torch.float64)
    ranks.place(model)
    block = model.blocks[1]
    log.watch(block.attention, "attention")
    log.watch(block.moe.shared.mlp, "shared")
    with pytest.MonkeyPatch.context() as patch:
        log.fly(patch)
        accumulate_gradients(model, batches([4], 0), torch.float32, 0, ranks)
    return log


def in_the_air(log: list[str], name: str) -> int:
    """Flights under way when something was done."""
    before = log[: log.index(name)]
    return before.count("depart") - before.count("land")


@pytest.mark.parametrize("name, layout, attention", [("plain", Layout(2), 0), ("shortcut", Layout(2), 2)])
def test_rows_travel_while_the_shared_branch_is_computed_and_with_a_shortcut_attention(
    processes, name, layout, attention
):
    for log in processes(2).run(logged, name, layout):
        assert in_the_air(log, "shared") == 2
        assert in_the_air(log, "attention") == attention
        assert in_the_air(log, "gradient of shared") == 2
        assert in_the_air(log, "gradient of attention") == attention
        assert log.count("depart") == log.count("land") == 6


def test_a_chunk_travels_while_another_is_computed(processes):
    for log in processes(2).run(logged, "plain", Layout(2, chunks=3)):
        flights = [event for event in log if event in ("depart", "land")]
        there, again = ["depart"] * 2, ["land"] * 2
        forward = [*there, *there, *again, "depart", *there, *again, "depart", *again, "depart", *["land"] * 3]
        assert flights[:18] == forward
        assert flights[18:21] == ["depart"] * 3, "all gradients leave at once; each is used as it comes"
        assert log.count("depart") == log.count("land") == 18


def chosen() -> tuple[list[int], list[float]]:
    ranks = Together(Mesh.build(dist.get_world_size(), 2, "cpu"), Layout(2, chunks=0))
    model = decoder("plain", torch.float64)
    ranks.place(model)
    optimizer, used, losses = build_optimizer(model, AdamW()), [], []
    for step in range(STEPS):
        ranks.begin(0, step)
        used.append(ranks.chunks.now)
        result = accumulate_gradients(model, batches([4], step), torch.float32, step, ranks)
        apply_gradients(model, optimizer, result, 1.0, step, ranks)
        ranks.sent()
        losses.append(result.losses["lm"])
    return used, losses


def test_all_processes_try_each_number_of_chunks_and_keep_the_same(processes):
    (used, losses), *others = processes(2).run(chosen)
    assert used[:-1] == [number for number in CANDIDATES for _ in range(TRIES)]
    assert used[-1] in CANDIDATES and all(theirs == (used, losses) for theirs in others)


def test_the_fastest_for_the_slowest_stays(processes):
    assert processes(2).run(slow_on_one) == [2, 2]


def slow_on_one() -> int:
    """4 is fastest on the first process, 2 on the second, which takes longer."""
    chunks, second = Chunks(0), dist.get_rank()
    chunks.seconds = {1: [9.0] * TRIES, 2: [3.0] * TRIES, 4: [8.0 if second else 1.0] * (TRIES - 1)}
    chunks.now = 4
    chunks.started = -1e9 if second else 0.0
    chunks.end(dist.group.WORLD, "cpu")
    return chunks.now
