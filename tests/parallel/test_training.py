"""Training steps on two and four processes equal those of one: losses, norms, every updated parameter, every load."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch.distributed.tensor import DTensor

from moeforge.config import Tree, build
from moeforge.data.packing import Batch
from moeforge.errors import UserError
from moeforge.models import Decoder, ModelConfig
from moeforge.parallel.layout import Layout
from moeforge.parallel.mesh import Mesh
from moeforge.parallel.piece import Piece
from moeforge.parallel.ranks import ALONE
from moeforge.parallel.together import Together
from moeforge.train.config import AdamW
from moeforge.train.optimizer import build_optimizer
from moeforge.train.step import accumulate_gradients, apply_gradients

pytestmark = pytest.mark.dist
LENGTH, VOCABULARY, STEPS = 6, 17, 2
LOSSES = [{"type": "load_balancing_loss", "weight": 0.5}, {"type": "z_loss", "weight": 0.1}]
MLP = {"num_experts": 4, "d_expert": 8}
LOW_RANK = {"type": "low_rank", "num_experts": 4, "d_expert": 8, "rank": 3}


def shaped(experts: object = MLP, num_repeats: int = 1, shortcut: bool = False, **router: object) -> Tree:
    """A dense layer, then one with experts."""
    parts = {"select": {"k": 2}, "losses": LOSSES, "controller": "expert_bias"} | router
    return {
        "vocab_size": VOCABULARY,
        "d_model": 8,
        "num_layers": 2,
        "num_heads": 2,
        "d_ff": 8,
        "first_dense_layers": 1,
        "num_repeats": num_repeats,
        "init": {"type": "normal", "std": 0.3},
        "moe": {"experts": experts, "shared": {"d_expert": 4}, "shortcut": shortcut, "router": parts},
    }


SIX = "six experts"
OF_THE_GATE = "a loss of the gate's weight"
ONE_OWNER = "all tokens to one expert"
MODELS: dict[str, Tree] = {
    "plain": shaped(),
    "two banks, any number of experts": shaped([MLP, LOW_RANK, {"type": "copy"}], select={"type": "top_p", "p": 0.6}),
    ONE_OWNER: shaped(gate="hash", select={"k": 1}, losses=[], controller=None),
    "capacity": shaped(capacity=[{"type": "capacity", "capacity_factor": 0.7}]),
    "shortcut": shaped(shortcut=True),
    "vectors for experts": shaped(select={"type": "auxiliary", "k": 3}),
    SIX: shaped(MLP | {"num_experts": 6}),
    OF_THE_GATE: shaped(losses=[{"type": "embedding_loss", "weight": 0.5}]),
    "per sequence, repeated": shaped(
        num_repeats=2, losses=[{"type": "load_balancing_loss", "over": "sequence"}], controller="overflow"
    ),
}
BATCHES = ([4], [7, 2], [1])
"""Rows of the micro-batches of a step: even, uneven, and fewer than there are processes."""
FEW = [(2, 2, False), (4, 2, False), (4, 4, False), (4, 2, True)]
MESHES = [(2, 1, False), (4, 1, False), *FEW, (2, 1, True), (2, 2, True), (4, 4, True)]
"""Processes, those that share experts, whether FSDP cuts the rest."""


def batches(rows: list[int], step: int, name: str = "plain") -> list[Batch]:
    random, below = torch.Generator().manual_seed(step), 1 if name == ONE_OWNER else VOCABULARY
    return [made(torch.randint(0, below, (size, LENGTH + 1), generator=random)) for size in rows]


def made(ids: torch.Tensor) -> Batch:
    position = torch.arange(LENGTH).expand(len(ids), -1)
    document = torch.zeros(len(ids), LENGTH, dtype=torch.int32)
    return Batch(ids[:, :-1], ids[:, 1:], document, position, torch.zeros_like(position), len(ids))


def decoder(name: str, dtype: torch.dtype) -> Decoder:
    torch.manual_seed(0)
    return Decoder(build(ModelConfig, MODELS[name])).to(dtype)


EPS = 1e-4
"""Of the optimizer: next to none would make a step of lr of the rounding of a gradient that is nearly zero."""


def trained(model: Decoder, ranks, given: list[list[Batch]], recompute: bool = False):
    """Everything a few steps leave behind: losses and loads of each, then gradients of the last, and the weights."""
    model.recompute_activations = recompute
    ranks.place(model)
    optimizer = build_optimizer(model, AdamW(lr=0.05, clip=0.2, eps=EPS))
    steps = []
    for step, parts in enumerate(given):
        result = accumulate_gradients(model, parts, torch.float32, step, ranks)
        apply_gradients(model, optimizer, result, 0.2, step, ranks)
        ranks.settle(step + 1, result.tokens_per_expert, optimizer)
        loads = {name: load.tolist() for name, load in result.tokens_per_expert.items()}
        steps.append((dict(result.losses), result.grad_norm, loads, dict(result.dropped), dict(result.rows)))
    moments = {
        f"{kind}/{name}": ranks.whole(name, value) if value.ndim else value
        for name, p in ranks.parameters(model).items()
        for kind, value in optimizer.state[p].items()
    }
    state = model.state_dict()
    weights = {name: ranks.whole(name, ranks.parameters(model).get(name, state[name])) for name in state}
    return steps, {name: gathered(tensor) for name, tensor in (moments | weights).items()}


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor | Piece) else tensor).detach().clone()


PLACED = "layer_01: [3, [0, 2, 3], [2, 1], [3, 0, 1, 2], 0, 2]"
"""On four processes; on each, experts out of order and some that others have too."""


def together(name: str, rows: list[int], layout: Layout, dtype: torch.dtype, recompute: bool):
    node_size = layout.node_size if layout.two_level else None
    ranks = Together(Mesh.build(dist.get_world_size(), layout.ep, "cpu", node_size, layout.tp), layout)
    return trained(decoder(name, dtype), ranks, [batches(rows, step, name) for step in range(STEPS)], recompute)


def alone(name: str, rows: list[int], size: int, dtype: torch.dtype):
    """One process; a capacity counts over what a process routes at once, so it gets the same pieces one by one."""
    given = [batches(rows, step, name) for step in range(STEPS)]
    if name == "capacity":
        given = [[part for batch in parts for part in cut(batch, size)] for parts in given]
    return trained(decoder(name, dtype), ALONE, given)


def cut(batch: Batch, size: int) -> list[Batch]:
    names = ("input_ids", "labels", "document", "position", "domain")
    pieces = [getattr(batch, name).tensor_split(size) for name in names]
    whole = [replace(batch, **dict(zip(names, piece, strict=True))) for piece in zip(*pieces, strict=True)]
    return [piece for piece in whole if len(piece.input_ids)]


def same(actual, expected, dtype: torch.dtype) -> None:
    tolerance = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    for (losses, norm, *counts), (their_losses, their_norm, *their_counts) in zip(actual[0], expected[0], strict=True):
        assert losses == pytest.approx(their_losses, rel=max(tolerance["rtol"], 1e-6))
        assert norm == pytest.approx(their_norm, rel=tolerance["rtol"])
        assert counts == their_counts
    assert actual[1].keys() == expected[1].keys()
    for name, tensor in expected[1].items():
        torch.testing.assert_close(actual[1][name], tensor, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


CASES = [("plain", rows, *mesh) for rows in BATCHES for mesh in (MESHES if rows == [7, 2] else FEW)]
CASES += [
    (name, [7, 2], *mesh)
    for name in MODELS
    if name not in ("plain", SIX, OF_THE_GATE)
    for mesh in MESHES
    if mesh in FEW
]


@pytest.mark.parametrize("name, rows, size, expert_size, shard", CASES, ids=str)
def test_many_processes_are_as_one(processes, name, rows, size, expert_size, shard):
    expected = alone(name, rows, size, torch.float64)
    for actual in processes(size).run(together, name, rows, Layout(expert_size, shard), torch.float64, False):
        same(actual, expected, torch.float64)


OPTIONS = {
    "two levels": Layout(ep=4, node_size=2, two_level=True),
    "chunks": Layout(ep=2, chunks=3),
    "chunks, cut": Layout(ep=2, shard=True, chunks=2),
    "weights travel": Layout(ep=4, fetch=True),
    "weights travel, cut": Layout(ep=2, shard=True, fetch=True),
    "by index": Layout(ep=4, by_index=True),
    "by index, cut": Layout(ep=2, shard=True, by_index=True),
    "offloaded": Layout(ep=4, shard=True, offload=True),
    "offloaded, slices": Layout(ep=2, shard=True, offload=True, tp=2),
    "all": Layout(ep=4, shard=True, node_size=2, two_level=True, chunks=2),
}


@pytest.mark.parametrize(
    "name, recompute",
    [("plain", False), ("two banks, any number of experts", True), ("shortcut", False), ("shortcut", True)],
)
@pytest.mark.parametrize("layout", OPTIONS.values(), ids=OPTIONS)
def test_every_option_gives_the_same(processes, layout, name, recompute):
    expected = alone(name, [7, 2], 4, torch.float64)
    for actual in processes(4).run(together, name, [7, 2], layout, torch.float64, recompute):
        same(actual, expected, torch.float64)


def written(layout: Layout, folder: Path) -> Layout:
    """With its placement, which is a text, in a file."""
    if not layout.placement:
        return layout
    file = folder / "placement.yaml"
    file.write_text(layout.placement, encoding="utf-8")
    return replace(layout, placement=str(file))


UNEVEN = {
    "uneven": Layout(ep=4, uneven=True),
    "uneven, two levels, chunks": Layout(ep=4, uneven=True, node_size=2, two_level=True, chunks=2),
    "placed": Layout(ep=4, placement=PLACED),
    "placed, two levels, chunks": Layout(ep=4, placement=PLACED, node_size=2, two_level=True, chunks=2),
    "weights travel": Layout(ep=4, placement=PLACED, fetch=True),
    "placed, two groups": Layout(ep=2, placement="layer_01: [1, [0, 1], 1, 0, [1, 0], 0]"),
    "placed, two groups, cut": Layout(ep=2, shard=True, placement="layer_01: [1, [0, 1], 1, 0, [1, 0], 0]"),
}


@pytest.mark.parametrize("layout", UNEVEN.values(), ids=UNEVEN)
def test_experts_may_be_wherever_one_likes(processes, tmp_path, layout):
    layout = written(layout, tmp_path)
    expected = alone(SIX, [7, 2], 4, torch.float64)
    for actual in processes(4).run(together, SIX, [7, 2], layout, torch.float64, False):
        same(actual, expected, torch.float64)


@pytest.mark.parametrize("name, recompute", [("plain", True), (OF_THE_GATE, True), (OF_THE_GATE, False)])
@pytest.mark.parametrize("size, expert_size, shard", [(4, 2, False), (4, 2, True)])
def test_in_single_precision_and_with_activations_made_again(processes, name, size, expert_size, shard, recompute):
    expected = alone(name, [5], size, torch.float32)
    for actual in processes(size).run(together, name, [5], Layout(expert_size, shard), torch.float32, recompute):
        same(actual, expected, torch.float32)


def broken(expert_size: int) -> str:
    ranks = Together(Mesh.build(dist.get_world_size(), expert_size, "cpu"), Layout(expert_size))
    model = decoder("plain", torch.float64)
    ranks.place(model)
    if not ranks.first:
        model.blocks[1].moe.banks[0].down_proj.data.fill_(torch.nan)
    with pytest.raises(UserError) as raised:
        accumulate_gradients(model, batches([1], 0), torch.float32, 3, ranks)
    return str(raised.value)


def test_a_loss_that_is_not_finite_ends_all_processes_with_the_layers_name(processes):
    for told in processes(2).run(broken, 2):
        assert told == "step 4: the loss is nan; first non-finite output: blocks.1.moe.banks.0"
