"""``moeforge recipes``: what can be trained by name, and what each is evidence for."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from moeforge.errors import UserError


class OrPattern(TyperGroup):
    """``moeforge recipes balance`` is short for ``moeforge recipes list balance``."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command, its name, and what is left for it."""
        return super().resolve_command(ctx, args if args[0] in self.commands else ["list", *args])


recipes = typer.Typer(cls=OrPattern, help="List, show and copy recipes.", invoke_without_command=True)

Json = Annotated[bool, typer.Option("--json", help="JSON instead of text.")]
Name = Annotated[str, typer.Argument(help="A recipe's name.")]


@recipes.callback()
def default(context: typer.Context) -> None:
    """List, show and copy recipes; alone it lists them."""
    if context.invoked_subcommand is None:
        show_all()


@recipes.command("list")
def show_all(
    pattern: Annotated[str, typer.Argument(help="In name, title, claim or number.", show_default="all")] = "",
    *,
    as_json: Json = False,
) -> None:
    """List recipes with their claims."""
    from rich.console import Console
    from rich.table import Column, Table

    from moeforge.recipes import RECIPES, load

    notes = {name: load(name).recipe for name in RECIPES}
    notes = {name: note for name, note in notes.items() if pattern.lower() in f"{name} {note}".lower()}
    if not notes:
        raise UserError(f"no recipe has '{pattern}' in it; moeforge recipes lists all {len(RECIPES)}")
    if as_json:
        print(json.dumps([{"name": name, **(note.model_dump() if note else {})} for name, note in notes.items()]))
        return
    table = Table(Column("name", no_wrap=True), "title", "arXiv", "claim")
    for name, note in notes.items():
        table.add_row(name, *((note.title, note.arxiv or "", note.claim) if note else ("", "", "")))
    Console().print(table, highlight=False)


@recipes.command()
def show(
    name: Name,
    *,
    resolved: Annotated[
        bool, typer.Option("--resolved", help="Every setting, inherited ones and defaults too.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show one recipe: the file as written, or every setting that follows from it."""
    from moeforge.config import to_yaml
    from moeforge.recipes import load

    text, config = _read(name), load(name)
    if as_json:
        print(json.dumps({"name": name, "yaml": text, "config": json.loads(config.model_dump_json())}))
    else:
        print((to_yaml(config) if resolved else text).rstrip())


@recipes.command()
def copy(
    name: Name, file: Annotated[Path | None, typer.Argument(help="Where to.", show_default="NAME.yaml")] = None
) -> None:
    """Copy a recipe to a YAML file of your own, for moeforge train FILE."""
    text, target = _read(name), file or Path(f"{name}.yaml")
    try:
        with target.open("x", encoding="utf-8") as out:
            out.write(text)
    except FileExistsError as error:
        raise UserError(f"{target} exists already; name another file") from error
    except OSError as error:
        raise UserError(f"cannot write {target}: {error}") from error
    print(f"{target} is yours: moeforge train {target}")


def _read(name: str) -> str:
    from moeforge.config import nearest
    from moeforge.recipes import RECIPES

    if name not in RECIPES:
        raise UserError(f"there is no recipe '{name}'.{nearest(name, RECIPES)} Valid: {', '.join(RECIPES)}")
    return RECIPES[name].read_text(encoding="utf-8")
