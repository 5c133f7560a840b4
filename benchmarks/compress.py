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
from moeforge.compress.measure import Reference
from moeforge.compress.merge import join
from moeforge.compress.plan import Rounding, Row, packable
from moeforge.compress.profile import FORMATS
from moeforge.compress.prune import ORDERS, drop, since, skip
from moeforge.compress.run import Task
from moeforge.compress.solve import CODEBOOK, WHOLE, solve
from moeforge.compress.stream import Streamed, bytes_on_disk
from moeforge.config import build, read_yaml
from moeforge.hub.folder import open_model
from moeforge.hub.store import Format
from moeforge.train import RunConfig

SHARES = (0.125, 0.25, 0.5)
SKIPPED = (0.25, 0.5, 0.75, 0.9)
COLOURS = {"uniform": "C0", "mixed by expert": "C1", "mixed by layer": "C2", "merge": "C9"}
COLOURS |= {f"drop by {order}": f"C{3 + number}" for number, order in enumerate(ORDERS)}
COLOURS |= {"student": "black", "codebooks": "magenta", "mixed with codebooks": "teal"}
PLAIN = ("drop", "merge", "student")
"""How the labels begin that need no rounding beside them."""
Plans = dict[tuple[str, Rounding, str], list[Row]]


def task_of(folder: Path, sizes: tuple[int, int], to_hf: bool = False) -> Task:
    """The run's model, and so many tokens of its own text to calibrate and to measure by."""
    config = build(RunConfig, read_yaml(folder / "config.yaml"), source="benchmark")
    task = Task(folder, *sizes, to_hf=to_hf)
    task.read_text(SimpleNamespace(data=config.data, batch_size=config.batch_size, seq_len=config.seq_len))
    return task


def plans_of(task: Task, base: Path | None) -> Plans:
    """Every plan for one model, by method, rounding and how far it goes."""
    rows, plans = rows_of(task), Plans()
    for format in FORMATS:
        budget = sum(task.record_bytes(row.layer, row.expert, format) for row in rows)
        mixed = {by: solve(task.profile, rows, budget, task.record_bytes, by) for by in ("expert", "layer")}
        for rounding in get_args(Rounding):
            plans["uniform", rounding, format.name] = uniform(rows, format)
            plans["mixed by expert", rounding, format.name] = mixed["expert"]
        plans["mixed by layer", "nearest", format.name] = mixed["layer"]
    plans |= with_codebooks(task, rows)
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


def with_codebooks(task: Task, rows: list[Row]) -> Plans:
    """Vectors alone, in groups as fine, and among the formats of a mixture at the bytes of some others; two bits in
    groups of 64 are nearest to them in bytes."""
    plans: Plans = {("codebooks", "nearest", CODEBOOK.name): uniform(rows, CODEBOOK)}
    for format in (CODEBOOK, Format("vector", 64)):
        plans["codebooks", "gptq", format.name] = uniform(rows, format)
    plans["groups of 64", "gptq", "2x64"] = uniform(rows, Format(2, 64))
    for format in (Format(3, 128), Format(2, 32), Format(2, 128)):
        budget = sum(task.record_bytes(row.layer, row.expert, format) for row in rows)
        mixed = solve(task.profile, rows, budget, task.record_bytes, formats=(*FORMATS, CODEBOOK, WHOLE))
        plans["mixed with codebooks", "gptq", format.name] = mixed
    return plans


def points(
    folder: Path, sizes: tuple[int, int], only: Collection[str], base: Path | None, student: Path | None
) -> Iterator[dict[str, Any]]:
    """What was asked for of one model, as measured."""
    task = task_of(folder, sizes)
    for (method, rounding, at), plan in plans_of(task, base).items():
        if not only or method in only:
            yield {"method": method, "rounding": rounding, "at": at, **measured(task, plan, rounding)}
    if not only or "skip" in only:
        yield from skips(task)
    if not only or "hf" in only:
        yield from for_transformers(task_of(folder, sizes, to_hf=True))
    if student is not None and (not only or "student" in only):
        yield from smaller(task, task_of(student, sizes))


def rows_of(task: Task) -> list[Row]:
    """All experts, kept in 16 bits."""
    return [Row(layer=layer, expert=expert) for layer, expert in packable(task.streamed.config)]


def uniform(rows: list[Row], format: Format) -> list[Row]:
    """Those that are kept, in one format."""
    return [row.replace(bits=format.bits, group=format.group) if row.action == "keep" else row for row in rows]


def skips(task: Task) -> Iterator[dict[str, Any]]:
    """Shares of later choices that are not run; experts stay in 16 bits."""
    for share in SKIPPED:
        task.skip = skip(task.profile, share, task.streamed.config)
        found = measured(task, rows_of(task), "nearest")
        yield {"method": "skip", "rounding": "nearest", "at": f"{share:.0%}", **found}
    task.skip = {}


def for_transformers(task: Task) -> Iterator[dict[str, Any]]:
    """Folders in one format of compressed-tensors, or with a quarter of the experts dropped, or both."""
    fewer = drop(task.profile, rows_of(task), 0.25, "output_error")
    plans: Plans = {("hf", "nearest", "25.0% dropped"): fewer}
    plans["hf", "gptq", "25.0% dropped, 4x128"] = uniform(fewer, Format(4, 128))
    for rounding, format in (("nearest", Format(8, 128)), *product(get_args(Rounding), FORMATS_HF[1:])):
        plans["hf", rounding, format.name] = uniform(rows_of(task), format)
    for (method, rounding, at), plan in plans.items():
        yield {"method": method, "rounding": rounding, "at": at, **measured(task, plan, rounding)}


def smaller(task: Task, student: Task) -> Iterator[dict[str, Any]]:
    """A student in a few formats, judged by its teacher."""
    for format in (Format(8, 128), Format(4, 32), Format(3, 32), Format(2, 32)):
        found = measured(student, uniform(rows_of(student), format), "gptq", task.reference)
        yield {"method": "student", "rounding": "gptq", "at": format.name, **found}


def measured(task: Task, rows: list[Row], rounding: Rounding, reference: Reference | None = None) -> dict[str, Any]:
    """One plan on disk; ``reference`` where another than the task's own model is what it is compared with."""
    task.rounding = rounding
    with TemporaryDirectory() as place:
        target = Path(place) / "model"
        task.job(rows).run(target)
        sizes = bytes_on_disk(target)
        quality = (reference or task.reference).compare(open_model(target))
    bits = 8 * sizes["experts"] / task.num_weights
    found = {"bits_per_weight": bits, "bytes": sum(sizes.values()), "bits_per_byte": quality.bits_after}
    found |= {"original": quality.bits_before, "kl": quality.kl}
    return found | ({"experts_per_token": quality.experts_per_token} if task.skip else {})


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Growth of bits per byte over bytes, the mean over the runs that have uniform plans, one line for each method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
    runs = {row["run"] for row in rows if row["method"] == "uniform"}
    drawn = [row for row in rows if row["method"] in COLOURS and row["run"] in runs]
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
    figure.legend(fontsize=8, loc="outside right center")
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
    parser.add_argument("--students", type=Path, nargs="+", default=[])
    given = parser.parse_args()
    kept = json.loads(given.json.read_text(encoding="utf-8")) if given.only and given.json.exists() else []
    runs = {folder.name for folder in given.runs}
    rows = [row for row in kept if row["method"] not in given.only or row["run"] not in runs]
    for folder, base, student in zip_longest(given.runs, given.base, given.students):
        found = points(folder, (given.tokens, given.held_out), given.only, base, student)
        rows += [{"run": folder.name, **row} for row in found]
    given.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    plot(rows, given.plot)


if __name__ == "__main__":
    main()
