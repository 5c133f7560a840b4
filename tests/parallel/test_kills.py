"""One process of a run after another is killed at a random instant; what is lost is what came after a checkpoint."""

import os
import random
import signal
import time
from pathlib import Path

import pytest

from moeforge.train.checkpoint import checkpoints
from moeforge.train.metrics import read_metrics
from tests.parallel.test_launch import children, start, tiny, until  # noqa: F401

pytestmark = [pytest.mark.dist, pytest.mark.slow]
KILLS, STEPS, EVERY = 20, 600, 7
SETTINGS = ["--nproc=2", "--ep=2", "--quiet", f"--steps={STEPS}", f"--save_every={EVERY}"]


def newest(out: Path) -> int:
    return max((int(path.name[5:]) for path in checkpoints(out / "checkpoints")), default=0)


def killed(arguments: list[object], out: Path, instants: random.Random) -> float | None:
    """Kills a process from when it begins to import to when it has long been training; seconds until all had stopped.

    None when the run was done before.
    """
    run = start("moeforge", "train", *arguments)
    until(lambda: len(children(run.pid)) == 2, run)
    workers = children(run.pid)
    if not newest(out):
        until(lambda: newest(out), run)
    time.sleep(instants.uniform(0, 8))
    if run.poll() is not None:
        return None
    rank = instants.randrange(2)
    os.kill(workers[rank], signal.SIGKILL)
    begun = time.monotonic()
    _, said = run.communicate(timeout=60)
    taken = time.monotonic() - begun
    assert run.returncode == 2 and f"process {rank} of 2 was killed by SIGKILL" in said, said
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers.values())
    return taken


@pytest.mark.parametrize("background", ["false", "true"])
def test_twenty_kills_lose_no_step_beyond_the_last_checkpoint(tiny, tmp_path, background):  # noqa: F811
    instants, settings = random.Random(20), [*SETTINGS, f"--save_in_background={background}"]
    out, whole, taken, lost = tmp_path / "run", tmp_path / "whole", [], []
    arguments = [tiny, "--out", out, *settings]
    for _ in range(KILLS):
        before = newest(out)
        seconds = killed(arguments, out, instants)
        arguments = [out / "config.yaml", "--out", out, *settings, "--resume"]
        if seconds is None:
            break
        taken.append(seconds)
        lines = read_metrics(out / "metrics.jsonl")
        lost.append(lines[-1]["step"] - newest(out))
        assert newest(out) >= before and lost[-1] <= EVERY * (1 if background == "false" else 2)
    for folder, given in ((out, arguments), (whole, [tiny, "--out", whole, *settings])):
        run = start("moeforge", "train", *given)
        _, said = run.communicate(timeout=300)
        assert run.returncode == 0, said
        assert not list((folder / "checkpoints").glob(".*"))
    ours, uninterrupted = (read_metrics(folder / "metrics.jsonl") for folder in (out, whole))
    print(f"{len(taken)} kills; stopped after at most {max(taken):.1f} s; steps lost: {lost}")
    assert len(taken) == KILLS and max(taken) < 30
    assert [line["step"] for line in ours] == [*range(1, STEPS + 1)]
    assert [line["loss/lm"] for line in ours] == [line["loss/lm"] for line in uninterrupted]
