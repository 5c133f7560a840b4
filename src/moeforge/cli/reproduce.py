"""``moeforge reproduce``: a paper's claim beside what comes out here."""

import json
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeforge.errors import UserError

if TYPE_CHECKING:
    from moeforge.data.prepare import TextData
    from moeforge.parallel.layout import Layout
    from moeforge.train import RunConfig


def reproduce(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="A recipe's name, or a YAML file with recipe: in it.")],
    *,
    seeds: Annotated[int, typer.Option(help="How many, from 0.", min=1)] = 3,
    minutes: Annotated[
        float | None, typer.Option(help="Shorten all runs so that they take about this long.", show_default="no limit")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the runs.", show_default="runs/reproduce/NAME")] = None,
    results: Annotated[Path, typer.Option(help="Folder for the JSON file.")] = Path("benchmarks/reproduce"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the JSON too, and nothing else.")] = False,
    nproc: Annotated[int, typer.Option(min=1, help="Processes that train each run.")] = 1,
    ep: Annotated[int, typer.Option(min=1, help="Processes that share the experts between them.")] = 1,
    shard: Annotated[bool, typer.Option("--shard", help="Cut all weights over the processes (FSDP).")] = False,
) -> None:
    """Train a recipe and what its paper compares it with, and print the claim beside the result.

    Settings go to both, as --steps=100. A run that --out already holds is read, not trained again.
    """
    from moeforge.hub.whole import write_text
    from moeforge.parallel.layout import Layout
    from moeforge.recipes.reproduce import here
    from moeforge.recipes.reproduce import reproduce as run

    layout = Layout(ep, shard)
    if nproc == 1 and layout.flags:
        raise UserError(f"{layout.flags[0].partition('=')[0]} needs several processes: add --nproc")
    how = here if nproc == 1 else partial(_in_processes, nproc, layout)
    folder, changes = out or Path("runs/reproduce") / Path(name).stem, list(context.obj)
    if minutes is not None:
        changes.append(f"--steps={_steps(name, changes, seeds, 60 * minutes, folder)}")
    found = run(name, range(seeds), folder, changes, (lambda text: None) if as_json else typer.echo, how)
    target = results / f"{Path(name).stem}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, json.dumps(found, indent=1) + "\n")
    typer.echo(json.dumps(found) if as_json else f"{table(found)}\n{target}")


def _in_processes(nproc: int, layout: "Layout", config: "RunConfig", out: Path, resume: bool, data: "TextData") -> None:
    """``Trainer``: several processes find the text where this one has put it."""
    from moeforge.cli.train import start
    from moeforge.config import to_yaml
    from moeforge.hub.whole import write_text

    with TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        write_text(file, to_yaml(config))
        start(config, out, nproc, layout, [str(file), "--quiet", *(["--resume"] if resume else [])])


def _steps(name: str, changes: list[str], seeds: int, seconds: float, folder: Path) -> int:
    """Steps of each run, so that all of them take ``seconds``. Raises UserError when that is less than ten."""
    from moeforge.recipes.reproduce import arms, seconds_per_step

    if any(change.startswith("--steps") for change in changes):
        raise UserError("--minutes sets the number of steps: leave --steps out")
    pair: list[RunConfig] = list(arms(name, changes).values())
    each = sum(seconds_per_step(config, folder) for config in pair)
    steps = min(pair[0].steps, int(seconds / seeds / each))
    if steps < 10:
        raise UserError(f"a step of both takes {each:.1f} s: {seconds / 60:g} minutes are too few for {seeds} seeds")
    return steps


def table(found: dict[str, Any]) -> str:
    """Claim, both arms with their spread over seeds, and the verdict."""
    common = ("bits_per_byte", "experts_per_token", "load_entropy", "flops_per_token", "seconds")
    columns = tuple(dict.fromkeys((*common, found["by"])))
    lines = [found["claim"], f"arXiv:{found['arxiv']}", "", f"{'':32}" + "".join(f"{c:>24}" for c in columns)]
    for label, runs in found["runs"].items():
        cells = [_spread([run[column] for run in runs]) for column in columns]
        lines.append(f"{label:32}" + "".join(f"{cell:>24}" for cell in cells))
    gain = _spread(found["gain"])
    lines += ["", f"{found['verdict']}: gain in {found['by'].replace('_', ' ')} {gain} over seeds {found['seeds']}"]
    return "\n".join([*lines, f"differs from the paper: {found['differs']}"] if found["differs"] else lines)


def _spread(values: list[float]) -> str:
    """Mean, and half the range."""
    mean, half = sum(values) / len(values), (max(values) - min(values)) / 2
    digits = 4 if abs(mean) < 100 else 0
    return f"{mean:,.{digits}f}" + (f" +- {half:,.{digits}f}" if len(values) > 1 else "")
