"""The planned step sends, byte for byte, what real processes count, and holds what they hold."""

import pytest
import torch
from torch import distributed as dist
from torch.distributed.tensor import DTensor

from moeforge.parallel.layout import Layout
from moeforge.parallel.mesh import Mesh
from moeforge.parallel.plan.job import Arrangement, Job, Weights
from moeforge.parallel.plan.step import bytes_sent, step_of
from moeforge.parallel.together import Together
from moeforge.train.config import AdamW
from moeforge.train.optimizer import build_optimizer
from moeforge.train.step import accumulate_gradients, apply_gradients
from tests.parallel.test_training import LENGTH, batches, decoder, written

PLACED = "layer_01: [1, 0, 1, 1]"
MESHES = [
    (2, Layout(2)),
    (4, Layout(2, chunks=3)),
    (4, Layout(4)),
    (4, Layout(shard=True)),
    (4, Layout(2, shard=True)),
    (4, Layout(2, tp=2)),
]
MORE = [
    (4, Layout(4, node_size=2, two_level=True, chunks=2)),
    (4, Layout(4, by_index=True)),
    (4, Layout(2, tp=2, chunks=2)),
    (4, Layout(tp=2, shard=True)),
    (4, Layout(2, tp=2, shard=True, by_index=True)),
    (4, Layout(2, shard=True, placement=PLACED)),
    (4, Layout(2, tp=2, placement=PLACED)),
    (4, Layout(4, shard=True, offload=True)),
    (4, Layout(tp=2, shard=True, offload=True)),
]
STEPS = [
    ("plain", [4, 4], False),
    ("two banks, any number of experts", [7], True),
    ("per sequence, repeated", [4, 4], True),
]


def real_step(name: str, rows: list[int], layout: Layout, recompute: bool) -> tuple[dict[str, int], int]:
    """Bytes by kind of one step, and bytes of weights on this process."""
    node_size = layout.node_size if layout.two_level else None
    ranks = Together(Mesh.build(dist.get_world_size(), layout.ep, "cpu", node_size, layout.tp), layout)
    model = decoder(name, torch.float64)
    model.recompute_activations = recompute
    ranks.place(model)
    ranks.begin(0, 0)
    result = accumulate_gradients(model, batches(rows, 0, name), torch.float32, 0, ranks)
    apply_gradients(model, build_optimizer(model, AdamW()), result, 1.0, 0, ranks)
    held = [p.to_local() if isinstance(p, DTensor) else p for p in ranks.parameters(model).values()]
    sent = {kind: size for kind, size in ranks.sent().items() if not kind.startswith("far")}
    return sent, sum(p.nbytes for p in held)


def job(name: str, rows: list[int], size: int) -> Job:
    """With the loads that the model really has, each process' own; the mean over micro-batches."""
    model, loads = decoder(name, torch.float64), {}
    for batch in batches(rows, 0, name):
        for rank, ids in enumerate(batch.input_ids.tensor_split(size)):
            for depth, routing in model(ids).routings.items():
                into = loads.setdefault(depth, torch.zeros(size, routing.route.num_experts, dtype=torch.float64))
                into[rank] += routing.route.counts / len(rows)
    return Job(model.config, rows[0], LENGTH, len(rows), half=False, dtype=torch.float64, loads=loads)


def arranged(size: int, layout: Layout, recompute: bool) -> Arrangement:
    """As a planner has it."""
    way = "fetch" if layout.fetch else "by_index" if layout.by_index else "exchange"
    node = layout.node_size if layout.two_level else None
    meshed = (layout.ep, layout.shard, recompute, layout.chunks, layout.tp)
    return Arrangement(size, *meshed, way, node, layout.uneven, layout.placement, layout.offload)


CASES = [(*step, *mesh) for step in STEPS for mesh in (*MESHES, *MORE) if step == STEPS[0] or mesh in MESHES]
# Of one micro-batch: of several, a mean does not say which experts are needed.
CASES += [(*STEPS[1], 4, Layout(2, tp=tp, fetch=True)) for tp in (1, 2)]
CASES += [(*STEPS[1], 4, Layout(2, True, tp=2, by_index=True)), (*STEPS[1], 4, Layout(2, tp=2, chunks=2))]


@pytest.mark.dist
@pytest.mark.parametrize("name, rows, recompute, size, layout", CASES, ids=str)
def test_bytes_are_those_that_real_processes_count(processes, tmp_path, name, rows, recompute, size, layout):
    layout = written(layout, tmp_path)
    arrangement = arranged(size, layout, recompute)
    planned = job(name, rows, size)
    wanted = bytes_sent(step_of(planned, arrangement), arrangement)
    found = processes(size).run(real_step, name, rows, arrangement.layout, recompute)
    assert [sent for sent, _ in found] == [wanted] * size
    assert max(held for _, held in found) == Weights.of(planned, arrangement).size(arrangement)


def test_a_large_models_bytes_are_exact_too():
    model = decoder("plain", torch.float32).config.replace(vocab_size=10_007, d_model=512)
    planned = Job(model, 4, LENGTH, half=False)
    parameters = list(planned.decoder.parameters())
    size = 4 * (sum(p.numel() for p in parameters) + len(parameters))
    assert 4 << 20 < size < 64 << 20  # one bucket, of more bytes than a float32 counts one by one
    sent = bytes_sent(step_of(planned, Arrangement(4)), Arrangement(4))["all_reduce"]
    rest = [8 * 4, 4, 8, 8 * (3 + 1 + 4)]  # loads, finite, norm, losses and loads
    assert sent == sum(2 * 4 * 3 * -(-each // 4) for each in (size, *rest))
