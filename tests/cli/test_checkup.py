"""What ``moeforge doctor`` finds out."""

import json
import tomllib
from pathlib import Path

import pytest
import torch

from moeforge.cli.checkup import OPTIONAL, _cpu_flags, checkup, try_engine
from moeforge.kernels import choose
from moeforge.kernels.native import engine as native


def test_every_engine_runs_here_in_both_types():
    engines = checkup()["engines"]
    for name in ("reference", "streaming", "grouped", "native"):
        missing = native.missing() if name == "native" else None
        assert engines[f"{name} cpu float32"] == "works" or (missing and missing in engines[f"{name} cpu float32"])
    weight = torch.empty(8, 64, 64)
    picked, why = choose(torch.empty(1, 64), weight, weight)
    assert engines["auto cpu float32, small"] == f"{picked}: {why}"


def test_an_engine_that_does_not_exist_says_so():
    assert try_engine("warp", "cpu", "float32").startswith("does not run: there is no engine 'warp'")


def test_wrong_results_are_noticed(monkeypatch: pytest.MonkeyPatch):
    from moeforge.kernels import streaming

    right = streaming.activate
    monkeypatch.setattr(streaming, "activate", lambda z, activation: 1.1 * right(z, activation))
    assert try_engine("streaming", "cpu", "float32").startswith("WRONG")
    assert try_engine("reference", "cpu", "float32") == "works"


def test_flags_are_shown_where_the_system_has_them():
    assert _cpu_flags(set()).startswith("unknown")
    assert _cpu_flags({"fpu", "amx_bf16", "avx2"}) == "avx2, amx_bf16"
    assert _cpu_flags({"fpu"}).startswith("none of")


def test_every_optional_extra_is_looked_for():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(OPTIONAL.values()) == project["optional-dependencies"].keys() - {"all", "dev", "docs"}


def test_the_command_prints_it_all(call):
    code, out, _ = call("doctor")
    assert code == 0
    found = json.loads(call("doctor", "--json").out)
    for section, facts in found.items():
        assert section in out
        assert [fact for fact in facts.values() if fact not in out] == []
