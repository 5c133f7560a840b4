"""The project's own source as syntax trees: what every architecture test reads."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
SRC = ROOT / "src" / "moeforge"

Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = Function | ast.ClassDef


@cache
def python_files(*folders: str) -> tuple[Path, ...]:
    """Every Python file below these folders of the repository, in a fixed order. Folders may be absent."""
    return tuple(sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py")))


@cache
def parse(path: Path) -> ast.Module:
    """The syntax tree of one file."""
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def place(path: Path, node: ast.AST | None = None) -> str:
    """``src/moeforge/moe/layer.py:12``, for a list of violations."""
    line = getattr(node, "lineno", None)
    return f"{path.relative_to(ROOT)}{f':{line}' if line else ''}"


def functions(tree: ast.AST) -> Iterator[Function]:
    """Every function in the tree, methods and nested ones included."""
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def public(node: ast.Module | ast.ClassDef) -> Iterator[Definition]:
    """Classes and functions that others may call: no leading underscore on them or on what holds them."""
    for child in node.body:
        if isinstance(child, Definition) and not child.name.startswith("_"):
            yield child
            if isinstance(child, ast.ClassDef):
                yield from public(child)


def without_docstring(body: list[ast.stmt]) -> list[ast.stmt]:
    """The statements of a body, less a leading string."""
    match body:
        case [ast.Expr(value=ast.Constant(value=str())), *rest]:
            return rest
    return body


def identifiers(tree: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Names that the code gives or uses, and strings that look like one (tags of configs, keys, attributes)."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name) | ast.keyword(arg=str(name)):
                yield name, node
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name, node
            case ast.alias(name=name, asname=asname):
                yield asname or name, node
            case ast.Constant(value=str(text)) if re.fullmatch(r"\w+(-\w+)*", text):
                yield text, node
