"""Finding recipes and turning one, or a user's own YAML, into a run config."""

from collections.abc import Iterable
from pathlib import Path

from moeforge.config import Tree, build, merge, nearest, override, read_yaml
from moeforge.errors import UserError
from moeforge.train.config import RunConfig

RECIPES: dict[str, Path] = {path.stem: path for path in sorted(Path(__file__).parent.glob("*.yaml"))}


def load(name: str, overrides: Iterable[str] = ()) -> RunConfig:
    """The run that a recipe's name or a YAML file describes, with ``--dotted.name=value`` laid on top.

    Raises UserError for an unknown name, an unreadable file, and for all mistakes in the settings at once.
    """
    return build(RunConfig, override(load_tree(name), overrides), source=name)


def load_tree(name: str) -> Tree:
    """The settings as written, with those of the recipe it ``extends`` below them."""
    tree = read_yaml(_find(name))
    base = tree.pop("extends", None)
    return tree if base is None else merge(_without_note(load_tree(base)), tree)


def _without_note(tree: Tree) -> Tree:
    return {key: value for key, value in tree.items() if key not in ("recipe", "name")}


def _find(name: str) -> Path:
    if name in RECIPES:
        return RECIPES[name]
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.exists():
        return path
    if path.name != name:
        raise UserError(f"{name} is not there: neither a file nor a folder has this path")
    raise UserError(f"there is no recipe '{name}'.{nearest(name, RECIPES)} Valid: {', '.join(RECIPES)}, or a YAML file")
