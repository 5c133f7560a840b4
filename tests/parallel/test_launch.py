"""``moeforge train --nproc`` and torchrun: real processes, one of them killed; what is refused before any starts."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from moeforge.cli.main import main
from moeforge.train.checkpoint import checkpoints
from moeforge.train.metrics import read_metrics
from tests.parallel.processes import children, start, until

pytestmark = pytest.mark.dist


def test_a_killed_process_is_named_the_others_stop_and_the_run_goes_on_until_it_is_interrupted(tiny, tmp_path):
    out = tmp_path / "run"
    run = start("moeforge", "train", tiny, "--out", out, "--nproc", 2, "--ep", 2)
    until(lambda: checkpoints(out / "checkpoints"), run)
    workers = children(run.pid)
    os.kill(workers[1], signal.SIGKILL)
    killed = time.monotonic()
    _, said = run.communicate(timeout=60)
    assert time.monotonic() - killed < 30
    assert run.returncode == 2
    assert "process 1 of 2 was killed by SIGKILL" in said and "Traceback" not in said
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers.values())
    assert f"moeforge train {out}/config.yaml --out {out} --resume --nproc 2 --ep=2" in said

    saved = int(checkpoints(out / "checkpoints")[-1].name[5:])
    settings = ["--out", out, "--resume", "--nproc", 2, "--ep", 2, "--save_every=100000"]
    again = start("moeforge", "train", out / "config.yaml", *settings)
    until(lambda: read_metrics(out / "metrics.jsonl")[-1]["step"] == saved + 2, again)
    again.send_signal(signal.SIGINT)
    _, said = again.communicate(timeout=60)
    assert again.returncode == 130, said
    assert f"resumed at step {saved}" in said and said.count("reading files") == 1
    assert "is saved. Go on with" in said and "Traceback" not in said
    last = read_metrics(out / "metrics.jsonl")[-1]
    assert last["sent/all_to_all"] > 0
    assert int(checkpoints(out / "checkpoints")[-1].name[5:]) == last["step"] > saved


def test_torchrun_starts_it_too_and_one_process_says_what_is_wrong(tiny, tmp_path):
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "moeforge", "train", tiny]
    run = start(*torchrun, "--ep", 4, "--out", tmp_path / "run")
    _, said = run.communicate(timeout=90)
    assert run.returncode != 0 and said.count("error: 2 processes cannot form expert groups of 4") == 1
    assert not (tmp_path / "run").exists()


ONLY_ONE = """
import os
from typing import Literal
from moeforge.moe import Context
from moeforge.moe.select import Selection, TopK

class Breaks(TopK):
    type: Literal["breaks_on_one:Breaks"] = "breaks_on_one:Breaks"

    def __call__(self, scores_TE, context: Context) -> Selection:
        if os.environ.get("RANK") == "1":
            raise RuntimeError("the second process has had enough")
        return super().__call__(scores_TE, context)
"""


def test_the_process_that_failed_first_is_heard_and_the_others_logs_are_kept(tiny, tmp_path, monkeypatch):
    (tmp_path / "breaks_on_one.py").write_text(ONLY_ONE, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    out, select = tmp_path / "run", "--model.moe.router.select={type: breaks_on_one:Breaks, k: 1}"
    run = start("moeforge", "train", tiny, "--out", out, "--nproc", 2, "--ep", 2, "--quiet", select)
    _, said = run.communicate(timeout=90)
    assert run.returncode == 1
    first = said.index("RuntimeError: the second process has had enough")
    assert "[rank0]" not in said[:first], "the lost connection of others comes after its cause, or not at all"
    assert f"What all but the first said is in {out}/logs." in said
    assert "had enough" in (out / "logs" / "process-1.log").read_text(encoding="utf-8")


REPRODUCED = """
extends: TINY
name: mine
steps: 6
recipe:
  title: A paper
  arxiv: "2401.06066"
  claim: Two experts are better than one.
  check: moeforge reproduce mine.yaml
  against: {settings: ["--model.moe.router.select.k=1"]}
  expected: not measured yet
model: {moe: {router: {select: {k: 2}}}}
"""


def test_a_claim_is_reproduced_on_several_processes_as_on_one(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(REPRODUCED.replace("TINY", str(tiny)), encoding="utf-8")
    told = ["reproduce", "mine.yaml", "--seeds=1", "--json"]
    run = start("moeforge", *told, "--out=runs1", "--nproc=2", "--ep=2")
    assert main([*told, "--out=runs0"]) == 0
    alone = json.loads(capsys.readouterr().out)["runs"]
    shown, said = run.communicate(timeout=120)
    assert run.returncode == 0, said
    together = json.loads(shown)["runs"]
    assert alone.keys() == together.keys()
    for label, (measured,) in alone.items():
        assert together[label][0]["bits_per_byte"] == pytest.approx(measured["bits_per_byte"], rel=1e-5)
        assert measured["steps"] == 6
    assert "sent/all_to_all" in next(Path("runs1").glob("mine-0/metrics.jsonl")).read_text(encoding="utf-8")


SOFT = [f"--model.moe.router.{part}" for part in ("select=soft", "score=logits", "losses=[]")]
REFUSED = {
    "no such mesh": (
        ["--nproc=3", "--ep=2"],
        "groups of 2: take an expert size of 1 or 3",
    ),
    "experts do not divide": (["--nproc=3", "--ep=3"], "4 experts cannot be spread evenly over 3 processes"),
    "sizes that fit": (["--nproc=8", "--ep=8"], "take an expert size of 1, 2 or 4, or a multiple of 8 experts"),
    "one process": (["--ep=2"], "--ep needs several processes: add --nproc"),
    "nothing to cut": (["--shard"], "--shard needs several processes: add --nproc"),
    "nothing to deal out": (["--nproc=2", "--ep=2", "--model.moe=null"], "an expert size of 2 does nothing"),
    "no two levels": (
        ["--nproc=4", "--ep=2", "--two-level", "--node-size=2"],
        "an expert size of 2 and a node size of 2 do not make them",
    ),
    "all on one machine": (["--nproc=4", "--ep=4", "--two-level"], "an expert size of 4 and a node size of 4 do not"),
    "machines half full": (["--nproc=4", "--node-size=3"], "--node-size: 4 processes do not fill machines of 3"),
    "one process, two levels": (["--two-level"], "--two-level needs several processes: add --nproc"),
    "few for uneven": (["--nproc=8", "--ep=8", "--uneven"], "4 experts are too few for 8 processes"),
    "chunks of nothing": (["--nproc=2", "--chunks=2"], "--chunks is about experts on several processes: add --ep"),
    "rows or weights": (
        ["--nproc=2", "--ep=2", "--fetch", "--chunks=2"],
        "--fetch sends no rows: leave",
    ),
    "no such file": (["--nproc=2", "--ep=2", "--placement=nowhere.yaml"], "nowhere.yaml"),
    "mixed tokens": ([*"--nproc=2 --ep=2".split(), *SOFT], "select: soft mixes before experts run: it needs an expert"),
    "no such slices": (
        ["--nproc=3", "--tp=2"],
        "3 processes cannot form tensor groups of 2: take a tensor size of 1 or 3",
    ),
    "no such groups": (["--nproc=6", "--ep=2", "--tp=2"], "3 tensor groups of 2 cannot form expert groups of 2: take"),
    "heads in slices": (["--nproc=4", "--tp=4"], "layer 0: num_heads = 2 cannot be cut in 4 slices"),
    "experts in slices": (["--nproc=2", "--tp=2", "--model.moe.experts.d_expert=7"], "layer 0: d_expert = 7 cannot be"),
    "a shared one": (["--nproc=2", "--tp=2", "--model.moe.shared.d_expert=5"], "layer 0: shared d_expert = 5 cannot"),
    "an MLP": (["--nproc=2", "--tp=2", "--model.first_dense_layers=1", "--model.d_ff=15"], "layer 0: d_ff = 15 cannot"),
    "keys in slices": (["--nproc=2", "--tp=2", "--model.num_kv_heads=1"], "layer 0: num_kv_heads = 1 cannot be cut"),
    "a norm over heads": (["--nproc=2", "--tp=2", "--model.qk_norm=whole"], "qk_norm: whole is over all heads"),
    "mixed slices": (
        [*"--nproc=2 --tp=2".split(), *SOFT],
        "select: soft asks or mixes whole experts: it needs a tensor",
    ),
    "nothing left to cut": (["--nproc=2", "--tp=2", "--shard"], "--shard does nothing where one tensor group is all"),
    "no two levels of slices": (
        "--nproc=8 --ep=4 --tp=2 --two-level --node-size=2".split(),
        "two levels need expert groups that fill several machines of several tensor groups of 2 each",
    ),
    "all rows in parts": (
        "--nproc=2 --ep=2 --by-index --chunks=2".split(),
        "--by-index gathers all rows at once: leave --fetch, --two-level and --chunks out",
    ),
    "nothing to pick": (["--nproc=2", "--by-index"], "--by-index is about experts on several processes: add --ep"),
    "nothing cut to offload": (["--nproc=2", "--offload"], "--offload is about what FSDP has cut: add --shard"),
    "no device to offload from": (["--nproc=2", "--shard", "--offload"], "--offload: the model is on the CPU already"),
    "nothing to move": (["--nproc=2", "--rebalance=5"], "--rebalance is about experts on several processes: add --ep"),
    "unlike shares": (
        "--nproc=3 --ep=3 --uneven --rebalance=5".split(),
        "has more experts on one process than on another",
    ),
    "one process, slices": (["--tp=2"], "--tp needs several processes: add --nproc"),
    "a dry run": (["--nproc=2", "--dry-run"], "--nproc does nothing beside --dry-run"),
}


PLACEMENTS = {
    "too few": ("layer_01: [0, 1]", "layer 1 has 4 experts, not 2"),
    "no such layer": ("layer_07: [0, 1, 0, 1]", "the model has no experts in layer_07"),
    "no such process": ("layer_00: [0, 1, 2, 1]", "there is no process 2 in a group of 2: 0 to 1"),
    "nowhere": ("layer_00: [0, 1, null, 1]", "expert 2 of its bank is null, but must be somewhere"),
    "twice": ("layer_00: [0, 1, [1, 1], 1]", "a list of different processes, or null per expert"),
    "words": ("layer_00: left", "layer_00: a list is wanted"),
    "idle": ("layer_00: [0, 0, 0, 0]", "process 1 of 2 would hold no expert of a bank"),
}


@pytest.mark.parametrize("text, message", PLACEMENTS.values(), ids=PLACEMENTS)
def test_a_placement_that_cannot_be_is_refused(tiny, tmp_path, capsys, text, message):
    file = tmp_path / "placement.yaml"
    file.write_text(text, encoding="utf-8")
    options = ["--nproc=2", "--ep=2", f"--placement={file}"]
    assert main(["train", str(tiny), f"--out={tmp_path / 'run'}", *options]) == 2
    told = capsys.readouterr().err
    assert message in told and str(file) in told


@pytest.mark.parametrize("arguments, message", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused_before_a_process_starts(tiny, tmp_path, capsys, arguments, message):
    assert main(["train", str(tiny), f"--out={tmp_path / 'run'}", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
