"""The demo at the smallest scale, from end to end, and what it does with folders that exist."""

import json
from pathlib import Path
from typing import Any

import pytest

from moeforge import recipes
from moeforge.analyze import write_report
from moeforge.cli.analyze import read_run
from moeforge.cli.demo import make_room, run_demo, twins
from moeforge.config import build, override
from moeforge.errors import UserError
from moeforge.models import measure
from moeforge.train import RunConfig

LINES = ["def add(a, b):\n    return a + b\n", "The import statement binds a name.\n", "x = [1, 2, 3]  # numbers\n"]
TINY = """
--steps=4 --batch_size=2 --seq_len=32 --dtype=float32 --device=cpu --tokenizer=bytes --eval_tokens=200 --seed=3
--model.d_model=16 --model.num_layers=2 --model.num_heads=2 --model.max_seq_len=256
--model.moe.experts.num_experts=4 --model.moe.experts.d_expert=8 --model.moe.shared.d_expert=8
""".split()


def tiny(folder: Path) -> RunConfig:
    """The demo's recipe, shrunk, on local text that is made in ``folder``."""
    folder.mkdir()
    for number in range(20):
        (folder / f"{number}.txt").write_text("\n".join(LINES) * (1 + number % 4), encoding="utf-8")
    tree = recipes.load_tree("pr-moe")
    tree["model"]["layers"] = {}
    tree["data"] = {"type": "files", "path": str(folder)}
    return build(RunConfig, override(tree, TINY))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        said: list[str] = []
        patch.setattr("typer.echo", lambda text="": said.append(str(text)))
        result = run_demo(tiny(folder / "text"), folder / "out", quiet=False, command="moeforge demo")
    return folder / "out", result, "\n".join(said)


def test_the_summary_holds_both_runs_and_the_comparison(finished: tuple[Path, dict[str, Any], str]) -> None:
    out, result, _ = finished
    found = json.loads((out / "summary.json").read_text())
    assert found == result
    for arm in ("dense", "pr_moe"):
        assert {"bits_per_byte", "active_params", "flops_per_token", "seconds"} <= found[arm].keys()
        assert 0 < found[arm]["bits_per_byte"] < 9 and found[arm]["seconds"] > 0
    assert found["margin"] == pytest.approx(found["dense"]["bits_per_byte"] - found["pr_moe"]["bits_per_byte"])
    assert (found["steps"], found["tokens"], found["seed"]) == (4, 4 * 2 * 32, 3)
    assert found["equal_wall_time"]["seconds"] == min(found["dense"]["seconds"], found["pr_moe"]["seconds"])
    assert found["equal_wall_time"].keys() >= {"dense", "pr_moe", "how"}


def test_report_picture_and_runs_are_there(finished: tuple[Path, dict[str, Any], str]) -> None:
    out, _, _ = finished
    page = (out / "report.html").read_text()
    assert "pr-moe" in page and "The import statement" not in page.partition("<h2>What")[0]
    assert (out / "comparison.png").stat().st_size > 1000
    assert all((out / arm / "model" / "model.safetensors").exists() for arm in ("dense", "pr_moe"))


def test_it_prints_both_curves_the_table_and_what_was_written(finished: tuple[Path, dict[str, Any], str]) -> None:
    said = finished[2]
    assert said.count("bits per byte: dense") == 2 * 4
    assert sum("PR-MoE" in line and "bits per byte: dense" in line for line in said.splitlines()) == 4
    for part in ("FLOPs per token", "'def '", "'The import statement '", "report.html", "At equal training time"):
        assert part in said


def test_the_arms_differ_in_the_model_alone_and_cost_the_same(tmp_path: Path) -> None:
    config = tiny(tmp_path / "text")
    config = config.replace(model=config.model.replace(vocab_size=257))
    dense, pr_moe = twins(config).values()
    changed = {name for name in RunConfig.model_fields if getattr(dense, name) != getattr(pr_moe, name)}
    assert changed == {"name", "recipe", "model"}
    costs = [measure(arm.model, seq_len=arm.seq_len).flops_per_token for arm in (dense, pr_moe)]
    assert costs[0] >= costs[1] and costs[0] / costs[1] < 1.05


def test_analyze_reads_the_runs_again(finished: tuple[Path, dict[str, Any], str], tmp_path: Path) -> None:
    out, result, _ = finished
    record = read_run(out / "pr_moe")
    assert record.bits_per_byte == result["pr_moe"]["bits_per_byte"]
    assert sorted(record.loads) == sorted(record.usage) == [1]
    assert record.loads[1].sum(1).tolist() == [2 * 32] * 4
    write_report([record], tmp_path / "again.html", "moeforge analyze")
    assert "pr-moe" in (tmp_path / "again.html").read_text()


def test_an_unfinished_run_cannot_be_analyzed(finished: tuple[Path, dict[str, Any], str], tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text((finished[0] / "dense" / "config.yaml").read_text())
    with pytest.raises(UserError, match="no evaluation"):
        read_run(tmp_path)


def earlier(out: Path) -> None:
    for arm in ("dense", "pr_moe"):
        (out / arm / "model").mkdir(parents=True)
        for name in ("config.yaml", "metrics.jsonl", "model/config.json"):
            (out / arm / name).write_text("{}")
    (out / "summary.json").write_text('{"dense": {}, "pr_moe": {}}')


def test_an_earlier_demo_makes_room_but_nothing_else_of_the_folder_goes(tmp_path: Path) -> None:
    earlier(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "dense" / "mine.txt").write_text("mine")
    make_room(tmp_path)
    left = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    assert left == ["dense/mine.txt", "notes.txt"]


def test_a_demo_that_was_stopped_makes_room(tmp_path: Path) -> None:
    earlier(tmp_path)
    (tmp_path / "summary.json").unlink()
    make_room(tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("name", ["thesis.txt", "summary.json", "dense/config.yaml"])
def test_any_other_folder_is_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("[]")
    with pytest.raises(UserError, match="--out"):
        make_room(tmp_path)
    assert (tmp_path / name).read_text() == "[]"
    with pytest.raises(UserError, match="is a file"):
        make_room(tmp_path / name)


def test_a_new_or_empty_folder_is_fine(tmp_path: Path) -> None:
    make_room(tmp_path)
    make_room(tmp_path / "new")
