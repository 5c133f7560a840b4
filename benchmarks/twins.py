"""One trained model, compressed on our decoder and in transformers; writes ``twins.json``.

Its weights are GLM-4.5's to us and Solar Open's to transformers: the same mathematics, of which we have a table for the
first. Runs that ``--out`` already holds are kept.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from report import write

from moeforge.compress.run import Task, Wish
from moeforge.config import build, merge
from moeforge.data.prepare import prepare
from moeforge.hub import load
from moeforge.hub.families import FAMILIES
from moeforge.hub.pretrained import save_as
from moeforge.recipes.catalogue import load_tree
from moeforge.recipes.reproduce import trained
from moeforge.train import RunConfig

MODEL = {
    "d_model": 128,
    "tie_embeddings": False,
    "moe": {
        "experts": {"num_experts": 16},
        "shared": {"d_expert": 128},
        "router": {
            "score": "sigmoid",
            "weigh": {"type": "scores", "normalize_weights": True},
            "controller": {"type": "expert_bias"},
            "losses": [],
        },
    },
}
WISHES = {
    "3.125 bits": Wish(bits_per_weight=3.125),
    "2.5 bits": Wish(bits_per_weight=2.5),
    "drop 25 %": Wish(drop=0.25),
    "merge 25 %": Wish(merge=0.25),
}
SIZES = 32_000, 24_000
"""Tokens to calibrate and to measure by."""


def twins(run: Path, folder: Path) -> dict[str, Path]:
    """The run's model in two folders, for our decoder and for transformers."""
    model, tokenizer = load(run)
    found = {"ours": folder / "glm", "theirs": folder / "solar"}
    for path in found.values():
        save_as(model, path, FAMILIES["glm4_moe"], tokenizer=tokenizer)
    file = found["theirs"] / "config.json"
    fields: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    fields |= {"model_type": "solar_open", "architectures": ["SolarOpenForCausalLM"]}
    fields |= {"head_dim": fields["hidden_size"] // fields["num_attention_heads"]}
    fields["rope_parameters"]["partial_rotary_factor"] = 1.0
    file.write_text(json.dumps(fields), encoding="utf-8")
    return found


def main() -> None:
    """Asks for the seeds and steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", type=Path, default=Path("twins"), help="of the runs")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    for seed in options.seeds:
        steps = {"seed": seed, "steps": options.steps, "eval_every": options.steps}
        config = build(RunConfig, merge(load_tree("mixtral"), {"model": MODEL}) | steps)
        run = options.out / f"{seed}"
        trained(config, run, prepare(config.data, config.tokenizer))
        with TemporaryDirectory() as place:
            for name, folder in twins(run, Path(place)).items():
                task = Task(folder, *SIZES)
                task.read_text(config)
                for wish, asked in WISHES.items():
                    target = Path(place) / "packed"
                    job = task.plan(asked)
                    job.run(target)
                    quality = task.reference.compare(task.streamed.open(target))
                    found.setdefault(wish, {}).setdefault(name, []).append(asdict(quality) | {"loss": quality.loss})
                    print(f"seed {seed}, {wish}, {name}: {quality.loss:+.2%}, KL {quality.kl:.4f}", flush=True)
    write("twins", {"steps": options.steps, "seeds": options.seeds, "found": found})


if __name__ == "__main__":
    main()
