"""A shallower student of PR-MoE: taught to the end, for a part of the way, or not at all. Writes ``distill.json``.

The student has the teacher's experts and a layer less (Mixture-of-Students, arXiv:2201.05596, section 4.2).
``--teacher`` names a run that is there already; runs that ``--out`` already holds are kept.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

from report import write

from moeforge import recipes
from moeforge.config import build
from moeforge.data.packing import evaluation_batches
from moeforge.data.prepare import prepare
from moeforge.evaluate import bits_per_byte
from moeforge.hub import load
from moeforge.recipes.catalogue import load_tree
from moeforge.recipes.reproduce import trained
from moeforge.train import RunConfig

ARMS: dict[str, float | None] = {"none": None, "full": 1.0, "staged": 0.6}
"""Share of the steps with a teacher."""


def student(teacher: Path, arm: str, seed: int, steps: int) -> RunConfig:
    """PR-MoE without its third layer."""
    tree = load_tree("pr-moe")
    tree |= {"name": f"student-{arm}", "seed": seed, "steps": steps, "save_every": steps, "eval_every": steps}
    tree["model"] |= {"num_layers": 3, "layers": {2: {"moe": {"experts": {"num_experts": 32}}}}}
    if (until := ARMS[arm]) is not None:
        tree["distill"] = {"teacher": str(teacher), "until": until}
    return build(RunConfig, tree)


def main() -> None:
    """Every arm of every seed, then their means."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("distill"))
    parser.add_argument("--teacher", type=Path)
    wanted = parser.parse_args()
    teacher = wanted.teacher or wanted.out / "teacher"
    if wanted.teacher is None:
        trained(recipes.load("pr-moe"), teacher)
    config = student(teacher, "none", 0, wanted.steps)
    data = prepare(config.data, config.tokenizer)

    def score(run: Path) -> float:
        batches = evaluation_batches(data.validation, config.batch_size, config.seq_len, 200_000)
        return bits_per_byte(load(run)[0], batches).bits_per_byte

    found: dict[str, Any] = {"steps": wanted.steps, "teacher": score(teacher)}
    arms: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for seed in wanted.seeds:
        for arm in ARMS:
            folder = wanted.out / f"{arm}-{seed}"
            trained(student(teacher, arm, seed, wanted.steps), folder)
            arms[arm].append(score(folder))
            print(seed, arm, f"{arms[arm][-1]:.4f}", flush=True)
        means = {arm: statistics.fmean(values) for arm, values in arms.items()}
        write("distill", {**found, "seeds": wanted.seeds[: len(arms["none"])], **arms, "mean": means})


if __name__ == "__main__":
    main()
