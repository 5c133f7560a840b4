"""Reproducing a claim: both arms trained for real on a little text, numbers read from disk, and the verdict."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from moeforge.cli.main import main
from moeforge.config import build
from moeforge.errors import UserError
from moeforge.recipes.reproduce import Measured, arms, experts_per_token, gain, verdict
from moeforge.train.config import RecipeNote, RunConfig

RECIPE = """
extends: adamoe
name: mine
recipe:
  title: A paper
  arxiv: "2406.13233"
  claim: Null experts save work.
  check: moeforge reproduce mine.yaml
  against:
    settings:
      - "--model.moe.experts=[{num_experts: 8, d_expert: 16}]"
      - "--model.moe.router.weigh={normalize_weights: true}"
      - "--model.moe.router.losses=[load_balancing_loss]"
    by: experts_per_token
  expected: not measured yet
batch_size: 2
seq_len: 32
steps: 12
tokenizer: bytes
data: {type: files, path: PATH}
model:
  d_model: 16
  num_layers: 1
  num_heads: 2
  moe: {experts: [{num_experts: 8, d_expert: 16}, {type: zero, num_experts: 8}]}
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("\n\n".join(f"paragraph {n} of {n * 7} words" for n in range(300)))
    file = tmp_path / "mine.yaml"
    file.write_text(RECIPE.replace("PATH", str(tmp_path / "text.txt")))
    return file


def test_claim_and_result_stand_side_by_side(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", str(recipe), "--seeds", "2"]) == 0
    shown = capsys.readouterr().out
    assert "Null experts save work." in shown and "benchmarks/reproduce/mine.json" in shown
    found = json.loads(Path("benchmarks/reproduce/mine.json").read_text())
    ours, other = found["runs"]["mine"], found["runs"]["mine, changed for mine"]
    assert found["seeds"] == [0, 1] and len(ours) == len(other) == 2
    assert all(run["experts_per_token"] == 4 for run in other), "four of eight real ones"
    assert all(1 < run["experts_per_token"] < 3 for run in ours), "null experts are not counted"
    assert found["gain"] == pytest.approx([4 - run["experts_per_token"] for run in ours])
    assert found["verdict"] == "shows" and "shows: gain in experts per token" in shown
    assert 1 < ours[0]["bits_per_byte"] < 9 and ours[0]["tokens"] == 12 * 64
    stamps = {path: path.stat().st_mtime_ns for path in Path("runs").rglob("model/model.safetensors")}
    assert len(stamps) == 4
    assert main(["reproduce", str(recipe), "--seeds", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["gain"] == found["gain"]
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps, "what is there is read, not trained again"
    kept = Path("runs/reproduce/mine/mine-0/measured.json")
    assert json.loads(kept.read_text()) == ours[0], "measured once"
    assert main(["reproduce", str(recipe), "--seeds", "2", "--steps=11"]) == 2
    problem = capsys.readouterr().err
    assert "holds a run of other settings; name another folder" in problem and '"steps"' in problem


def test_repeated_layers_that_route_by_domain_are_counted_and_found_again(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for domain in ("prose", "verse"):
        (tmp_path / "text" / domain).mkdir(parents=True)
        for number in range(30):
            (tmp_path / "text" / domain / f"{number}.txt").write_text(f"{domain} number {number}\n" * 9)
    text = RECIPE.replace("PATH", str(tmp_path / "text")).replace("num_layers: 1", "num_repeats: 2\n  num_layers: 2")
    router = "router: {gate: {type: lookup, by: domain, num_ids: 2}}}"
    recipe.write_text(text.replace("type: zero, num_experts: 8}]}", f"type: zero, num_experts: 8}}], {router}"))
    before = None
    for _ in range(2):
        assert main(["reproduce", str(recipe), "--seeds=1", "--steps=2", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)["runs"]
        assert found["mine, changed for mine"][0]["experts_per_token"] == 4
        assert before in (None, found), "the second time it is read"
        before = found


def test_minutes_shorten_both_runs(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", str(recipe), "--seeds=1", "--minutes=600", "--json"]) == 0
    runs = json.loads(capsys.readouterr().out)["runs"]
    assert {run["steps"] for each in runs.values() for run in each} == {12}, "never more than the recipe asks for"
    assert main(["reproduce", str(recipe), "--minutes=0.000001"]) == 2
    assert "minutes are too few for 3 seeds" in capsys.readouterr().err
    assert main(["reproduce", str(recipe), "--minutes=1", "--steps=3"]) == 2
    assert "--minutes sets the number of steps" in capsys.readouterr().err


def test_what_has_no_comparison(tmp_path: Path) -> None:
    file = tmp_path / "plain.yaml"
    file.write_text("steps: 3\n")
    with pytest.raises(UserError, match="has no recipe: with claim and comparison"):
        arms(str(file))
    with pytest.raises(UserError, match=r"recipe\.against is the recipe itself"):
        arms("dense")


def test_experts_per_token_is_a_mean_over_every_pass_of_a_layer() -> None:
    moe = {"experts": [{"num_experts": 2, "d_expert": 4}, {"type": "zero", "num_experts": 1}]}
    model = {"d_model": 16, "num_layers": 1, "num_repeats": 2, "moe": moe}
    config = build(RunConfig, {"batch_size": 2, "seq_len": 4, "model": model})
    loads = {"moe/tokens_per_expert/layer_00": [8, 8, 0], "moe/tokens_per_expert/layer_01": [4, 0, 12]}
    assert experts_per_token(loads, config) == (16 + 4) / 2 / 8


def run(bits: float, experts: float = 2.0, entropy: float = 0.9) -> Measured:
    return Measured(bits, experts, entropy, 1, 1, 1, 1, 1, 1.0)


def note(by: str = "bits_per_byte", within: float | None = None, needs_scale: str | None = None) -> RecipeNote:
    against = {"by": by, "within": within}
    words = {"title": "A paper", "claim": "It helps.", "check": "See.", "expected": "nothing"}
    return RecipeNote.model_validate({**words, "against": against, "needs_scale": needs_scale})


def test_gains_point_where_the_claim_points() -> None:
    better, worse = run(1.0, 1.0, 0.9), run(1.5, 2.0, 0.5)
    assert [gain(by, better, worse) for by in ("bits_per_byte", "experts_per_token", "load_entropy")] == [0.5, 1.0, 0.4]


@pytest.mark.parametrize(
    ("gains", "within", "shows"),
    [
        ([0.1], None, True),
        ([-0.1], None, False),
        ([0.005], None, False),  # seeds alone may do that
        ([0.007], None, True),
        ([0.1, 0.12, 0.08], None, True),
        ([0.1, -0.1, 0.06], None, False),
        ([-0.01, -0.02, -0.01], 0.05, True),
        ([-0.1, -0.12, -0.1], 0.05, False),
    ],
)
def test_a_verdict_weighs_the_spread_and_what_the_claim_allows(
    gains: list[float], within: float | None, shows: bool
) -> None:
    ours, other = [run(1.0) for _ in gains], [run(1.0 + each) for each in gains]
    assert verdict(ours, other, note(within=within)) == ("shows" if shows else "does not show here")
    assert verdict(ours, other, note(within=within, needs_scale="tokens")) == ("shows" if shows else "needs scale")


def test_less_work_counts_only_at_the_quality_that_the_claim_names() -> None:
    cheap_but_worse, base = [run(1.1, experts=1.0)], [run(1.0, experts=2.0)]
    assert verdict(cheap_but_worse, base, note("experts_per_token")) == "shows", "nothing said of quality"
    assert verdict(cheap_but_worse, base, note("experts_per_token", within=0.01)) == "does not show here"
    assert verdict([run(1.003, experts=1.0)], base, note("experts_per_token", within=0.01)) == "shows"
    assert verdict([run(1.0, experts=2.5)], base, note("experts_per_token", within=0.01)) == "does not show here"


def test_an_estimate_needs_two_seeds_and_two_that_agree_by_chance_are_not_believed() -> None:
    def agreeing(share: float) -> Measured:
        return replace(run(1.0), agreement=share)

    claim = note("agreement")
    assert verdict([agreeing(0.5)], [agreeing(0.4)], claim) == "does not show here"
    assert verdict([agreeing(0.5), agreeing(0.6)], [agreeing(0.4), agreeing(0.49)], claim) == "shows"
    assert verdict([run(1.0), run(1.0)], [run(1.003), run(1.003)], note()) == "does not show here"
    assert verdict([run(1.0), run(1.0)], [run(1.005), run(1.005)], note()) == "shows"
