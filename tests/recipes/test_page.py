"""The page of papers is what the recipes say, and the table of lines what the code is."""

import json
import re
from pathlib import Path

from moeforge.recipes import RECIPES
from moeforge.recipes.page import lines_per_member, papers_page

ROOT = Path(__file__).parents[2]


def test_the_page_is_made_from_the_recipes() -> None:
    made = papers_page(ROOT / "benchmarks" / "reproduce")
    written = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
    assert written == made, "run: python -m moeforge.recipes.page"
    assert [name for name in RECIPES if f"| `{name}` |" not in made] == []


def test_a_stored_result_is_on_the_page(tmp_path: Path) -> None:
    run = {"bits_per_byte": 1.5, "experts_per_token": 1.25, "steps": 77}
    found = {
        "by": "experts_per_token",
        "seeds": [0, 1],
        "verdict": "shows",
        "runs": {"top-p": [run] * 2, "mixtral": [run] * 2},
    }
    (tmp_path / "top-p.json").write_text(json.dumps(found))
    (row,) = [line for line in papers_page(tmp_path).splitlines() if line.startswith("| `top-p`")]
    assert row.endswith("| 1.2500 and 1.2500, 2 seeds, 77 steps | shows |")
    assert "`select: top_p`" in row and "https://arxiv.org/abs/2403.07652" in row


def test_the_table_of_lines_is_right() -> None:
    counted = lines_per_member(ROOT / "src" / "moeforge" / "moe")
    table = dict(re.findall(r"^\| `(\S+)` \| (\d+) \|$", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.M))
    assert {name: int(lines) for name, lines in table.items()} == counted
    assert max(counted.values()) <= 45
