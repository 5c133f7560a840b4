"""``moeforge inspect``: layers, parameters, FLOPs and memory of a recipe or of any model folder, weights unread."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from moeforge.errors import UserError

if TYPE_CHECKING:
    from moeforge.models import ModelConfig


class Found(NamedTuple):
    """What there is to count."""

    family: str
    config: "ModelConfig"
    bytes_per_weight: int = 4
    stored: str | None = None
    """How its weights are quantised on disk."""
    packed: dict[str, Any] | None = None
    """Its experts as ``moeforge compress`` packed them."""


def inspect(
    context: typer.Context,
    what: Annotated[str, typer.Argument(metavar="RECIPE_OR_MODEL", help="A recipe, a YAML file, or a model folder.")],
    *,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")] = False,
    detail: Annotated[bool, typer.Option("--detail", help="With --json: every layer, FLOPs and memory too.")] = False,
) -> None:
    """Show family, layers, total and active parameters, FLOPs, memory, and how fast this machine could write.

    Of a model folder only config.json is read. Any setting of a recipe can be changed on the way: --model.d_model=128.
    """
    from rich.console import Console

    from moeforge.cli.sizes import describe, show, summarise, with_packed
    from moeforge.cli.speed import show_speed

    if detail and not as_json:
        raise UserError("the tables show every layer anyway: --detail goes with --json")
    found = _find(what, context.obj)
    tree = describe(found.config, found.bytes_per_weight)
    if found.packed:
        tree = with_packed(tree, found.config, found.bytes_per_weight, found.packed)
    if as_json:
        print(json.dumps(summarise(found.family, tree) | ({"detail": tree} if detail else {}), indent=2))
        return
    console = Console()
    stored = f", stored as {found.stored}: sizes are those once opened" if found.stored else ""
    print(f"{found.family}{stored or (', experts packed' if found.packed else '')}")
    show(tree, console)
    show_speed(tree)


def _find(what: str, settings: list[str]) -> Found:
    from moeforge.cli.sizes import with_vocabulary
    from moeforge.hub.folder import MODEL_TYPE, config_json, model_folder, understand
    from moeforge.hub.store import PACKED
    from moeforge.recipes import load as load_recipe

    if not Path(what).is_dir():
        return Found(MODEL_TYPE, with_vocabulary(load_recipe(what, settings)))
    if settings:
        raise UserError(f"{settings[0]}: a trained model's settings are fixed; only a recipe's can be changed")
    folder = model_folder(Path(what))
    fields: dict[str, Any] = config_json(folder)
    stored = fields.pop("quantization_config", None)
    if stored is not None:
        fields.setdefault("dtype", "bfloat16")
    config, size = understand(fields, folder)
    return Found(fields["model_type"], config, size, (stored or {}).get("quant_method"), fields.get(PACKED))
