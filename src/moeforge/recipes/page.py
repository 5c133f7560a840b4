"""``docs/papers.md``, made by ``python -m moeforge.recipes.page`` from the recipes and what ``reproduce`` stored."""

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moeforge.config import read_yaml
from moeforge.recipes.catalogue import RECIPES, load
from moeforge.train.config import RecipeNote

HEAD = """# Papers

Each row is a recipe: a paper's idea as settings of the same few parts, what it claims, and what came out here. The page
is made from `src/moeforge/recipes/*.yaml` and `benchmarks/reproduce/*.json` by `python -m moeforge.recipes.page`. The
verdict is *shows* when the mean gain over seeds is above twice its standard error; *not run* is what it says.

| recipe | paper | parts it names | claim | compared with | measured | verdict |
|---|---|---|---|---|---|---|
"""
SLOTS = ("attention", "gate", "noise", "score", "select", "weigh", "capacity", "losses", "controller", "experts", "mix")


def papers_page(results: Path) -> str:
    """The page; ``results`` is the folder of JSON files."""
    return HEAD + "".join(f"| {' | '.join(_row(name, results))} |\n" for name in RECIPES)


def _row(name: str, results: Path) -> list[str]:
    note = load(name).recipe
    assert note is not None
    file = results / f"{name}.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
    parts = dict.fromkeys(_parts(read_yaml(RECIPES[name]).get("model", {})))
    paper = f"[{note.title}](https://arxiv.org/abs/{note.arxiv})" + (f" ({note.paper})" if note.paper else "")
    claim = note.claim + (f" *Differs: {note.differs}*" if note.differs else "")
    return [f"`{name}`", paper, ", ".join(parts) or "-", claim, _against(note), _measured(note, found), _verdict(found)]


def _parts(tree: Any, slot: str = "") -> Iterator[str]:
    """``slot: type`` of every member that a recipe names, in order."""
    if isinstance(tree, str) and slot in SLOTS:
        yield f"`{slot}: {tree}`"
    elif isinstance(tree, dict):
        if slot in SLOTS and "type" in tree:
            yield f"`{slot}: {tree['type']}`"
        for key, value in tree.items():
            yield from _parts(value, str(key))
    elif isinstance(tree, list):
        for item in tree:
            yield from _parts(item, slot)


def _against(note: RecipeNote) -> str:
    against = note.against
    what = against.recipe or "itself"
    changed = ", ".join(f"`{setting.removeprefix('--')}`" for setting in against.settings)
    return f"{what}{f' with {changed}' if changed else ''}, by {against.by.replace('_', ' ')}"


def _measured(note: RecipeNote, found: dict[str, Any] | None) -> str:
    if found is None:
        return note.expected
    means = [sum(run[found["by"]] for run in runs) / len(runs) for runs in found["runs"].values()]
    steps = next(iter(found["runs"].values()))[0]["steps"]
    return f"{means[0]:.4f} and {means[1]:.4f}, {len(found['seeds'])} seeds, {steps} steps"


def _verdict(found: dict[str, Any] | None) -> str:
    return found["verdict"] if found else "not run"


def lines_per_member(folder: Path) -> dict[str, int]:
    """Lines of code of every slot member in ``moe/``, with the classes that it alone uses; docstrings left out."""
    counts: dict[str, int] = {}
    for path in sorted(folder.rglob("*.py")):
        slot = path.relative_to(folder).with_suffix("").parts[0]  # a slot is a file, or a folder of them
        nodes = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)]
        members = {node: label for node in nodes if (label := _type_of(node))}
        used = {node: {part.id for part in ast.walk(node) if isinstance(part, ast.Name)} for node in members}
        for node, label in members.items():
            shared = set().union(*(names for other, names in used.items() if other is not node))
            own = [other for other in nodes if other not in members and other.name in used[node] - shared]
            counts[f"{slot}.{label}"] = sum(map(_lines, [node, *own]))
    return counts


def _type_of(node: ast.ClassDef) -> str | None:
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.target.id == "type":
            return str(line.value.value) if isinstance(line.value, ast.Constant) else None
    return None


def _lines(node: ast.ClassDef) -> int:
    """Lines that hold code: strings that stand alone say, they do not do."""
    texts = [part for part in ast.walk(node) if isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant)]
    silent = {line for part in texts for line in range(part.lineno, (part.end_lineno or part.lineno) + 1)}
    spoken = {part.lineno for part in ast.walk(node) if isinstance(part, ast.stmt | ast.arg | ast.keyword | ast.expr)}
    return len((spoken | {node.lineno}) - silent)


if __name__ == "__main__":
    root = Path(__file__).parents[3]
    (root / "docs" / "papers.md").write_text(papers_page(root / "benchmarks" / "reproduce"), encoding="utf-8")
