"""Whole runs on several processes: losses and model are those of one, and any mesh goes on from any checkpoint."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import distributed as dist

from moeforge.config import build
from moeforge.data.prepare import prepare
from moeforge.errors import UserError
from moeforge.hub import load
from moeforge.hub.folder import read_tensors
from moeforge.parallel import store
from moeforge.parallel.layout import Layout
from moeforge.parallel.mesh import Mesh
from moeforge.parallel.ranks import ALONE
from moeforge.parallel.together import Together
from moeforge.train import Run, RunConfig, train
from moeforge.train.background import Background
from moeforge.train.checkpoint import checkpoints
from moeforge.train.metrics import read_metrics
from tests.parallel.test_training import written

pytestmark = pytest.mark.dist
TEXT = "\n\n".join(f"paragraph {n}: the quick brown fox jumps over {n * 7} dogs." for n in range(400))
MOE = {
    "experts": {"num_experts": 4, "d_expert": 8},
    "shared": {"d_expert": 8},
    "router": {"score": "sigmoid", "controller": "expert_bias"},
}
MODEL = {"d_model": 16, "num_layers": 2, "num_heads": 2, "d_ff": 16, "first_dense_layers": 1, "moe": MOE}
SETTINGS = {
    "steps": 5,
    "batch_size": 5,
    "seq_len": 32,
    "accumulate": 2,
    "dtype": "float32",
    "eval_tokens": 500,
    "device": "cpu",
    "model": MODEL,
}
ONE = (1, Layout())
FOUR = (4, Layout(2))
EVEN_ON_TWO = "layer_01: [1, [0, 1], [0, 1], 0]"
ON_FOUR, ON_TWO = "layer_01: [3, [0, 2], 1, [3, 2]]", "layer_01: [1, [0, 1], 1, 0]"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("text")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    return build(RunConfig, SETTINGS | {"data": {"type": "files", "path": str(folder)}})


@pytest.fixture(scope="module")
def whole(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of an uninterrupted run of one process."""
    out = tmp_path_factory.mktemp("whole")
    with double():
        train(config, out, quiet=True)
    return out


def ranks_of(layout: Layout):
    if not dist.is_initialized():
        return ALONE
    return Together(Mesh.build(dist.get_world_size(), layout.ep, "cpu", None, layout.tp), layout)


@contextmanager
def double() -> Iterator[None]:
    """Weights, and all that comes of them, have 64 bits."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@double()
def begin(config: RunConfig, out: Path, layout: Layout) -> None:
    """Three steps, an evaluation, which leaves FSDP in another state, and a checkpoint."""
    run = Run(config, out, prepare(config.data, config.tokenizer), ranks_of(layout))
    for _ in range(3):
        run.step()
    run.evaluate()
    run.checkpoint()


@double()
def finish(config: RunConfig, out: Path, layout: Layout) -> None:
    train(config, out, resume=True, quiet=True, ranks=ranks_of(layout))


def on(processes, mesh: tuple[int, Layout], function, *arguments) -> None:
    size, layout = mesh
    if size == 1:
        function(*arguments, layout)
    else:
        processes(size).run(function, *arguments, layout)


@pytest.mark.parametrize(
    "writers, readers",
    [
        (FOUR, FOUR),
        (FOUR, ONE),
        (FOUR, (4, Layout(4, placement=ON_FOUR))),
        ((4, Layout(4, placement=ON_FOUR)), (4, Layout(2, True))),
        ((4, Layout(4, placement=ON_FOUR)), ONE),
        ((4, Layout(2, True, placement=ON_TWO)), (2, Layout(2, placement=ON_TWO))),
        (FOUR, (2, Layout())),
        (FOUR, (4, Layout(4, True))),
        (ONE, FOUR),
        ((4, Layout(2, True)), ONE),
        ((4, Layout(2, True)), (2, Layout(2, True))),
        ((2, Layout(2)), (4, Layout(1, True))),
        ((4, Layout(2, tp=2)), ONE),
        ((4, Layout(2, tp=2)), (4, Layout(2, True))),
        ((4, Layout(2, tp=2, placement=ON_TWO)), (4, Layout(tp=2))),
        ((4, Layout(2, True, tp=2, placement=ON_TWO)), ONE),
        ((4, Layout(1, True, tp=2)), (4, Layout(2, True, tp=2))),
        (ONE, (4, Layout(2, True, tp=2))),
        (ONE, (4, Layout(2, tp=2))),
        ((4, Layout(4, True, offload=True)), ONE),
        ((4, Layout(2, True)), (2, Layout(2, True, offload=True))),
        ((4, Layout(4, True)), (2, Layout(tp=2))),
    ],
    ids=lambda mesh: " ".join([str(mesh[0]), *mesh[1].flags]),
)
def test_a_checkpoint_goes_on_on_any_mesh(processes, config, whole, tmp_path, writers, readers):
    """As if nothing had happened: in double precision, so that nothing hides in the order of sums."""
    for (size, layout), function in ((writers, begin), (readers, finish)):
        on(processes, (size, written(layout, tmp_path)), function, config, tmp_path)
    expected, actual = read_metrics(whole / "metrics.jsonl"), read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in actual] == [4, 5]
    for line, whole_line in zip(actual, expected[3:], strict=True):
        for name in ("loss/lm", "loss/load_balancing", "optimizer/grad_norm"):
            assert line[name] == pytest.approx(whole_line[name], rel=1e-10), name
        assert line["moe/tokens_per_expert/layer_01"] == whole_line["moe/tokens_per_expert/layer_01"]
        assert ("sent/all_reduce" in line) == (readers != ONE)
    assert actual[-1]["eval/bits_per_byte"] == pytest.approx(expected[-1]["eval/bits_per_byte"], rel=1e-10)
    same_model(tmp_path, whole)


def same_model(out: Path, whole: Path) -> None:
    (model, _), (expected, _) = load(out), load(whole)
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=1e-9, atol=1e-10, msg=name)


def test_the_same_mesh_goes_on_bit_for_bit(processes, config, tmp_path):
    config = config.replace(model=build(type(config.model), MODEL | {"moe": MOE | {"router": {"noise": ["gumbel"]}}}))
    for out in ("one go", "two"):
        processes(2).run(begin, config, tmp_path / out, Layout(2))
    processes(2).run(finish, config, tmp_path / "two", Layout(2))
    lines = read_metrics(tmp_path / "two" / "metrics.jsonl")
    processes(2).run(finish, config, tmp_path / "one go", Layout(2))
    again = read_metrics(tmp_path / "one go" / "metrics.jsonl")
    assert [line["loss/lm"] for line in lines] == [line["loss/lm"] for line in again]
    processes(2).run(train_whole, config, tmp_path / "whole", Layout(2))
    uninterrupted = read_metrics(tmp_path / "whole" / "metrics.jsonl")[3:]
    assert [line["loss/lm"] for line in lines] == [line["loss/lm"] for line in uninterrupted]


@pytest.mark.parametrize("size, shard", [(2, False), (4, True)])
def test_experts_that_moved_are_still_there_when_a_run_goes_on(processes, config, tmp_path, size, shard):
    # just before the checkpoint
    layout = written(Layout(2, shard=shard, rebalance=3, placement=EVEN_ON_TWO), tmp_path)
    for function, out in ((begin, "two"), (finish, "two"), (train_whole, "whole")):
        processes(size).run(function, config, tmp_path / out, layout)
    processes(size).run(train_whole, config, tmp_path / "stays", replace(layout, rebalance=0))
    two, whole, stays = (read_metrics(tmp_path / out / "metrics.jsonl")[-2:] for out in ("two", "whole", "stays"))
    assert [line["loss/lm"] for line in two] == [line["loss/lm"] for line in whole]
    sent = [[line["sent/all_to_all"] for line in lines] for lines in (two, whole, stays)]
    assert sent[0] == sent[1] != sent[2]


def test_a_run_that_goes_on_knows_what_experts_got_before(processes, config, tmp_path):
    for function, out in ((begin, "two"), (finish, "two"), (train_whole, "whole")):
        processes(2).run(function, config, tmp_path / out, Layout(2, rebalance=9))
    (bank,) = json.loads((tmp_path / "two" / "checkpoints" / "step-5" / "state.json").read_text())["experts"].values()
    loads = [line["moe/tokens_per_expert/layer_01"] for line in read_metrics(tmp_path / "whole" / "metrics.jsonl")]
    assert bank == {"held": [[0, 1], [2, 3]], "loads": [sum(each) for each in zip(*loads, strict=True)]}


@double()
def train_whole(config: RunConfig, out: Path, layout: Layout) -> None:
    train(config, out, quiet=True, ranks=ranks_of(layout))


def damage_missing(folder: Path) -> None:
    next(folder.glob("__1_*.distcp")).unlink()


def damage_short(folder: Path) -> None:
    file = next(folder.glob("__0_*.distcp"))
    file.write_bytes(file.read_bytes()[:-9])


def damage_inside(folder: Path) -> None:
    state = json.loads((folder / "state.json").read_text())
    (folder / ".metadata").write_bytes(b"")
    state["files"][".metadata"] = 0
    (folder / "state.json").write_text(json.dumps(state))


@pytest.mark.parametrize(
    "damage, message",
    [
        (damage_missing, r"is damaged .*__1_0\.distcp"),
        (damage_short, r"is cut short: __0_0\.distcp has"),
        (damage_inside, "is damaged"),
    ],
)
def test_a_damaged_checkpoint_is_named(processes, config, tmp_path, damage, message):
    processes(2).run(begin, config, tmp_path, Layout(2))
    damage(checkpoints(tmp_path / "checkpoints")[-1])
    with pytest.raises(UserError, match=message):
        train(config, tmp_path, resume=True, quiet=True)


def test_a_checkpoint_of_another_model_is_refused_by_all(processes, config, tmp_path):
    processes(2).run(begin, config, tmp_path, Layout(2))
    other = config.replace(model=build(type(config.model), MODEL | {"d_ff": 24}))
    for told in processes(2).run(refused, other, tmp_path, Layout(2)):
        assert "was written under another config" in told and "d_ff" in told


def refused(config: RunConfig, out: Path, layout: Layout) -> str:
    try:
        finish(config, out, layout)
    except UserError as error:
        return str(error)
    return "nothing"


@double()
def saved_each_step(config: RunConfig, out: Path, layout: Layout) -> None:
    train(config.replace(save_every=1, keep_checkpoints=9), out, quiet=True, ranks=ranks_of(layout))


def stored(folder: Path) -> dict[str, torch.Tensor]:
    if (folder / store.METADATA).exists():
        state = {name: torch.empty(md.size, dtype=md.properties.dtype) for name, md in store.contents(folder).items()}
        store.read(folder, state)
        return state
    return read_tensors(folder / "model.safetensors") | read_tensors(folder / "optimizer.safetensors")


@pytest.mark.parametrize("mesh", [ONE, (4, Layout(2, True)), (4, Layout(4, placement=ON_FOUR))], ids=str)
def test_what_is_written_in_the_background_is_what_there_was(processes, config, tmp_path, mesh):
    size, layout = mesh[0], written(mesh[1], tmp_path)
    for background in (False, True):
        asked, out = config.replace(save_in_background=background), tmp_path / str(background)
        on(processes, (size, layout), saved_each_step, asked, out)
    for step in range(1, config.steps + 1):
        there, here = (stored(tmp_path / str(kind) / "checkpoints" / f"step-{step}") for kind in (True, False))
        assert there.keys() == here.keys() and len(there) > 20
        assert all(torch.equal(there[name], here[name]) for name in here)


class Later(Background):
    """Does the work when told to."""

    def begin(self, work) -> None:
        self.work = work


@double()
def saved_late(config: RunConfig, out: Path, layout: Layout) -> None:
    config = config.replace(save_in_background=True)
    run = Run(config, out / "late", prepare(config.data, config.tokenizer), ranks_of(layout))
    run.step()
    run.saving = later = Later()
    run.checkpoint()
    run.out, run.saving = out / "at once", None
    run.checkpoint()
    run.step()
    later.work()


@pytest.mark.parametrize("mesh", [ONE, (4, Layout(2, True)), (4, Layout(4, placement=ON_FOUR))], ids=str)
def test_a_step_in_the_meantime_is_not_in_what_is_written(processes, config, tmp_path, mesh):
    on(processes, (mesh[0], written(mesh[1], tmp_path)), saved_late, config, tmp_path)
    late, at_once = (stored(tmp_path / kind / "checkpoints" / "step-1") for kind in ("late", "at once"))
    assert late.keys() == at_once.keys()
    assert all(torch.equal(late[name], at_once[name]) for name in late)
