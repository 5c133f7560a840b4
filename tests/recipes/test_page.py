"""The page of papers is what the recipes say, and the table of lines what the code is."""

import json
import re
from pathlib import Path

import yaml

from moeforge.recipes import RECIPES, load
from moeforge.recipes.page import FIELDS, lines_per_member, outcome, papers_page, with_outcome

ROOT = Path(__file__).parents[2]


def test_the_page_is_made_from_the_recipes() -> None:
    made = papers_page(ROOT / "benchmarks" / "reproduce")
    written = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
    assert written == made, "run: python -m moeforge.recipes.page"
    assert [name for name in RECIPES if f"| `{name}` |" not in made] == []


def test_a_stored_result_is_on_the_page(tmp_path: Path) -> None:
    run = {"bits_per_byte": 1.5, "experts_per_token": 1.25, "steps": 77, "flops_per_token": 90}
    other = run | {"bits_per_byte": 1.6, "flops_per_token": 100}
    found = {
        "by": "experts_per_token",
        "seeds": [0, 1],
        "verdict": "shows",
        "runs": {"top-p": [run] * 2, "mixtral": [other, run]},
    }
    (tmp_path / "top-p.json").write_text(json.dumps(found))
    page = papers_page(tmp_path)
    assert f"Of {len(RECIPES)} recipes: not run {len(RECIPES) - 1}, shows 1." in page
    assert [field for field in FIELDS if f"`{field}`" not in page] == []
    (row,) = [line for line in page.splitlines() if line.startswith("| `top-p`")]
    said = (
        "1.5000 ± 0.0000 bits per byte against 1.5500 ± 0.0500, 1.2500 ± 0.0000 against 1.2500 ± 0.0000 in experts per "
        "token, 0.90 times its FLOPs per token (2 seeds, 77 steps)"
    )
    assert row.endswith(f"| {said} | shows |")
    recipe = with_outcome("recipe:\n  claim: c\n  expected: >-\n    not yet,\n    sorry\nsteps: 3\n", found)
    assert yaml.safe_load(recipe) == {"recipe": {"claim": "c", "expected": f"{said}: shows."}, "steps": 3}
    assert "`select: top_p`" in row and "https://arxiv.org/abs/2403.07652" in row


def test_every_stored_result_is_what_its_recipe_expects() -> None:
    for file in sorted((ROOT / "benchmarks" / "reproduce").glob("*.json")):
        note = load(file.stem).recipe
        assert note and note.expected == outcome(json.loads(file.read_text(encoding="utf-8"))), file.name


def test_the_table_of_lines_is_right() -> None:
    counted = lines_per_member(ROOT / "src" / "moeforge" / "moe")
    table = dict(re.findall(r"^\| `(\S+)` \| (\d+) \|$", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.M))
    assert {name: int(lines) for name, lines in table.items()} == counted
    assert max(counted.values()) <= 45
