"""One process of a run after another is killed at a random instant; what is lost is what came after a checkpoint."""

import os
import random
import signal
import time
from pathlib import Path

import pytest

from moeforge.train.checkpoint import checkpoints
from moeforge.train.metrics import Line, read_metrics
from tests.parallel.processes import children, start, until

pytestmark = [pytest.mark.dist, pytest.mark.slow]
KILLS, EVERY = 20, 7
SETTINGS = ["--nproc=2", "--ep=2", "--quiet", f"--save_every={EVERY}"]


def newest(out: Path) -> int:
    return max((int(path.name[5:]) for path in checkpoints(out / "checkpoints")), default=0)


def killed(arguments: list[object], out: Path, instants: random.Random) -> float:
    """Kills a process at an instant between its first import and long training; seconds until all had stopped."""
    run = start("moeforge", "train", *arguments)
    until(lambda: len(children(run.pid)) == 2, run)
    workers, rank = children(run.pid), instants.randrange(2)
    if not newest(out):
        until(lambda: newest(out), run)
    time.sleep(instants.uniform(0, 8))
    os.kill(workers[rank], signal.SIGKILL)
    begun = time.monotonic()
    _, said = run.communicate(timeout=60)
    taken = time.monotonic() - begun
    assert run.returncode == 2 and f"process {rank} of 2 was killed by SIGKILL" in said, said
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers.values())
    return taken


def interrupted(arguments: list[object], out: Path, step: int) -> list[Line]:
    """Stops in good order some time after ``step``; the metrics."""
    run = start("moeforge", "train", *arguments)
    until(lambda: newest(out) > step, run, seconds=300)
    run.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 130, said
    assert not list((out / "checkpoints").glob(".*")), "half a checkpoint is left"
    return read_metrics(out / "metrics.jsonl")


def kills(tiny: Path, folder: Path, background: str) -> dict[str, object]:
    """What they cost; ``benchmarks/parallel_kills.py`` writes it down."""
    instants, settings = random.Random(20), [*SETTINGS, f"--save_in_background={background}"]
    out, whole, taken, lost = folder / "run", folder / "whole", [], []
    arguments = [tiny, "--out", out, *settings]
    for _ in range(KILLS):
        before = newest(out)
        taken.append(killed(arguments, out, instants))
        arguments = [out / "config.yaml", "--out", out, *settings, "--resume"]
        lost.append(read_metrics(out / "metrics.jsonl")[-1]["step"] - newest(out))
        assert newest(out) >= before and lost[-1] <= EVERY * (1 if background == "false" else 2)
    ours = interrupted(arguments, out, newest(out))
    uninterrupted = interrupted([tiny, "--out", whole, *settings], whole, len(ours))[: len(ours)]
    assert max(taken) < 30
    assert [line["step"] for line in ours] == [*range(1, len(ours) + 1)]
    assert [line["loss/lm"] for line in ours] == [line["loss/lm"] for line in uninterrupted]
    return {"seconds_until_all_stopped": taken, "steps_lost": lost, "steps": len(ours), "checkpoint_every": EVERY}


@pytest.mark.parametrize("background", ["false", "true"])
def test_twenty_kills_lose_no_step_beyond_the_last_checkpoint(tiny, tmp_path, background):
    print(kills(tiny, tmp_path, background))
