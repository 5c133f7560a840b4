"""``moeforge compare``: any recipes side by side at equal FLOPs."""

from pathlib import Path
from typing import Annotated

import typer


def compare(
    context: typer.Context,
    names: Annotated[list[str], typer.Argument(help="Recipes or YAML files; the first one's FLOPs are everybody's.")],
    *,
    minutes: Annotated[
        float | None, typer.Option(help="Shorten all runs so that they take about this long.", show_default="no limit")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the runs and compare.png.")] = Path("runs/compare"),
) -> None:
    """Train recipes at equal FLOPs and compare loss, experts per token and balance in one table and one picture.

    Settings go to all of them, as --steps=100. A run that --out already holds is read, not trained again.
    """
    from moeforge.analyze import check_packages
    from moeforge.recipes.compare import compare as run

    check_packages()
    runs = run(names, out, context.obj, minutes, say=typer.echo)
    columns = ("bits_per_byte", "experts_per_token", "load_entropy", "steps", "flops_per_token", "seconds")
    typer.echo("\n" + f"{'':24}" + "".join(f"{column:>19}" for column in columns))
    for compared in runs:
        values = [getattr(compared.result, column) for column in columns]
        cells = [f"{value:,}" if isinstance(value, int) else f"{value:,.4f}" for value in values]
        typer.echo(f"{compared.config.name:24}" + "".join(f"{cell:>19}" for cell in cells))
    typer.echo(f"picture: {out / 'compare.png'}")
