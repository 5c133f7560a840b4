"""Loss against bytes: every format alone, mixed by expert and by layer at the same bytes, each rounded to nearest and
for the calibration text, and orders of pruning.

    python benchmarks/compress.py RUN_FOLDER... --json benchmarks/compress.json --plot docs/compress.png

Run folders are of one recipe trained with several seeds. Everything is written, reloaded and measured on held-out text.
"""

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, get_args

from moeforge.compress.measure import bytes_on_disk
from moeforge.compress.merge import join
from moeforge.compress.plan import Rounding, Row, packable
from moeforge.compress.profile import FORMATS
from moeforge.compress.prune import ORDERS, drop
from moeforge.compress.run import Task
from moeforge.compress.solve import solve
from moeforge.config import build, read_yaml
from moeforge.hub.folder import open_model
from moeforge.train import RunConfig

SHARES = (0.125, 0.25, 0.5)
COLOURS = {"uniform": "C0", "mixed by expert": "C1", "mixed by layer": "C2", "merge": "C9"}
COLOURS |= {f"drop by {order}": f"C{3 + number}" for number, order in enumerate(ORDERS)}


def points(folder: Path, tokens: int, held_out: int) -> list[dict[str, Any]]:
    """Every plan for one model, as measured."""
    config = build(RunConfig, read_yaml(folder / "config.yaml"), source="benchmark")
    task = Task(folder, tokens, held_out)
    task.read_text(SimpleNamespace(data=config.data, batch_size=config.batch_size, seq_len=config.seq_len))
    rows = [Row(layer=layer, expert=expert) for layer, expert in packable(task.streamed.config)]
    plans: dict[tuple[str, Rounding, str], list[Row]] = {}
    for format in FORMATS:
        uniform = [row.replace(bits=format.bits, group=format.group) for row in rows]
        budget = sum(task.record_bytes(row.layer, row.expert, format) for row in rows)
        mixed = {by: solve(task.profile, rows, budget, task.record_bytes, by) for by in ("expert", "layer")}
        for rounding in get_args(Rounding):
            plans["uniform", rounding, format.name] = uniform
            plans["mixed by expert", rounding, format.name] = mixed["expert"]
        plans["mixed by layer", "nearest", format.name] = mixed["layer"]
    for order in ORDERS:
        for share in SHARES:
            plans[f"drop by {order}", "nearest", f"{share:.1%}"] = drop(task.profile, rows, share, order)
    for share in SHARES:
        plans["merge", "nearest", f"{share:.1%}"] = join(task.profile, rows, share, task.streamed.config)
    return [
        {"run": folder.name, "method": method, "rounding": rounding, "at": at, **measured(task, plan, rounding)}
        for (method, rounding, at), plan in plans.items()
    ]


def measured(task: Task, rows: list[Row], rounding: Rounding) -> dict[str, Any]:
    """One plan on disk."""
    task.rounding = rounding
    with TemporaryDirectory() as place:
        target = Path(place) / "model"
        task.job(rows).run(target)
        sizes = bytes_on_disk(target)
        quality = task.reference.compare(open_model(target))
    bits = 8 * sizes["experts"] / task.num_weights
    found = {"bits_per_weight": bits, "bytes": sum(sizes.values()), "bits_per_byte": quality.bits_after}
    return {**found, "original": quality.bits_before, "kl": quality.kl}


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Growth of bits per byte over bytes, the mean over runs, one line for each method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for method, rounding in dict.fromkeys((row["method"], row["rounding"]) for row in rows):
        own = [row for row in rows if (row["method"], row["rounding"]) == (method, rounding)]
        drops = method.startswith(("drop", "merge"))
        look = {"label": method if drops else f"{method}, {rounding}", "linestyle": "-" if rounding == "gptq" else "--"}
        look["color"] = COLOURS[method]
        line = []
        for at in dict.fromkeys(row["at"] for row in own):
            some = [row for row in own if row["at"] == at]
            grown = sum(row["bits_per_byte"] / row["original"] - 1 for row in some) / len(some)
            line.append((some[0]["bytes"] / 1e6, 100 * max(grown, 1e-5)))
        axes.plot(*zip(*sorted(line), strict=True), marker="o", markersize=3, **look)
    axes.set(xlabel="MB of weight files", ylabel="bits per byte grown by, %", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--held-out", type=int, default=65536)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--plot", type=Path, required=True)
    given = parser.parse_args()
    rows = [row for folder in given.runs for row in points(folder, given.tokens, given.held_out)]
    given.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    plot(rows, given.plot)


if __name__ == "__main__":
    main()
