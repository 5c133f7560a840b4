"""Matrices cut across give the losses, gradients, weights and loads of whole ones; every byte is where docs say."""

from typing import Any

import pytest
import torch
from torch import distributed as dist

from moeforge.config import Tree, build
from moeforge.models import Decoder, ModelConfig
from moeforge.parallel.layout import Layout
from moeforge.parallel.mesh import Mesh
from moeforge.parallel.ranks import ALONE
from moeforge.parallel.together import Together
from tests.parallel.test_bytes import BYTES, EXPERTS, LOSSES, WIDTH, cut, one_step, ring
from tests.parallel.test_training import LENGTH, LOW_RANK, MLP, MODELS, batches, same, shaped, trained, written
from tests.parallel.test_training import cut as cut_rows

pytestmark = pytest.mark.dist
GROUPED: dict[str, Any] = {"num_heads": 4, "head_dim": 4, "num_kv_heads": 2, "qk_norm": True}
HEADS = {"type": "all", "qkv_bias": True, "o_bias": True, "sinks": True, "clip": 2.0}
LATENT = {
    **{"type": "latent", "q_lora_rank": 6, "kv_lora_rank": 4, "bias": True},
    **{"qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 4},
}
SHAPES: dict[str, Tree] = {
    "plain": MODELS["plain"],
    "capacity": MODELS["capacity"],
    "all tokens to one expert": MODELS["all tokens to one expert"],
    "any number of experts": shaped([MLP, LOW_RANK, {"type": "neurons", "num_experts": 4}], select={"type": "top_p"}),
    "grouped heads, biases": shaped() | GROUPED | {"attention": HEADS, "mlp_bias": True},
    "latent heads": shaped() | {"attention": LATENT},
    "rows in halves": {**MODELS["plain"], "moe": {**MODELS["plain"]["moe"], "heads": 2}},
    "plain experts": shaped(MLP | {"activation": "relu"}),
    "experts with biases": shaped(MLP | {"bias": True, "clamp": {"limit": 0.1}}),
}
PLACED = "layer_01: [1, [0, 1], 1, 0]"
LAYOUTS = {
    "slices": Layout(tp=2),
    "slices of experts elsewhere": Layout(2, tp=2),
    "in chunks": Layout(2, tp=2, chunks=3),
    "weights travel": Layout(2, tp=2, fetch=True),
    "by index": Layout(2, tp=2, by_index=True),
    "replicas": Layout(2, tp=2, placement=PLACED),
    "cut, all experts here": Layout(tp=2, shard=True),
    "cut, experts elsewhere": Layout(2, tp=2, shard=True),
    "cut, replicas": Layout(2, tp=2, shard=True, placement=PLACED),
    "cut, weights travel": Layout(2, tp=2, shard=True, fetch=True),
}


def sliced(name: str, rows: list[int], layout: Layout, dtype: torch.dtype, recompute: bool):
    node_size = layout.node_size if layout.two_level else None
    ranks = Together(Mesh.build(dist.get_world_size(), layout.ep, "cpu", node_size, layout.tp), layout)
    return trained(decoder(name, dtype), ranks, [batches(rows, step, name) for step in (0, 1)], recompute)


def whole(name: str, rows: list[int], dtype: torch.dtype):
    given = [batches(rows, step, name) for step in (0, 1)]
    if name == "capacity":  # of what a process routes at once
        given = [[part for batch in parts for part in cut_rows(batch, 4)] for parts in given]
    return trained(decoder(name, dtype), ALONE, given)


def decoder(name: str, dtype: torch.dtype) -> Decoder:
    torch.manual_seed(0)
    return Decoder(build(ModelConfig, SHAPES[name])).to(dtype)


DOUBLE, SINGLE = torch.float64, torch.float32
CASES = [(name, [7, 2], Layout(ep, tp=2), DOUBLE, False) for name in SHAPES for ep in (1, 2)]
CASES += [("plain", [3], layout, DOUBLE, True) for layout in LAYOUTS.values()]
CASES += [("grouped heads, biases", [1], Layout(2, tp=2), DOUBLE, True), ("plain", [5], Layout(2, tp=2), SINGLE, False)]
CASES += [("any number of experts", [7, 2], Layout(ep, tp=2, shard=True), DOUBLE, False) for ep in (1, 2)]
CASES += [("experts with biases", [3], Layout(2, tp=2, fetch=True), DOUBLE, True)]


@pytest.mark.parametrize("name, rows, layout, dtype, recompute", CASES, ids=str)
def test_slices_together_are_the_whole(processes, tmp_path, name, rows, layout, dtype, recompute):
    expected = whole(name, rows, dtype)
    for actual in processes(4).run(sliced, name, rows, written(layout, tmp_path), dtype, recompute):
        same(actual, expected, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True])
def test_slices_and_two_levels_of_links(processes, shard):
    """Two machines of two tensor groups of two processes."""
    layout, expected = Layout(4, shard, node_size=4, two_level=True, tp=2), whole("plain", [9, 3], DOUBLE)
    for actual in processes(8).run(sliced, "plain", [9, 3], layout, DOUBLE, False):
        same(actual, expected, DOUBLE)


def expected_bytes(rows: list[int], ep: int, tp: int, shard: bool, recompute: bool) -> dict[str, int]:
    """On four processes. Attention twice, a dense MLP and a shared one; one bank."""
    model, size, others = decoder("plain", DOUBLE), 4, tp - 1
    tokens, counting, again = sum(rows) * LENGTH, int(len(rows) > 1), int(recompute)
    forward, edges, away = 1 + counting, 0, 0
    for batch in batches(rows, 0):
        for rank, ids in enumerate(batch.input_ids.tensor_split(size)):
            counts = model(ids).routings[1].route.counts.view(ep, -1).sum(1)
            edges, away = edges + int(counts.sum()), away + int(counts.sum() - counts[rank // tp % ep])
    arriving, own = (edges, EXPERTS // ep) if ep > 1 else (tokens, EXPERTS)  # rows of an exchange are edges
    row = WIDTH * BYTES
    met = forward * (8 * size * len(rows) + 16 * tokens)
    told = (forward + again) * (8 * size * (1 + own) * len(rows) + (8 + BYTES) * edges)
    sent = {
        "all_to_all": (forward + again + 1) * away * (2 * row + BYTES),
        "all_reduce": ring(size, 8 * EXPERTS) + ring(size, 4, len(rows)) + ring(size, 8),
        "all_gather": others * (met + told + (4 * tokens + arriving) * row * (forward + again + 1)),
        "reduce_scatter": others * ((4 * tokens + arriving) * row * (forward + 1) + BYTES * edges),
    }
    # Of what is made again, a sum that comes last is not.
    sent["reduce_scatter"] += others * again * row * (arriving + (tokens if ep > 1 else 0))
    if ep > 1:
        sent["all_to_all"] += (forward + again) * 8 * size * (ep - 1) * EXPERTS // ep * len(rows)
    sent["all_reduce"] += ring(size, 8 * (LOSSES + 1 + EXPERTS))
    parts = {kind: [] for kind in ("all", "slice", "expert slice")}
    for name, parameter in model.named_parameters():
        kind, shape = "all", [*parameter.shape]
        if "_proj" in name or "banks" in name:
            kind, dim = "slice", "banks" in name
            shape[dim + ("down_proj" in name or "o_proj" in name)] //= tp
        if "banks" in name and ep > 1:
            kind, shape[0] = "expert slice", shape[0] // ep
        parts[kind].append((name, torch.empty(shape)))
    if shard:
        add_shards(sent, parts, size // tp, tp, len(rows), counting)
        return sent
    for held, holders in zip(parts.values(), (size, size // tp, size // tp // ep), strict=True):
        if holders > 1 and held:
            values = sum(1 + part.numel() for _, part in held)
            sent["all_reduce"] += size // holders * ring(holders, values * BYTES)
    return sent


def add_shards(sent: dict[str, int], parts: dict, group: int, tp: int, batches: int, counting: int) -> None:
    """FSDP in each group of those with the same slices; what nobody slices is then summed over tensor groups."""
    for unit, times in (("blocks.0", 2 + counting), ("blocks.1", 2 + counting), ("", 1)):
        names = unit or ("embedding", "norm")
        held = [part for name, part in parts["all"] + parts["slice"] if name.startswith(names)]
        sent["all_gather"] += tp * cut(held, group) * batches * times
        sent["reduce_scatter"] += tp * cut(held, group) * batches
    for rank in range(group):
        values = sum(1 + part.chunk(group)[rank].numel() for _, part in parts["all"])
        sent["all_reduce"] += ring(tp, values * BYTES)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("rows", [[7], [5, 2]], ids=str)
@pytest.mark.parametrize("ep, shard", [(1, False), (2, False), (1, True), (2, True)])
def test_a_step_sends_what_the_formula_says(processes, ep, shard, rows, recompute):
    wanted = expected_bytes(rows, ep, 2, shard, recompute)
    for sent in processes(4).run(one_step, rows, Layout(ep, shard, tp=2), recompute):
        assert sent == wanted
