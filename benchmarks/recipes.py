"""Every recipe at its own settings, one seed: bits per byte on the whole validation text. Writes ``recipes.json``."""

import argparse
import tempfile
from pathlib import Path

from report import write

from moeforge.data.packing import evaluation_batches
from moeforge.data.prepare import prepare
from moeforge.evaluate import bits_per_byte
from moeforge.hub import load as open_model
from moeforge.models import measure
from moeforge.recipes import RECIPES, load
from moeforge.train import train
from moeforge.train.metrics import read_metrics

VARIANTS = {
    "pyramid-moe, 32 everywhere": ("pyramid-moe", ["--model.layers={}", "--model.moe.experts.num_experts=32"]),
    "residual-moe, top-2 instead": ("residual-moe", ["--model.moe.shared=null", "--model.moe.router.select.k=2"]),
    "residual-moe, learned coefficient": ("residual-moe", ["--model.moe.shared.mix=coefficient"]),
}


def main() -> None:
    """Trains one after the other; ``--steps`` shortens all alike."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int)
    steps = parser.parse_args().steps
    shorter = [f"--steps={steps}"] if steps else []
    results = {}
    for name, (recipe, changes) in {**{name: (name, []) for name in RECIPES}, **VARIANTS}.items():
        config = load(recipe, [*changes, *shorter])
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "run"
            train(config, out)
            last = read_metrics(out / "metrics.jsonl")[-1]
            model, tokenizer = open_model(out)
        text = prepare(config.data, tokenizer).validation
        score = bits_per_byte(model, evaluation_batches(text, config.batch_size, config.seq_len))
        size = measure(model.config, seq_len=config.seq_len)
        results[name] = {
            "bits_per_byte": score.bits_per_byte,
            "steps": config.steps,
            "total_params": size.total.all,
            "active_params": size.active.all,
            "flops_per_token": size.flops_per_token,
            "seconds": last["perf/total_seconds"],
            "load_entropy": {key[-8:]: value for key, value in last.items() if key.startswith("moe/load_entropy")},
        }
        print(name, f"{score.bits_per_byte:.4f}", flush=True)
        write("recipes", results)


if __name__ == "__main__":
    main()
