"""``moeforge reproduce`` for every recipe: two runs at a time, a thread each, baselines shared. Resumes what --out has.

Writes ``reproduce/NAME.json``, from which ``python -m moeforge.recipes.page`` makes docs/papers.md.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from moeforge.recipes import RECIPES
from moeforge.recipes.reproduce import arms, folder_of, measured, reproduce, text_of

HERE = Path(__file__).parent
TORCH_THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def run_arm(job: tuple[str, str, int], out: Path, steps: int) -> str | None:
    """One run in its own process; what went wrong, or None."""
    name, label, seed = job
    folder = folder_of(label, seed, out)
    if (folder / "measured.json").exists():
        return None
    command = [sys.executable, __file__, "--steps", str(steps), "--out", str(out), "--arm", name, label, str(seed)]
    start = time.monotonic()
    done = subprocess.run(command, env=os.environ | TORCH_THREADS, capture_output=True, text=True)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # a finished run needs none
    print(f"{folder.name}: {time.monotonic() - start:.0f} s", flush=True)
    return f"{folder.name}: {done.stderr.strip().splitlines()[-1]}" if done.returncode else None


def main() -> None:
    """All runs, then a file per recipe whose runs are all there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/reproduce_all"))
    parser.add_argument("--only", nargs="+", metavar="RECIPE", default=[name for name in RECIPES if name != "dense"])
    parser.add_argument("--arm", nargs=3, help=argparse.SUPPRESS)
    wanted = parser.parse_args()
    changes = [f"--steps={wanted.steps}"]
    if wanted.arm:
        name, label, seed = wanted.arm
        config = arms(name, changes)[label].replace(seed=int(seed))
        measured(config, folder_of(label, int(seed), wanted.out), text_of(config))
        return
    named = [(name, label, seed) for seed in range(wanted.seeds) for name in wanted.only for label in arms(name)]
    jobs = {folder_of(label, seed, wanted.out): (name, label, seed) for name, label, seed in reversed(named)}
    with ThreadPoolExecutor(2) as pool:
        said = list(pool.map(lambda job: run_arm(job, wanted.out, wanted.steps), reversed(jobs.values())))
    for name in wanted.only:
        folders = [folder_of(label, seed, wanted.out) for label in arms(name) for seed in range(wanted.seeds)]
        if all((folder / "measured.json").exists() for folder in folders):
            found = reproduce(name, range(wanted.seeds), wanted.out, changes, say=lambda text: None)
            (HERE / "reproduce" / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            print(f"{name}: {found['verdict']}, gain {found['gain']}")
    problems = [problem for problem in said if problem]
    if problems:
        sys.exit("\n".join(["these runs failed:", *problems]))


if __name__ == "__main__":
    main()
