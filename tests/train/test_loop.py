"""Runs: what they write, that they resume bit for bit after kill -9, and what they say when something is wrong."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moeforge.config import build, read_yaml, to_yaml
from moeforge.data.prepare import prepare
from moeforge.errors import UserError
from moeforge.hub import load
from moeforge.train import Run, RunConfig, train
from moeforge.train.checkpoint import checkpoints
from moeforge.train.metrics import Metrics, read_metrics


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def losses(out: Path) -> list[float]:
    return [line["loss/lm"] for line in read_metrics(out / "metrics.jsonl")]


def command(config: RunConfig, out: Path, *more: str) -> list[str]:
    path = out.parent / f"{out.name}.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    return [sys.executable, "-m", "moeforge", "train", str(path), "--out", str(out), *more]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny):
    """A complete run of twelve steps, and its config."""
    config = tiny(steps=12)
    out = tmp_path_factory.mktemp("runs") / "whole"
    train(config, out, quiet=True)
    return config, out


def test_a_run_folder_holds_what_the_readme_says(finished):
    config, out = finished
    assert {"config.yaml", "metrics.jsonl", "checkpoints", "model"} <= {path.name for path in out.iterdir()}
    resolved = build(RunConfig, read_yaml(out / "config.yaml"))
    assert resolved == config.replace(model=config.model.replace(vocab_size=257))
    lines = read_metrics(out / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 13))
    for name in ("loss/lm", "loss/load_balancing", "perf/tokens_per_second", "moe/load_entropy/layer_01"):
        assert all(name in line for line in lines)
    assert [line["step"] for line in lines if "eval/bits_per_byte" in line] == [3, 6, 9, 12]
    assert [path.name for path in checkpoints(out / "checkpoints")] == ["step-9", "step-12"]
    model, tokenizer = load(out)
    assert tokenizer.decode(tokenizer.encode("def x():")) == "def x():"
    assert same(dict(model.state_dict()), weights(out))


def test_training_learns(finished):
    _, out = finished
    values = losses(out)
    assert values[-1] < values[0] - 0.1


def test_equal_runs_are_equal_bit_for_bit(finished, tmp_path):
    config, out = finished
    train(config, tmp_path / "again", quiet=True)
    assert same(weights(out), weights(tmp_path / "again"))


def test_another_seed_is_another_run(finished, tmp_path):
    config, out = finished
    train(config.replace(seed=1, steps=2), tmp_path / "other", quiet=True)
    assert losses(tmp_path / "other")[0] != losses(out)[0]


def test_kill_nine_then_resume_equals_the_run_that_was_never_killed(tiny, tmp_path):
    config, out = tiny(steps=400), tmp_path / "killed"
    process = subprocess.Popen(command(config, out), stderr=subprocess.DEVNULL)
    wait_for(lambda: len(read_metrics(out / "metrics.jsonl")) >= 8, process)
    process.kill()
    process.wait()
    done = checkpoints(out / "checkpoints")
    assert done and not (out / "model").exists()
    stop = int(done[-1].name[5:]) + 4
    assert first_steps(config, out, stop, resume=True) == first_steps(config, tmp_path / "straight", stop, resume=False)


def first_steps(config: RunConfig, out: Path, stop: int, resume: bool) -> list[str]:
    """Metrics without timings of the first ``stop`` steps, and a digest of the weights after them."""
    run = Run(config, out, prepare(config.data, config.tokenizer))
    out.mkdir(exist_ok=True)
    if resume:
        run.resume()
    with Metrics(out, run.progress.step, tensorboard=False) as metrics:
        while run.progress.step < stop:
            metrics.write(run.step())
    lines = [
        {k: v for k, v in line.items() if not k.startswith(("perf/", "eval/"))}
        for line in read_metrics(out / "metrics.jsonl")
    ]
    sums = [f"{name} {tensor.double().sum().item()!r}" for name, tensor in run.model.state_dict().items()]
    return [*map(json.dumps, lines), *sums]


def test_a_checkpoint_from_before_a_setting_was_there_stands_at_its_default(tiny, tmp_path):
    config, data = tiny(), prepare(tiny().data, tiny().tokenizer)
    run = Run(config, tmp_path, data)
    file = run.checkpoint() / "state.json"
    state = json.loads(file.read_text())
    del state["config"]["model"]["num_repeats"], state["config"]["model"]["moe"]["shortcut"]
    file.write_text(json.dumps(state))
    run.resume()
    other = config.replace(model=config.model.replace(num_repeats=2))
    with pytest.raises(UserError, match=r"another config; now different: .*num_repeats"):
        Run(other, tmp_path, data).resume()


def test_ctrl_c_saves_and_says_how_to_go_on(tiny, tmp_path):
    config = tiny()
    out = tmp_path / "stopped"
    run = command(config.replace(steps=100_000, save_every=100_000), out)
    process = subprocess.Popen(run, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: len(read_metrics(out / "metrics.jsonl")) >= 2, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=1200)
    assert process.returncode == 130
    assert "--resume" in errors and "Traceback" not in errors
    done = read_metrics(out / "metrics.jsonl")[-1]["step"]
    assert [path.name for path in checkpoints(out / "checkpoints")] == [f"step-{done}"]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen, seconds: float = 1200.0) -> None:
    """Returns once the condition holds; the process is not left behind when it never does."""
    end = time.monotonic() + seconds
    try:
        while not condition():
            assert process.poll() is None, "the run ended before it could be stopped"
            assert time.monotonic() < end, "the run did not get going"
            time.sleep(0.05)
    except AssertionError:
        process.kill()
        process.wait()
        raise


def test_a_full_disk_leaves_the_old_checkpoint_whole(tiny, tmp_path):
    """A real limit on file size stands in for the full disk: the write fails half way, in the library that writes."""
    config = tiny()
    out = tmp_path / "full"
    train(config.replace(steps=3), out, quiet=True)
    before = {path.name: path.read_bytes() for path in (out / "checkpoints" / "step-3").iterdir()}
    run = command(config.replace(steps=6), out, "--resume")
    limit = 20_000

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    ended = subprocess.run(run, stderr=subprocess.PIPE, text=True, preexec_fn=limited, timeout=1200)
    assert ended.returncode == 2, ended.stderr
    message = ended.stderr.strip().splitlines()[-1]
    assert message.startswith("error: cannot write") and "step-6" in message and "untouched" in message
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-3"]
    assert {path.name: path.read_bytes() for path in (out / "checkpoints" / "step-3").iterdir()} == before


@pytest.mark.parametrize("victim", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_checkpoint_cut_short_is_refused(tiny, tmp_path, victim):
    config = tiny()
    train(config.replace(steps=3), tmp_path / "cut", quiet=True)
    path = tmp_path / "cut" / "checkpoints" / "step-3" / victim
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(UserError, match=r"step-3.*(cut short|damaged)"):
        train(config.replace(steps=6), tmp_path / "cut", resume=True, quiet=True)


def test_a_checkpoint_of_another_config_is_refused_with_what_differs(tiny, tmp_path):
    config = tiny()
    train(config.replace(steps=3), tmp_path / "run", quiet=True)
    with pytest.raises(UserError, match=r'another config.*"lr": 0.5'):
        train(config.replace(optimizer=config.optimizer.replace(lr=0.5)), tmp_path / "run", resume=True, quiet=True)


def test_resume_without_a_checkpoint_and_a_folder_in_use(finished, tmp_path):
    config, out = finished
    with pytest.raises(UserError, match="no checkpoint"):
        train(config, tmp_path / "nothing", resume=True, quiet=True)
    with pytest.raises(UserError, match=r"already holds a run.*--resume"):
        train(config, out, quiet=True)


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_was_stopped_before_its_first_checkpoint_begins_anew(finished, tmp_path, resume):
    config, whole = finished
    out = tmp_path / "run"

    def stop(line: dict) -> None:
        raise RuntimeError("as if it were killed")

    with pytest.raises(RuntimeError, match="as if"):
        train(config, out, quiet=True, on_step=stop)
    (out / "checkpoints" / ".step-1.part-7").mkdir(parents=True)
    assert len(read_metrics(out / "metrics.jsonl")) == 1
    train(config, out, resume=resume, quiet=True)
    ours, theirs = (read_metrics(folder / "metrics.jsonl") for folder in (out, whole))
    assert [line["loss/lm"] for line in ours] == [line["loss/lm"] for line in theirs]
    assert not list((out / "checkpoints").glob(".*"))


def test_a_run_that_diverges_stops_and_keeps_the_last_good_checkpoint(tiny, tmp_path):
    config = tiny()
    out = tmp_path / "diverged"
    wild = config.replace(
        steps=50, save_every=1, optimizer=config.optimizer.replace(lr=1e18), schedule="warmup_stable_decay"
    )
    with pytest.raises(UserError, match=r"step \d+: the (loss|gradient norm) is (nan|inf); first non-finite"):
        train(wild, out, quiet=True)
    kept = checkpoints(out / "checkpoints")
    assert kept
    assert all(torch.isfinite(tensor).all() for tensor in load_file(kept[-1] / "model.safetensors").values())


def test_a_vocabulary_that_does_not_fit_the_tokenizer(tiny, tmp_path):
    with pytest.raises(UserError, match=r"model.vocab_size = 300, but the tokenizer has 257"):
        train(tiny(model={"vocab_size": 300}), tmp_path / "run", quiet=True)


def test_bf16_recompute_accumulate_and_tensorboard_run_together(tiny, tmp_path):
    config = tiny(steps=2, dtype="bfloat16", recompute_activations=True, accumulate=2, tensorboard=True)
    train(config, tmp_path / "run", quiet=True)
    assert len(losses(tmp_path / "run")) == 2
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_a_bpe_that_text_cannot_fill_trains_with_the_tokens_it_has(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("MOEFORGE_CACHE", str(tmp_path / "cache"))
    config = tiny(steps=1, tokenizer={"type": "bpe", "vocab_size": 5000})
    train(config, tmp_path / "run", quiet=True)
    model, tokenizer = load(tmp_path / "run")
    assert model.config.vocab_size == tokenizer.vocab_size < 5000
