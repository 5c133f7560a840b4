"""A shallower student of PR-MoE: taught to the end, for a part of the way, or not at all. Writes ``distill.json``.

The student has the teacher's experts and a layer less (Mixture-of-Students, arXiv:2201.05596, section 4.2).
``--teacher`` names a run that is there already; runs that ``--out`` already holds are kept. ``--beside-plain`` measures
PR-MoE and its student beside a plain MoE with as much work per token, all with as many steps, instead.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from report import HERE, write

from moeforge.config import Tree, build
from moeforge.data.packing import evaluation_batches
from moeforge.data.prepare import TextData, prepare
from moeforge.evaluate import bits_per_byte
from moeforge.hub import load
from moeforge.recipes.catalogue import load_tree
from moeforge.recipes.reproduce import trained
from moeforge.train import RunConfig

ARMS: dict[str, float | None] = {"none": None, "full": 1.0, "staged": 0.6}
"""Share of the steps with a teacher."""
TEACHER_STEPS = 300


def pr_moe(name: str, seed: int, steps: int) -> Tree:
    """The recipe's settings; nothing is kept or measured before the end."""
    return load_tree("pr-moe") | {"name": name, "seed": seed, "steps": steps, "save_every": steps, "eval_every": steps}


def student(teacher: Path, arm: str, seed: int, steps: int) -> RunConfig:
    """PR-MoE without its third layer."""
    tree = pr_moe(f"student-{arm}", seed, steps)
    tree["model"] |= {"num_layers": 3, "layers": {2: {"moe": {"experts": {"num_experts": 32}}}}}
    if (until := ARMS[arm]) is not None:
        tree["distill"] = {"teacher": str(teacher), "until": until}
    return build(RunConfig, tree)


def plain() -> RunConfig:
    """Layers and gate of PR-MoE, experts as wide as its MLP and expert together, one for each token, no MLP beside."""
    tree = pr_moe("plain", 0, TEACHER_STEPS)
    tree["model"]["layers"] = {}
    del tree["model"]["moe"]["shared"]
    tree["model"]["moe"]["experts"] = {"num_experts": 32, "d_expert": 256}
    return build(RunConfig, tree)


def beside_plain(teacher: Path, out: Path, data: TextData, score: Callable[[Path], float]) -> dict[str, Any]:
    """Weights and bits per byte of the three, with as many steps as the teacher, seed 0."""
    runs = {"plain": out / "plain", "pr-moe": teacher, "student, full": out / "student-beside-plain"}
    trained(plain(), runs["plain"], data)
    trained(student(teacher, "full", 0, TEACHER_STEPS), runs["student, full"], data)
    found: dict[str, Any] = {"steps": TEACHER_STEPS, "seed": 0}
    for name, run in runs.items():
        weights = sum(parameter.numel() for parameter in load(run)[0].parameters())
        found[name] = {"weights": weights, "bits_per_byte": score(run)}
        print(name, found[name], flush=True)
    return found


def main() -> None:
    """Every arm of every seed, then their means."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("distill"))
    parser.add_argument("--teacher", type=Path)
    parser.add_argument("--beside-plain", action="store_true")
    wanted = parser.parse_args()
    teacher = wanted.teacher or wanted.out / "teacher"
    config = student(teacher, "none", 0, wanted.steps)
    data = prepare(config.data, config.tokenizer)
    if wanted.teacher is None:
        trained(build(RunConfig, pr_moe("teacher", 0, TEACHER_STEPS)), teacher, data)

    def score(run: Path) -> float:
        batches = evaluation_batches(data.validation, config.batch_size, config.seq_len, 200_000)
        return bits_per_byte(load(run)[0], batches).bits_per_byte

    file = HERE / "distill.json"
    before = json.loads(file.read_text(encoding="utf-8"))["results"] if file.exists() else {}
    if wanted.beside_plain:
        return write("distill", before | {"beside_plain": beside_plain(teacher, wanted.out, data, score)})
    found: dict[str, Any] = before | {"steps": wanted.steps, "teacher": score(teacher)}
    arms: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for seed in wanted.seeds:
        for arm in ARMS:
            folder = wanted.out / f"{arm}-{seed}"
            trained(student(teacher, arm, seed, wanted.steps), folder, data)
            arms[arm].append(score(folder))
            print(seed, arm, f"{arms[arm][-1]:.4f}", flush=True)
        means = {arm: statistics.fmean(values) for arm, values in arms.items()}
        write("distill", {**found, "seeds": wanted.seeds[: len(arms["none"])], **arms, "mean": means})


if __name__ == "__main__":
    main()
