"""Loss against bytes: every format alone, mixed by expert and by layer at the same bytes, each rounded to nearest and
for the calibration text, and orders of pruning.

    python benchmarks/compress.py RUN_FOLDER... --json benchmarks/compress.json --plot docs/compress.png

Run folders are of one recipe trained with several seeds. Everything is written, reloaded and measured on held-out text.
"""

import argparse
import json
from collections.abc import Collection, Iterator
from itertools import product, zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, get_args

from moeforge.compress.export import FORMATS as FORMATS_HF
from moeforge.compress.measure import bytes_on_disk
from moeforge.compress.merge import join
from moeforge.compress.plan import Rounding, Row, packable
from moeforge.compress.profile import FORMATS
from moeforge.compress.prune import ORDERS, drop, since, skip
from moeforge.compress.run import Task
from moeforge.compress.solve import solve
from moeforge.compress.stream import Streamed
from moeforge.config import build, read_yaml
from moeforge.hub.folder import open_model
from moeforge.hub.store import Format
from moeforge.train import RunConfig

SHARES = (0.125, 0.25, 0.5)
SKIPPED = (0.25, 0.5, 0.75, 0.9)
COLOURS = {"uniform": "C0", "mixed by expert": "C1", "mixed by layer": "C2", "merge": "C9"}
COLOURS |= {f"drop by {order}": f"C{3 + number}" for number, order in enumerate(ORDERS)}
COLOURS |= {"hf": "black", "a layer fewer, distilled": "grey"}
PLAIN = ("drop", "merge", "a layer")
"""How methods begin that leave experts at 16 bits."""
Plans = dict[tuple[str, Rounding, str], list[Row]]


def task_of(folder: Path, tokens: int, held_out: int, to_hf: bool = False) -> Task:
    """The run's model, and its own text."""
    config = build(RunConfig, read_yaml(folder / "config.yaml"), source="benchmark")
    task = Task(folder, tokens, held_out, to_hf=to_hf)
    task.read_text(SimpleNamespace(data=config.data, batch_size=config.batch_size, seq_len=config.seq_len))
    return task


def plans_of(task: Task, base: Path | None) -> Plans:
    """Every plan for one model, by method, rounding and how far it goes."""
    rows = [Row(layer=layer, expert=expert) for layer, expert in packable(task.streamed.config)]
    plans: Plans = {}
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
        if base is not None:
            grown = since(task.profile, Streamed(base))
            plans["drop by router_norm since the base", "nearest", f"{share:.1%}"] = drop(
                grown, rows, share, "router_norm"
            )
    return plans


def points(folder: Path, tokens: int, held_out: int, only: Collection[str], base: Path | None) -> list[dict[str, Any]]:
    """What was asked for of one model, as measured."""
    task, found = task_of(folder, tokens, held_out), []
    for (method, rounding, at), plan in plans_of(task, base).items():
        if not only or method in only:
            found.append({"run": folder.name, "method": method, "rounding": rounding, "at": at})
            found[-1] |= measured(task, plan, rounding)
    for name, extra in {"skip": skips, "hf": for_transformers}.items():
        if not only or name in only:
            task.skip = {}
            found += [{"run": folder.name, "method": name, **row} for row in extra(task, folder, tokens, held_out)]
    return found


def skips(task: Task, *_: Any) -> Iterator[dict[str, Any]]:
    """Shares of later choices that are not run; experts stay in 16 bits."""
    rows = [Row(layer=layer, expert=expert) for layer, expert in packable(task.streamed.config)]
    for share in SKIPPED:
        task.skip = skip(task.profile, share, task.streamed.config)
        yield {"rounding": "nearest", "at": f"{share:.0%}", **measured(task, rows, "nearest")}


def for_transformers(_: Task, folder: Path, tokens: int, held_out: int) -> Iterator[dict[str, Any]]:
    """Folders in one format of compressed-tensors, or with a quarter of the experts dropped, or both."""
    task = task_of(folder, tokens, held_out, to_hf=True)
    rows = [Row(layer=layer, expert=expert) for layer, expert in packable(task.streamed.config)]
    fewer = drop(task.profile, rows, 0.25, "output_error")
    for rounding, format in (("nearest", Format(8, 128)), *product(get_args(Rounding), FORMATS_HF[1:])):
        plan = [row.replace(bits=format.bits, group=format.group) for row in rows]
        yield {"rounding": rounding, "at": format.name, **measured(task, plan, rounding)}
    packed = [row.replace(bits=4, group=128) if row.action == "keep" else row for row in fewer]
    yield {"rounding": "nearest", "at": "25.0% dropped", **measured(task, fewer, "nearest")}
    yield {"rounding": "gptq", "at": "25.0% dropped, 4x128", **measured(task, packed, "gptq")}


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
    found |= {"original": quality.bits_before, "kl": quality.kl}
    return found | ({"experts_per_token": quality.experts_per_token} if task.skip else {})


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Growth of bits per byte over bytes, the mean over runs, one line for each method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    drawn = [row for row in rows if row["method"] in COLOURS]
    for method, rounding in dict.fromkeys((row["method"], row["rounding"]) for row in drawn):
        own = [row for row in drawn if (row["method"], row["rounding"]) == (method, rounding)]
        look = {
            "label": method if method.startswith(PLAIN) else f"{method}, {rounding}",
            "linestyle": "-" if rounding == "gptq" else "--",
        }
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
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--base", type=Path, nargs="+", default=[])
    given = parser.parse_args()
    kept = json.loads(given.json.read_text(encoding="utf-8")) if given.only and given.json.exists() else []
    runs = {folder.name for folder in given.runs}
    rows = [row for row in kept if row["method"] not in given.only or row["run"] not in runs]
    for folder, base in zip_longest(given.runs, given.base):
        rows += points(folder, given.tokens, given.held_out, given.only, base)
    given.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    plot(rows, given.plot)


if __name__ == "__main__":
    main()
