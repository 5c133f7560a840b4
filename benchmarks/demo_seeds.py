"""The demo's comparison over three seeds: does PR-MoE end below its dense twin each time? Writes ``demo_seeds.json``.

Trains the demo's own pairs; ``--parallel 2`` gives each run one of two cores. Arms that --out already holds are kept.
"""

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from report import write

from moeforge import recipes
from moeforge.cli.analyze import read_run
from moeforge.cli.demo import ARMS, summarise, twins
from moeforge.data.prepare import prepare
from moeforge.recipes.reproduce import trained
from moeforge.train import RunConfig


def config_of(arm: str, seed: int) -> RunConfig:
    """What ``moeforge demo --seed`` trains."""
    return twins(recipes.load("pr-moe", [f"--seed={seed}"]))[arm]


def run_arm(arm: str, seed: int, folder: Path, threads: int) -> None:
    """One run in its own process."""
    config = config_of(arm, seed)
    if (folder / "model" / "config.json").exists():
        # Nothing to do, but for other settings, which it refuses.
        trained(config, folder, prepare(config.data, config.tokenizer))
        return
    command = [sys.executable, __file__, "--out", str(folder), "--arm", arm, "--seeds", str(seed)]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": str(threads)})


def main() -> None:
    """Every pair, then the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("demo_seeds"))
    parser.add_argument("--parallel", type=int, default=1)
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    wanted = parser.parse_args()
    if wanted.arm:
        config = config_of(wanted.arm, wanted.seeds[0])
        trained(config, wanted.out, prepare(config.data, config.tokenizer))
        return
    threads = max(1, (os.cpu_count() or 1) // wanted.parallel)
    folders = {(seed, arm): wanted.out / f"{arm}-{seed}" for seed in wanted.seeds for arm in ARMS}
    with ThreadPoolExecutor(wanted.parallel) as pool:
        list(pool.map(lambda item: run_arm(item[0][1], item[0][0], item[1], threads), folders.items()))
    config = config_of(ARMS[0], wanted.seeds[0])
    data = prepare(config.data, config.tokenizer)
    results = {}
    for seed in wanted.seeds:
        summary = summarise([read_run(folders[seed, arm], data) for arm in ARMS])
        results[f"seed {seed}"] = summary
        print(seed, *(f"{arm} {summary[arm]['bits_per_byte']:.4f}" for arm in ARMS), f"margin {summary['margin']:.4f}")
    write("demo_seeds", {"threads": threads, "parallel": wanted.parallel, **results})


if __name__ == "__main__":
    main()
