"""``moeforge inspect``: layers, parameters, FLOPs and memory of a recipe or a model."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from moeforge.errors import UserError


def inspect(
    context: typer.Context,
    what: Annotated[str, typer.Argument(metavar="RECIPE_OR_MODEL", help="A recipe, a YAML file, or a model folder.")],
    *,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")] = False,
) -> None:
    """Show layers, total and active parameters, FLOPs and memory.

    Any setting of a recipe can be changed on the way: --model.d_model=128.
    """
    from rich.console import Console

    from moeforge.cli.sizes import show

    tree = _describe(what, context.obj)
    if as_json:
        print(json.dumps(tree, indent=2))
    else:
        show(tree, Console())


def _describe(what: str, settings: list[str]) -> dict[str, Any]:
    from moeforge.cli.sizes import describe, with_vocabulary
    from moeforge.hub import read_config
    from moeforge.recipes import load as load_recipe

    folder = Path(what)
    if not folder.is_dir():
        return describe(with_vocabulary(load_recipe(what, settings)))
    if settings:
        raise UserError(f"{settings[0]}: a trained model's settings are fixed; only a recipe's can be changed")
    return describe(*read_config(folder))
