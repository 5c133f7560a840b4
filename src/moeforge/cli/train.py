"""``moeforge train``: one run, from a recipe or a YAML file to a model folder."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moeforge.cli.layout import ByIndex, Fetch, Offload, Placement, Tp, TwoLevel, Uneven
from moeforge.errors import UserError
from moeforge.parallel.launch import is_worker, launch, one_voice
from moeforge.parallel.layout import Layout

if TYPE_CHECKING:
    from moeforge.parallel.ranks import Ranks
    from moeforge.train import RunConfig


def train(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(metavar="RECIPE_OR_YAML", help="See moeforge recipes.")],
    *,
    out: Annotated[Path | None, typer.Option(help="The run folder.", show_default="runs/NAME")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would happen; write nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON object on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, no closing words.")] = False,
    nproc: Annotated[int, typer.Option(min=1, help="Processes to start on this machine.")] = 1,
    ep: Annotated[int, typer.Option(min=1, help="Processes that share the experts between them.")] = 1,
    shard: Annotated[bool, typer.Option("--shard", help="Cut all weights over the processes (FSDP).")] = False,
    node_size: Annotated[
        int | None, typer.Option(min=1, help="Processes that count as one machine.", show_default="as they are")
    ] = None,
    two_level: TwoLevel = False,
    chunks: Annotated[int, typer.Option(min=0, help="Exchange in so many parts; 0: what proves fastest.")] = 1,
    uneven: Uneven = False,
    fetch: Fetch = False,
    by_index: ByIndex = False,
    tp: Tp = 1,
    rebalance: Annotated[int, typer.Option(min=0, help="Move experts by load, every so many steps.")] = 0,
    placement: Placement = None,
    offload: Offload = False,
) -> None:
    """Train a model.

    Every setting of the recipe can be changed by its dotted name: --steps=200 --model.d_model=128.
    For several machines, torchrun -m moeforge train ...: --ep and --shard mean the same there.
    """
    from moeforge import recipes

    config = recipes.load(recipe, context.obj)
    folder = out or Path("runs") / config.name
    layout = Layout(ep, shard, node_size, two_level, chunks, uneven, placement, fetch, tp, by_index, rebalance, offload)
    if dry_run:
        from moeforge.cli.dry_run import look_ahead, show

        given = {"--resume": resume, "--quiet": quiet, "--nproc": nproc > 1}
        for name in (*(name for name, is_given in given.items() if is_given), *layout.flags):
            raise UserError(f"{name} does nothing beside --dry-run: leave one out")
        planned = look_ahead(config, recipes.load(recipe), folder)
        print(json.dumps(planned, indent=2)) if as_json else show(planned)
    elif is_worker():
        if nproc > 1:
            raise UserError("torchrun has started the processes: leave --nproc out")
        with one_voice():
            from moeforge.parallel.together import join

            with join(layout) as ranks:
                _train(config, folder, resume, quiet, as_json, ranks)
    elif nproc > 1:
        flags = [name for name, given in {"--resume": resume, "--json": as_json, "--quiet": quiet}.items() if given]
        start(config, folder, nproc, layout, [recipe, *context.obj, *flags])
    elif layout.flags:
        raise UserError(f"{layout.flags[0].partition('=')[0]} needs several processes: add --nproc")
    else:
        _train(config, folder, resume, quiet, as_json, None)


def start(config: "RunConfig", folder: Path, nproc: int, layout: Layout, arguments: list[str]) -> None:
    """Trains in processes of their own; ``arguments`` are those of this verb that make ``config``."""
    from moeforge.train.loop import choose_device, resume_command

    layout.check(nproc)
    layout.check_device(choose_device(config.device).type)
    layout.check_model(config.model)
    again = " ".join([resume_command(folder), "--nproc", str(nproc), *layout.flags])
    launch(nproc, ["train", *arguments, f"--out={folder}", *layout.flags], again, folder / "logs")


def _train(config: "RunConfig", folder: Path, resume: bool, quiet: bool, as_json: bool, ranks: "Ranks | None") -> None:
    from moeforge import train as training
    from moeforge.parallel.ranks import ALONE
    from moeforge.train.metrics import read_metrics

    ranks = ranks or ALONE
    model = training.train(config, folder, resume, quiet, ranks=ranks)
    if not ranks.first:
        return
    last = read_metrics(folder / "metrics.jsonl")[-1]
    if as_json:
        print(json.dumps({"out": str(folder), "model": str(model), "metrics": last}))
    elif not quiet:
        print(f"{last['eval/bits_per_byte']:.3f} bits per byte on held-out text. The model is in {model}")
        print(f"  moeforge generate {folder}\n  moeforge analyze {folder}")
