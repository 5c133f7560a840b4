"""How ``moeforge plan`` compares with runs on this machine: seconds and bytes of a step, and which mesh is fastest.

The machine is profiled first; then every mesh trains for a few steps, in turn, again and again. ``python
benchmarks/plan_predictions.py --nproc 2`` (and 4) adds to ``plan_predictions.json``; ``--more`` does so for meshes with
tensor groups and rows by index.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from report import HERE, write

from moeforge import recipes
from moeforge.cli.plan import loads_of_run
from moeforge.cli.sizes import with_vocabulary
from moeforge.parallel.plan.cluster import Cluster, read_cluster
from moeforge.parallel.plan.job import Arrangement, Job
from moeforge.parallel.plan.search import candidate, describe
from moeforge.parallel.plan.step import bytes_sent
from moeforge.train.metrics import read_metrics

STEPS, WARM = 14, 4
MODELS = {
    "pr-moe": ("pr-moe", []),
    "pr-moe, 4 times as wide": ("pr-moe", ["--model.d_model=256", "--batch_size=8"]),
}


def run(*arguments: object) -> None:
    """``moeforge ...``, without its words."""
    subprocess.run([sys.executable, "-m", "moeforge", *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    """Profiles, trains, plans, compares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--more", action="store_true")
    options = parser.parse_args()
    size, rounds = options.nproc, options.rounds
    arrangements = meshes(size, options.more)
    with tempfile.TemporaryDirectory() as folder:
        cluster_file = Path(folder) / "here.yaml"
        # The recipes train in float32.
        run("plan", "--profile", "--cluster", cluster_file, "--nproc", size, "--dtype=float32")
        pairs = [(name, arrangement) for name in MODELS for arrangement in arrangements]
        places = [(*pair, Path(folder) / str(number)) for number, pair in enumerate(pairs)]
        for number in range(rounds):
            for name, arrangement, out in places:
                recipe, settings = MODELS[name]
                flags = ["--nproc", size, *arrangement.layout.flags, "--quiet"]
                rest = [*settings, f"--steps={STEPS}", "--eval_every=1000", "--eval_tokens=1", "--save_every=1000"]
                run("train", recipe, *flags, *rest, f"--out={out}_{number}")
        cluster = read_cluster(cluster_file)
        runs = {out: [Path(f"{out}_{number}") for number in range(rounds)] for *_, out in places}
        found = [compared(name, arrangement, runs[out], cluster) for name, arrangement, out in places]
    path = HERE / "plan_predictions.json"
    before = json.loads(path.read_text())["results"] if path.exists() else {}
    key = f"{size}{' more' * options.more}"
    write("plan_predictions", before | {key: {"cluster": cluster.model_dump(exclude_none=True), "meshes": found}})


def meshes(size: int, more: bool) -> list[Arrangement]:
    """On so many processes; of ``more``, the first is there to compare the others with."""
    if not more:
        plain = [Arrangement(size), Arrangement(size, 2), Arrangement(size, 2, shard=True)]
        return plain + [Arrangement(size, size)] * (size > 2)
    expert, cut = size // 2, [Arrangement(size, tensor=2, shard=True)] * (size > 2)
    return [Arrangement(size, 2), Arrangement(size, expert, tensor=2), Arrangement(size, size, way="by_index"), *cut]


def compared(name: str, arrangement: Arrangement, runs: list[Path], cluster: Cluster) -> dict[str, object]:
    """One mesh, planned and measured."""
    recipe, settings = MODELS[name]
    config = recipes.load(recipe, settings)
    model = with_vocabulary(config)
    lines = [line for out in runs for line in read_metrics(out / "metrics.jsonl")[WARM:]]
    loads = loads_of_run(model, runs[0], STEPS)
    job = Job(model, config.batch_size, config.seq_len, config.accumulate, config.dtype == "bfloat16", loads=loads)
    planned = candidate(job, arrangement, cluster)
    kinds = bytes_sent(planned.parts, arrangement)
    seconds = median(line["perf/seconds"] for line in lines)
    print(f"{name}, {describe(arrangement)}: planned {planned.seconds * 1e3:.1f} ms, measured {seconds * 1e3:.1f} ms")
    return {
        "model": name,
        "mesh": describe(arrangement),
        "planned_ms": planned.seconds * 1e3,
        "measured_ms": seconds * 1e3,
        "rounds_ms": [median(x["perf/seconds"] for x in read_metrics(r / "metrics.jsonl")[WARM:]) * 1e3 for r in runs],
        "ratio": planned.seconds / seconds,
        "planned_bytes": kinds,
        "measured_bytes": {kind: median(line[f"sent/{kind}"] for line in lines) for kind in kinds},
    }


if __name__ == "__main__":
    main()
