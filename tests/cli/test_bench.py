"""``moeforge bench kernels``: a small case end to end, in a process for each allocator, and what it refuses."""

import importlib
import json
from pathlib import Path

import pytest

from moeforge.cli import bench_kernels
from moeforge.cli.bench_kernels import CASES, Case, chosen, measure
from moeforge.errors import UserError


@pytest.mark.parametrize("case", [Case(4, 2, 64, 32, 24, backward=True), Case(4, 2, 128, 128, 1, bits=4)])
def test_a_case_is_measured_beside_its_peers(case: Case, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(bench_kernels, "limits", lambda: {"read GB/s": 10.0})
    found = measure([case], 3, keep_memory=False)
    row = found["cases"][case.name]
    assert row["best_peer"] in row["variants"] and row["best_peer"] not in (*bench_kernels.ENGINES, "dense")
    assert row["variants"]["dense"]["over_dense"] == 1 and row["times_best_peer"] > 0
    if case.backward:
        kept = {name: variant["kept_bytes_per_edge"] for name, variant in row["variants"].items()}
        assert kept["grouped"] < kept["sorted loop"] and 4 * 32 <= kept[row["ours"]] < 4 * 32 + 64
    bench_kernels.show(found)
    assert case.name in capsys.readouterr().out


def test_the_command_writes_json(call, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_kernels, "CASES", (Case(4, 2, 16, 8, 6),))
    monkeypatch.setattr(bench_kernels, "limits", lambda: {"read GB/s": 10.0})
    out = tmp_path / "found.json"
    code, shown, _ = call("bench", "kernels", "--allocator", "default", "--rounds", "3", "--out", str(out))
    assert code == 0 and "allocator: default" in shown
    assert list(json.loads(out.read_text())["default"]["cases"]) == ["E4 k2 D16 H8 T6 bfloat16 forward"]


def test_what_it_does_not_know_it_refuses(call) -> None:
    assert chosen([]) == list(CASES) and [case.bits for case in chosen(["int4"])] == [4, 4]
    with pytest.raises(UserError, match=r"no case is called like \['E7'\]\. There are: E64 k8 "):
        chosen(["E7"])
    code, _, err = call("bench", "kernels", "--allocator", "mine")
    assert code == 2 and "--allocator is default, kept or both, not 'mine'" in err


def test_the_page_shows_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parents[2]
    monkeypatch.syspath_prepend(root / "benchmarks")
    with_table = importlib.import_module("expert_kernels").with_table
    results = json.loads((root / "benchmarks" / "expert_kernels.json").read_text(encoding="utf-8"))["results"]
    page = (root / "docs" / "kernels.md").read_text(encoding="utf-8")
    assert with_table(page, results) == page
    results["kept"]["cases"][CASES[0].name]["variants"]["native"]["median_ms"] = 12345
    assert "| 12345.00 |" in with_table(page, results)
