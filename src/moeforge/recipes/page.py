"""What ``python -m moeforge.recipes.page`` makes from recipes, results and code.

docs/papers.md, the table of lines in CONTRIBUTING.md, and the ``expected`` of each recipe that has a stored result.
"""

import ast
import json
import re
import textwrap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moeforge.config import read_yaml
from moeforge.recipes.catalogue import RECIPES, load
from moeforge.train.config import RecipeNote

HEAD = """# Papers

Each row is a recipe: a paper's idea as settings of the same few parts, what it claims, and what came out here. The page
is made from `src/moeforge/recipes/*.yaml` and `benchmarks/reproduce/*.json` by `python -m moeforge.recipes.page`. Parts
`slot: member` live in `src/moeforge/moe/` in the file or folder of their slot (`gate` in `gates/`, `losses` and
`controller` in `balance/`, `experts` in `bank/`, `mix` in `shared.py`); `moeforge recipes show NAME` has every setting.

The verdict is *shows* when the mean gain over seeds is above twice its standard error, with at least the deviation that
seeds alone made in the demo's runs (0.003 bits per byte); a claim about agreement, flips, locality, a gap or the worst
domain needs two seeds. *within* is how far behind still counts, where
the claim is to be as good or to cost less at no loss. *not run* is what it says.

"""
TABLE = """| recipe | paper | parts it names | claim | compared with | measured | verdict |
|---|---|---|---|---|---|---|
"""
SLOTS = ("attention", "gate", "noise", "score", "select", "weigh", "capacity", "losses", "controller", "experts", "mix")

FIELDS = (
    "momentum",
    "num_repeats",
    "shortcut",
    "attends",
    "heads",
    "token_block",
    "frozen_experts",
    "shared",
    "train_k",
)
"""Settings that are a mechanism by themselves."""


def papers_page(results: Path) -> str:
    """The page; ``results`` is the folder of JSON files."""
    rows = [_row(name, results) for name in RECIPES]
    numbers = Counter(row[-1] for row in rows).most_common()
    summary = f"Of {len(rows)} recipes: {', '.join(f'{verdict} {number}' for verdict, number in numbers)}."
    return f"{HEAD}{summary}\n\n{TABLE}" + "".join(f"| {' | '.join(row)} |\n" for row in rows)


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
    """``slot: type`` of every member that a recipe names, and the ``FIELDS`` that it sets, in order."""
    if isinstance(tree, str) and slot in SLOTS:
        yield f"`{slot}: {tree}`"
    elif isinstance(tree, dict):
        if slot in SLOTS and "type" in tree:
            yield f"`{slot}: {tree['type']}`"
        for key, value in tree.items():
            if key in FIELDS:
                yield f"`{key}`"
            yield from _parts(value, str(key))
    elif isinstance(tree, list):
        for item in tree:
            yield from _parts(item, slot)


def _against(note: RecipeNote) -> str:
    against = note.against
    what = against.recipe or "itself"
    changed = ", ".join(f"`{setting.removeprefix('--')}`" for setting in against.settings)
    within = "" if against.within is None else f", within {against.within:g} bits per byte"
    return f"{what}{f' with {changed}' if changed else ''}, by {against.by.replace('_', ' ')}{within}"


def outcome(found: dict[str, Any]) -> str:
    """What a recipe's ``expected`` says once ``reproduce`` has stored ``found``: numbers and verdict, one sentence."""
    ours, other = found["runs"].values()
    parts = [f"{_mean(ours, 'bits_per_byte')} bits per byte against {_mean(other, 'bits_per_byte')}"]
    if found["by"] != "bits_per_byte":
        parts.append(
            f"{_mean(ours, found['by'])} against {_mean(other, found['by'])} in {found['by'].replace('_', ' ')}"
        )
    work = ours[0]["flops_per_token"] / other[0]["flops_per_token"]
    if abs(work - 1) > 0.02:
        parts.append(f"{work:.2f} times its FLOPs per token")
    length = f"{len(found['seeds'])} seed{'s' * (len(found['seeds']) > 1)}, {ours[0]['steps']} steps"
    return f"{', '.join(parts)} ({length}): {found['verdict']}."


def _mean(runs: list[dict[str, Any]], what: str) -> str:
    values = [run[what] for run in runs]
    spread = f" ± {(max(values) - min(values)) / 2:.4f}" if len(values) > 1 else ""
    return f"{sum(values) / len(values):.4f}{spread}"


def _measured(note: RecipeNote, found: dict[str, Any] | None) -> str:
    return note.expected if found is None else outcome(found).rpartition(":")[0]


def _verdict(found: dict[str, Any] | None) -> str:
    return found["verdict"] if found else "not run"


def lines_per_member(folder: Path) -> dict[str, int]:
    """Lines of code of every slot member in ``moe/``, with the classes that it alone uses; docstrings left out.

    A slot is a file, or a folder where it has grown.
    """
    counts: dict[str, int] = {}
    for path in sorted(folder.rglob("*.py")):
        slot = path.relative_to(folder).with_suffix("").parts[0]
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


def with_outcome(recipe: str, found: dict[str, Any]) -> str:
    """A recipe's YAML text with what came out as its ``expected``."""
    lines = textwrap.fill(outcome(found), 116, initial_indent="    ", subsequent_indent="    ")
    return re.sub(r"^  expected:.*\n(?:    .*\n)*", f"  expected: >-\n{lines}\n", recipe, flags=re.M)


def with_lines(contributing: str, counted: dict[str, int]) -> str:
    """CONTRIBUTING.md with its table of lines made anew."""
    head, rest = contributing.split("| member | lines |\n|---|---|\n")
    table = "".join(f"| `{name}` | {lines} |\n" for name, lines in counted.items())
    return f"{head}| member | lines |\n|---|---|\n{table}\n{rest.partition(chr(10) * 2)[2]}"


def _rewrite(root: Path) -> None:
    """All that is made from recipes, results and code."""
    results, contributing = root / "benchmarks" / "reproduce", root / "CONTRIBUTING.md"
    for file in sorted(results.glob("*.json")):
        recipe, found = RECIPES[file.stem], json.loads(file.read_text(encoding="utf-8"))
        recipe.write_text(with_outcome(recipe.read_text(encoding="utf-8"), found), encoding="utf-8")
    (root / "docs" / "papers.md").write_text(papers_page(results), encoding="utf-8")
    counted = lines_per_member(root / "src" / "moeforge" / "moe")
    contributing.write_text(with_lines(contributing.read_text(encoding="utf-8"), counted), encoding="utf-8")


if __name__ == "__main__":
    _rewrite(Path(__file__).parents[3])
