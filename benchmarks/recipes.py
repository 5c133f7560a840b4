"""Every recipe at its own settings, one seed: bits per byte on the whole validation text. Writes ``recipes.json``."""

import argparse
from dataclasses import asdict
from pathlib import Path

from report import write

from moeforge.recipes import RECIPES, load
from moeforge.recipes.reproduce import measured, text_of

VARIANTS = {
    "pyramid-moe, 32 everywhere": ("pyramid-moe", ["--model.layers={}", "--model.moe.experts.num_experts=32"]),
    "residual-moe, top-2 instead": ("residual-moe", ["--model.moe.shared=null", "--model.moe.router.select.k=2"]),
    "residual-moe, learned coefficient": ("residual-moe", ["--model.moe.shared.mix=coefficient"]),
}


def main() -> None:
    """Trains one after the other; ``--steps`` shortens all alike; a run that ``--out`` holds is read, not trained."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--out", type=Path, default=Path("runs/recipes"))
    parser.add_argument("--only", nargs="+", metavar="RECIPE", help="these recipes and no variants")
    wanted = parser.parse_args()
    shorter = [f"--steps={wanted.steps}"] if wanted.steps else []
    runs = {name: (name, []) for name in wanted.only or RECIPES} | ({} if wanted.only else VARIANTS)
    results = {}
    for name, (recipe, changes) in runs.items():
        config = load(recipe, [*changes, *shorter])
        found = measured(config, wanted.out / name.replace(", ", "-").replace(" ", "-"), text_of(config))
        results[name] = asdict(found)
        print(name, f"{found.bits_per_byte:.4f}", flush=True)
        write("recipes", results)


if __name__ == "__main__":
    main()
