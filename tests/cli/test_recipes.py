"""``moeforge recipes``: list, show, copy."""

import json

import yaml

from moeforge.recipes import RECIPES


def test_alone_it_lists_every_recipe(call):
    code, out, _ = call("recipes")
    assert code == 0
    assert [name for name in RECIPES if name not in out] == []
    listed = json.loads(call("recipes", "list", "--json").out)
    assert [entry["name"] for entry in listed] == list(RECIPES)
    assert all(entry["title"] and entry["claim"] for entry in listed)


def test_a_pattern_finds_recipes_by_name_claim_or_number(call):
    def found(pattern):
        return [entry["name"] for entry in json.loads(call("recipes", "list", pattern, "--json").out)]

    assert found("Null Experts") == ["adamoe"] and found("2202.09368") == ["expert-choice"]
    assert {"hash-layers", "word-experts"} <= set(found("token id"))
    assert call("recipes", "token id", "--json").out == call("recipes", "list", "token id", "--json").out
    code, _, err = call("recipes", "list", "no such thing")
    assert code == 2 and "no recipe has 'no such thing' in it" in err


def test_show_prints_the_file_or_everything_that_follows_from_it(call):
    written = yaml.safe_load(call("recipes", "show", "pr-moe").out)
    resolved = yaml.safe_load(call("recipes", "show", "pr-moe", "--resolved").out)
    assert written == yaml.safe_load(RECIPES["pr-moe"].read_text())
    assert "steps" in resolved and "extends" not in resolved
    found = json.loads(call("recipes", "show", "pr-moe", "--json").out)
    assert found["config"]["name"] == "pr-moe" and yaml.safe_load(found["yaml"]) == written


def test_a_copy_describes_the_same_run_and_nothing_is_overwritten(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call("recipes", "copy", "pr-moe").code == 0
    assert call("recipes", "copy", "pr-moe", "mine.yaml").code == 0
    here = json.loads(call("inspect", "mine.yaml", "--json").out)
    assert here == json.loads(call("inspect", "pr-moe", "--json").out)
    (tmp_path / "mine.yaml").write_text("mine")
    code, _, err = call("recipes", "copy", "pr-moe", "mine.yaml")
    assert code == 2 and "exists already" in err
    assert (tmp_path / "mine.yaml").read_text() == "mine"


def test_an_unknown_name_gets_the_nearest(call, tmp_path):
    for verb in ("show", "copy"):
        code, _, err = call("recipes", verb, "gshrd")
        assert code == 2
        assert "Did you mean 'gshard'?" in err
