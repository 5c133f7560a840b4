"""Code that goes along with a model of our own type, so that transformers opens it where moeforge is not installed.

transformers takes remote code from flat files that import each other by ``from .x import y``. These are the modules
that the two classes for ``Auto...`` need, one file each, changed in their imports alone.
"""

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from moeforge import __version__
from moeforge.models.config import ModelConfig

FOLDER = "moeforge_code"
"""Beside the weights, so that a model folder stays easy to read."""
CLASSES = {
    "AutoConfig": ("hub.auto_config", "MoeforgeConfig"),
    "AutoModelForCausalLM": ("hub.auto_model", "MoeforgeForCausalLM"),
}
"""What transformers asks for -> the module below moeforge, and the class in it."""
CODE = ("auto_map", "needs")
"""Fields of ``config.json`` by which ``carry`` says how a model is opened."""
HEADER = """\
# moeforge/{path} of moeforge {version} (Apache-2.0); only its imports are rewritten.
# With it transformers opens this model by trust_remote_code=True where moeforge is not installed. Where it is
# (pip install moeforge), nothing here is read.
"""
EVERYWHERE = {"torch", "transformers", "pydantic", "yaml", *sys.stdlib_module_names}
"""What the code imports wherever it runs; others are for machines that have them."""
SOURCE = Path(__file__).parents[1]


def carry(config: ModelConfig, folder: Path) -> dict[str, Any]:
    """Writes the code for a model below ``folder``; what ``config.json`` has to say about it.

    A model with parts of a third party's is opened by moeforge alone, beside which that party's package is importable:
    its parts are of moeforge's classes, not of copies. It gets no code, and ``needs`` says what opens it.
    """
    foreign = sorted(_foreign(config.model_dump()))
    if foreign:
        return {"needs": ["moeforge", *foreign]}
    target = folder / FOLDER
    target.mkdir(parents=True, exist_ok=True)
    for name, text in files().items():
        (target / name).write_text(text, encoding="utf-8")
    return {"auto_map": {auto: f"{FOLDER}/{_flat(module)}.{name}" for auto, (module, name) in CLASSES.items()}}


def _foreign(tree: Any) -> set[str]:
    """Packages that ``type: package.module:Class`` names somewhere in the settings."""
    below = list(tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ())
    kind = tree.get("type") if isinstance(tree, dict) else None
    own = {kind.split(".")[0].split(":")[0]} if isinstance(kind, str) and ":" in kind else set()
    return own.union(*map(_foreign, below))


@cache
def files() -> dict[str, str]:
    """File name -> text, of every module that the two classes import, directly or not."""
    found: dict[str, str] = {}
    waiting = [module for module, _ in CLASSES.values()]
    while waiting:
        module = waiting.pop()
        name = f"{_flat(module)}.py"
        if name in found:
            continue
        path = _path(module)
        text, needed = rewritten(path.read_text(encoding="utf-8"))
        found[name] = HEADER.format(path=path.relative_to(SOURCE), version=__version__) + text
        waiting += needed
    return found


def rewritten(source: str) -> tuple[str, set[str]]:
    """The text with flat, relative imports in place of moeforge's own, and the modules below moeforge it imports."""
    lines, needed = source.splitlines(keepends=True), set[str]()
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
    for node in sorted(imports, key=lambda node: -node.lineno):
        where = slice(node.lineno - 1, node.end_lineno)
        package, _, module = _imported(node).partition(".")
        if package == "moeforge" and isinstance(node, ast.ImportFrom):
            statements = [(below, text) for alias in node.names for below, text in _statements(module, alias)]
            needed |= {below for below, _ in statements if below}
            lines[where] = [f"{' ' * node.col_offset}{text}\n" for _, text in statements]
        elif node.col_offset or package not in EVERYWHERE:
            lines[where] = _tried(lines[where], " " * node.col_offset)
    return "".join(lines), needed


def _imported(node: ast.Import | ast.ImportFrom) -> str:
    return node.names[0].name if isinstance(node, ast.Import) else node.module or ""


def _tried(lines: list[str], indent: str) -> list[str]:
    """What may be absent, and is only used where it is not: transformers asks for all that is imported outside try."""
    return [
        f"{indent}try:\n",
        *(f"    {line}" for line in lines),
        f"{indent}except ImportError:\n",
        f"{indent}    raise\n",
    ]


def _statements(module: str, alias: ast.alias) -> Iterator[tuple[str, str]]:
    """(module that it needs, statement), for one name of ``from moeforge.module import name``."""
    name, known_as = alias.name, f" as {alias.asname}" if alias.asname else ""
    inner = f"{module}.{name}".removeprefix(".")
    if name == "__version__" and not module:
        yield "", f"__version__ = {__version__!r}"
    elif _path(inner).exists():
        # transformers finds the files that belong together by lines of the form "from .x import y" alone.
        yield inner, f"from .{_flat(inner)} import __doc__ as _"
        yield inner, f"from . import {_flat(inner)} as {alias.asname or name}"
    else:
        yield module, f"from .{_flat(module)} import {name}{known_as}"


def _path(module: str) -> Path:
    """Of a module below moeforge, given its dotted name; of a name inside one, a path where there is nothing."""
    place = SOURCE.joinpath(*module.split("."))
    return place / "__init__.py" if place.is_dir() else place.with_suffix(".py")


def _flat(module: str) -> str:
    return module.replace(".", "_")
