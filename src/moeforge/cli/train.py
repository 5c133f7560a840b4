"""``moeforge train``: one run, from a recipe or a YAML file to a model folder."""

import json
from pathlib import Path
from typing import Annotated

import typer

from moeforge.errors import UserError


def train(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(metavar="RECIPE_OR_YAML", help="See moeforge recipes.")],
    *,
    out: Annotated[Path | None, typer.Option(help="The run folder.", show_default="runs/NAME")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would happen; write nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON object on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, no closing words.")] = False,
) -> None:
    """Train a model.

    Every setting of the recipe can be changed by its dotted name: --steps=200 --model.d_model=128.
    """
    from moeforge import recipes

    config = recipes.load(recipe, context.obj)
    folder = out or Path("runs") / config.name
    if dry_run:
        from moeforge.cli.plan import plan, show_plan

        if resume or quiet:
            raise UserError(f"--{'resume' if resume else 'quiet'} does nothing beside --dry-run: leave one out")
        planned = plan(config, recipes.load(recipe), folder)
        print(json.dumps(planned, indent=2)) if as_json else show_plan(planned)
        return
    from moeforge import train as training
    from moeforge.train.metrics import read_metrics

    model = training.train(config, folder, resume, quiet)
    last = read_metrics(folder / "metrics.jsonl")[-1]
    if as_json:
        print(json.dumps({"out": str(folder), "model": str(model), "metrics": last}))
    elif not quiet:
        print(f"{last['eval/bits_per_byte']:.3f} bits per byte on held-out text. The model is in {model}")
        print(f"  moeforge generate {folder}\n  moeforge analyze {folder}")
