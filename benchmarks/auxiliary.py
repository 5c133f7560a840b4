"""Half of a trained model's chosen experts as vectors (arXiv:2503.00634), tuned; writes ``auxiliary.json``.

Beside it, tuned as long: all experts as they were, nothing but the vectors, the main experts alone with the weights
they had among all, and with weights of their own. Runs that ``--out`` already holds are kept.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from report import HERE, write

from moeforge.config import Tree, build, merge
from moeforge.data.packing import evaluation_batches
from moeforge.data.prepare import TextData, prepare
from moeforge.evaluate import bits_per_byte
from moeforge.hub import load
from moeforge.models import measure
from moeforge.recipes.catalogue import load_tree
from moeforge.recipes.reproduce import trained
from moeforge.train import RunConfig

SHAPES: dict[str, tuple[int, int, int]] = {"2 of 16": (16, 128, 2), "4 of 32": (32, 64, 4)}
"""Experts, their width, and how many a token has; half of those are main."""
LONG, TUNED = 400, 100


def of(shape: str, seed: int, steps: int, **changes: Any) -> Tree:
    """The recipe ``mixtral`` with other experts; nothing is measured before the end."""
    num_experts, d_expert, k = SHAPES[shape]
    moe = {"experts": {"num_experts": num_experts, "d_expert": d_expert}, "router": {"select": {"k": k}}}
    tree = merge(load_tree("mixtral"), {"model": {"d_model": 128, "moe": moe}})
    return tree | {"seed": seed, "steps": steps, "eval_every": steps} | changes


def arms(shape: str) -> dict[str, Tree]:
    """Changes to the router, and what does not move."""
    k = SHAPES[shape][2]
    half: Tree = {"select": {"type": "auxiliary", "k": k, "main": k // 2}}
    alone: Tree = {"select": {"k": k // 2}}
    if k == 2:  # a weight normalised over one is one, and teaches the gate nothing
        alone |= {"gate": {"frozen": True}}
    return {
        "all": {},
        "vectors": {"router": half},
        "vectors alone": {"router": half, "phases": [{"steps": 1, "trains": ["*.auxiliary"]}]},
        "without vectors": {"router": half, "phases": [{"steps": 1, "holds": ["*.auxiliary"]}]},
        "fewer": {"router": alone},
    }


def tuned(shape: str, arm: str, seed: int, start: Path, steps: int) -> RunConfig:
    """The run of one arm."""
    changes = arms(shape)[arm]
    tree = of(shape, seed, steps, start_from=str(start), phases=changes.get("phases", []))
    router = changes.get("router", {}) | {"losses": []}  # a balance of fewer choices is another aim
    tree = merge(tree, {"model": {"moe": {"router": router}}, "optimizer": {"lr": 0.001}})
    return build(RunConfig, tree)


def one_seed(shape: str, seed: int, out: Path, data: TextData) -> dict[str, Any]:
    """Bits per byte before and after tuning, and active parameters, of every arm."""
    name, found = shape.replace(" ", "-"), {}
    start = out / f"{name}-{seed}"
    trained(build(RunConfig, of(shape, seed, LONG)), start, data)
    for arm in arms(shape):
        folder = out / f"{name}-{seed}-{arm.replace(' ', '-')}"
        config = tuned(shape, arm, seed, start, TUNED)
        trained(config, folder, data)
        model, _ = load(folder)
        batches = list(evaluation_batches(data.validation, config.batch_size, config.seq_len, 200_000))
        found[arm] = {"bits_per_byte": bits_per_byte(model, batches).bits_per_byte}
        missing = model.load_state_dict(load(start)[0].state_dict(), strict=False).missing_keys
        for key in missing:
            model.get_parameter(key).data.zero_()  # vectors start as ones, stored less one
        found[arm]["untuned"] = bits_per_byte(model, batches).bits_per_byte
        found[arm]["active"] = measure(model.config).active.without_embeddings
        print(shape, seed, arm, found[arm], flush=True)
    return found


def main() -> None:
    """Every shape and seed, then their means."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--out", type=Path, default=Path("auxiliary"))
    wanted = parser.parse_args()
    config = build(RunConfig, of(wanted.shapes[0], 0, LONG))
    data = prepare(config.data, config.tokenizer)
    file = HERE / "auxiliary.json"
    found = json.loads(file.read_text(encoding="utf-8"))["results"] if file.exists() else {"steps": [LONG, TUNED]}
    for shape in wanted.shapes:
        seeds = found.setdefault(shape, {}).setdefault("seeds", {})
        for seed in wanted.seeds:
            seeds[str(seed)] = one_seed(shape, seed, wanted.out, data)
        values = {arm: [seed[arm] for seed in seeds.values()] for arm in arms(shape)}
        mean = {
            arm: {key: statistics.fmean(one[key] for one in each) for key in each[0]} for arm, each in values.items()
        }
        found[shape]["mean"] = mean
        write("auxiliary", found)


if __name__ == "__main__":
    main()
