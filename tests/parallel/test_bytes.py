"""Every byte of a training step is where the formulas of docs/parallel.md say."""

from math import ceil

import pytest
import torch
from torch import distributed as dist

from moeforge.parallel.layout import Layout
from moeforge.parallel.mesh import Mesh
from moeforge.parallel.together import Together
from moeforge.train.config import AdamW
from moeforge.train.optimizer import build_optimizer
from moeforge.train.step import accumulate_gradients, apply_gradients
from tests.parallel.test_training import batches, decoder, written

pytestmark = pytest.mark.dist
WIDTH, EXPERTS, LOSSES, BYTES = 8, 4, 3, 8


def one_step(rows: list[int], layout: Layout, recompute: bool) -> dict[str, int]:
    ranks = Together(Mesh.build(dist.get_world_size(), layout.ep, "cpu", None, layout.tp), layout)
    model = decoder("plain", torch.float64)
    model.recompute_activations = recompute
    ranks.place(model)
    ranks.begin(0, 0)
    result = accumulate_gradients(model, batches(rows, 0), torch.float32, 0, ranks)
    apply_gradients(model, build_optimizer(model, AdamW()), result, 1.0, 0, ranks)
    return ranks.sent()


def ring(group: int, size: int, times: int = 1) -> int:
    """An all-reduce of ``size`` bytes in a group, all processes together."""
    return times * 2 * group * (group - 1) * ceil(size / group)


def cut(parameters: list[torch.Tensor], group: int) -> int:
    """An all-gather or a reduce-scatter of these parameters in a group, all processes together."""
    shards = sum(ceil(len(p) / group) * p[0].numel() for p in parameters)
    return group * (group - 1) * shards * BYTES


def edges_away(rows: list[int], size: int, expert_size: int) -> int:
    """Edges to experts of another process."""
    model, away = decoder("plain", torch.float64), 0
    for batch in batches(rows, 0):
        for rank, ids in enumerate(batch.input_ids.tensor_split(size)):
            counts = model(ids).routings[1].route.counts.view(expert_size, -1).sum(1)
            away += int(counts.sum() - counts[rank % expert_size])
    return away


def expected(rows: list[int], size: int, expert_size: int, shard: bool, recompute: bool) -> dict[str, int]:
    model = decoder("plain", torch.float64)
    dealt = list(model.blocks[1].moe.banks.parameters()) if expert_size > 1 else []
    own = [torch.empty(len(p) // expert_size, *p.shape[1:]) for p in dealt]
    blocks = [[p for p in block.parameters() if not any(p is other for other in dealt)] for block in model.blocks]
    root = [p for name, p in model.named_parameters() if not name.startswith("blocks")]
    data, dense = size // expert_size, [p for part in (*blocks, root) for p in part]
    away, counting, again = edges_away(rows, size, expert_size), int(len(rows) > 1), int(recompute)
    passes = 1 + counting + again
    edge = (2 * WIDTH + 1) * BYTES
    counts = 8 * size * (expert_size - 1) * EXPERTS // expert_size * len(rows) * passes
    sent = {"all_to_all": counts + away * edge * (passes + 1) if expert_size > 1 else 0}
    sent["all_reduce"] = ring(size, 8 * EXPERTS) + ring(size, 4, len(rows)) + ring(size, 8)
    sent["all_reduce"] += ring(size, 8 * (LOSSES + 1 + EXPERTS))
    sent |= {"all_gather": 0, "reduce_scatter": 0}
    for group, parameters in ((size, dense), (data, own)):
        if group > 1 and parameters and not shard:
            numbers = sum(p.numel() for p in parameters) + len(parameters)
            sent["all_reduce"] += ring(group, numbers * BYTES) * size // group
    if shard:
        for unit in blocks:
            sent["all_gather"] += cut(unit, size) * len(rows) * (2 + counting)
        sent["all_gather"] += cut(root, size) * len(rows)
        sent["reduce_scatter"] += cut(dense, size) * len(rows)
        if data > 1 and own:
            sent["all_gather"] += cut(own, data) * size // data * len(rows) * (2 + counting)
            sent["reduce_scatter"] += cut(own, data) * size // data * len(rows)
    return sent


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("rows", [[7], [5, 2]], ids=str)
@pytest.mark.parametrize(
    "size, expert_size, shard", [(2, 2, False), (4, 1, False), (4, 2, False), (4, 4, False), (4, 1, True), (4, 2, True)]
)
def test_a_step_sends_what_the_formula_says(processes, size, expert_size, shard, rows, recompute):
    wanted = expected(rows, size, expert_size, shard, recompute)
    for sent in processes(size).run(one_step, rows, Layout(expert_size, shard), recompute):
        assert sent == wanted


@pytest.mark.parametrize("layout", [Layout(4, placement="layer_01: [[0, 1], 1, [2, 0, 3], 3]")])
def test_replicas_cost_one_all_reduce_of_each_weight(processes, tmp_path, layout):
    plain, *_ = processes(4).run(one_step, [7], Layout(4), False)
    stacks = decoder("plain", torch.float64).blocks[1].moe.banks.parameters()
    wanted = sum(ring(4, (1 + 2 * stack[0].numel()) * BYTES) for stack in stacks)
    for sent in processes(4).run(one_step, [7], written(layout, tmp_path), False):
        assert sent["all_reduce"] - plain["all_reduce"] == wanted
