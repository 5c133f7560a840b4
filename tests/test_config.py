"""Settings: overrides, merging, messages, numbers and YAML."""

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from moeforge.config import Config, Count, build, difference, merge, nearest, override, read_yaml, slot, to_yaml
from moeforge.errors import UserError


class Fast(Config):
    """A member of a slot."""

    type: Literal["fast"] = "fast"
    speed: float = 1.0
    """How fast."""


class Slow(Config):
    """Another."""

    type: Literal["slow"] = "slow"
    patience: int = 3
    """How long."""


Pace = slot(Fast, Slow)
Only = slot(Slow)


class Part(Config):
    """Something below."""

    pace: Pace = Fast()
    """One of several."""
    only: Only = Slow()
    """One of one."""
    mode: Literal["train", "test"] = "train"
    """A choice."""


class Whole(Config):
    """Everything."""

    steps: Count = 10
    """A count."""
    rate: float = 0.1
    """A number."""
    part: Part = Part()
    """Nested."""
    paces: tuple[Pace, ...] = ()
    """A list."""
    named: dict[int, Part] = Field(default_factory=dict)
    """By number."""


def message(tree: dict[str, Any]) -> list[str]:
    with pytest.raises(UserError) as caught:
        build(Whole, tree, "run.yaml")
    return str(caught.value).splitlines()


def test_a_config_is_frozen_and_knows_its_settings() -> None:
    whole = Whole()
    with pytest.raises(ValueError, match="frozen"):
        whole.steps = 3
    assert Whole.model_fields["rate"].description == "A number."
    changed = whole.replace(part=Part(pace=Slow(patience=9)))
    assert changed.part.pace == Slow(patience=9) and whole.part.pace == Fast()
    with pytest.raises(ValueError, match="rate"):
        whole.replace(rate="quick")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["--steps=3"], {"steps": 3}),
        (["--rate=1e-5"], {"rate": 1e-5}),
        (["--steps=50M"], {"steps": 50_000_000}),
        (["--part.mode=test", "--part.pace=slow"], {"part": {"mode": "test", "pace": "slow"}}),
        (["--part.pace=slow", "--part.pace.patience=7"], {"part": {"pace": {"type": "slow", "patience": 7}}}),
        (["--part.pace.speed=2", "--part.pace.speed=3"], {"part": {"pace": {"type": "fast", "speed": 3}}}),
        (["--paces=[fast, slow]", "--paces.1.patience=5"], {"paces": ["fast", {"type": "slow", "patience": 5}]}),
        (["--named.3.mode=test"], {"named": {3: {"mode": "test"}}}),
        (["--part.pace={type: slow, patience: 1}"], {"part": {"pace": {"type": "slow", "patience": 1}}}),
    ],
)
def test_overrides(overrides: list[str], expected: dict[str, Any]) -> None:
    base = {"part": {"pace": "fast"}}
    assert build(Whole, override(base, overrides)) == build(Whole, merge(base, expected))
    assert base == {"part": {"pace": "fast"}}


def test_hyphens_in_names_are_underscores_and_values_keep_theirs() -> None:
    assert override({}, ["--a-b.c-d=x-y", "--e=a=b"]) == {"a_b": {"c_d": "x-y"}, "e": "a=b"}
    assert override({"a": [1, 2]}, ["--a.0=null"]) == {"a": [None, 2]}


@pytest.mark.parametrize(
    ("tree", "text", "expected"),
    [
        ({}, "steps=3", "cannot read 'steps=3': settings are given as --dotted.name=value"),
        ({}, "--steps", "cannot read '--steps': settings are given as --dotted.name=value"),
        ({}, "--steps=[1,", "cannot read the value of '--steps=[1,'"),
        ({"a": [1, 2]}, "--a.2=1", "'--a.2=1': a is a list of 2; name one by its number, from 0"),
        ({"a": [1, 2]}, "--a.x=1", "'--a.x=1': a is a list of 2"),
        ({"a": 3}, "--a.x=1", "'--a.x=1': a is a single value, it has no 'x'"),
    ],
)
def test_unreadable_overrides_are_refused(tree: dict[str, Any], text: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        override(tree, [text])
    assert str(caught.value).startswith(expected)


@pytest.mark.parametrize(
    ("tree", "line"),
    [
        ({"stepz": 1}, "stepz is not a setting. Did you mean 'steps'? Valid here: steps, rate, part, paces, named"),
        ({"part": {"mod": 1}}, "part.mod is not a setting. Did you mean 'mode'? Valid here: pace, only, mode"),
        (
            {"part": {"pace": {"type": "slow", "speed": 1}}},
            "part.pace.speed is not a setting. Valid here: type, patience",
        ),
        ({"paces": ["fast", {"type": "slow", "x": 1}]}, "paces.1.x is not a setting. Valid here: type, patience"),
        (
            {"named": {3: {"mood": 1}}},
            "named.3.mood is not a setting. Did you mean 'mode'? Valid here: pace, only, mode",
        ),
        ({"part": {"pace": "fasst"}}, "part.pace: there is no type 'fasst'. Did you mean 'fast'? Valid: fast, slow"),
        ({"part": {"only": "slo"}}, "part.only.type: 'slo' is not a choice. Did you mean 'slow'? Valid: slow"),
        ({"part": {"mode": "trian"}}, "part.mode: 'trian' is not a choice. Did you mean 'train'? Valid: train, test"),
        ({"rate": "quick"}, "rate = 'quick': input should be a valid number, unable to parse string as a number"),
        ({"steps": 1.5}, "steps = 1.5: input should be a valid integer, got a number with a fractional part"),
        ({"part": {"pace": "x:Y"}}, "part.pace: cannot import 'x:Y': No module named 'x'"),
    ],
)
def test_a_mistake_is_one_clear_line(tree: dict[str, Any], line: str) -> None:
    assert message(tree) == ["run.yaml has 1 mistake:", f"  {line}"]


def test_all_mistakes_come_at_once() -> None:
    tree = {"rate": "x", "part": {"rate": "x", "mode": "x"}, "named": {1: {"mode": "x"}, 2: {"pace": {}}}}
    lines = message(tree)
    assert lines[0] == "run.yaml has 5 mistakes:"
    starts = ["  rate = 'x'", "  part.rate is not", "  part.mode: 'x'", "  named.1.mode: 'x'", "  named.2.pace"]
    assert all(any(line.startswith(start) for line in lines) for start in starts)


@pytest.mark.parametrize(
    ("given", "count"), [("50M", 50_000_000), ("1.5k", 1500), ("2B", 2_000_000_000), ("7", 7), ("3 k", 3000), (12, 12)]
)
def test_counts(given: object, count: int) -> None:
    assert build(Whole, {"steps": given}).steps == count


@pytest.mark.parametrize("given", ["50m", "1.2.3k", "many", "k"])
def test_unreadable_counts_are_refused(given: str) -> None:
    assert len(message({"steps": given})) == 2


def test_floats_in_yaml(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("rate: 1e-5\nsteps: 50M\npart: {pace: {type: fast, speed: 3e8}}\n")
    whole = build(Whole, read_yaml(path))
    assert whole == Whole(rate=0.00001, steps=50_000_000, part=Part(pace=Fast(speed=3e8)))
    path.write_text(to_yaml(whole))
    assert build(Whole, read_yaml(path)) == whole


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a: [1", "is not valid YAML"), ("- 1\n- 2", "holds list, not a mapping"), ("", "holds NoneType")],
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=expected) as caught:
        read_yaml(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.yaml: No such file or directory"):
        read_yaml(tmp_path / "gone.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00a: \xff")
    with pytest.raises(UserError, match="not valid YAML"):
        read_yaml(tmp_path / "binary.yaml")


paces = st.builds(Fast, speed=st.floats(0, 9)) | st.builds(Slow, patience=st.integers(0, 3))
parts = st.builds(Part, pace=paces, mode=st.sampled_from(["train", "test"]))
wholes = st.builds(Whole, steps=st.integers(0, 3), part=parts, paces=st.lists(paces, max_size=2))


def plain(config: Config) -> dict[str, Any]:
    """The tree as a file would hold it."""
    return merge({}, config.model_dump())


@given(wholes, wholes)
def test_difference_is_what_merge_lays_on(one: Whole, other: Whole) -> None:
    change = difference(plain(one), plain(other))
    assert merge(plain(one), change) == plain(other)
    assert difference(plain(one), plain(one)) == {}
    assert not any(change.get(name, ...) == value for name, value in plain(one).items())


@given(wholes)
def test_yaml_round_trip(whole: Whole) -> None:
    assert build(Whole, yaml.safe_load(to_yaml(whole))) == whole


def test_merge_starts_a_changed_slot_afresh_and_keeps_an_unchanged_one() -> None:
    base = {"pace": {"type": "slow", "patience": 9}, "b": 1, "a": 2}
    assert merge(base, {"pace": {"type": "fast"}})["pace"] == {"type": "fast"}
    assert merge(base, {"pace": {"type": "slow"}})["pace"] == {"type": "slow", "patience": 9}
    assert merge(base, {"pace": {"patience": 1}})["pace"] == {"type": "slow", "patience": 1}
    assert merge({"pace": "slow"}, {"pace": {"patience": 1}})["pace"] == {"type": "slow", "patience": 1}
    assert merge(base, {"pace": None})["pace"] is None
    assert list(merge(base, {"d": 1, "c": 2, "a": 3})) == ["pace", "b", "a", "d", "c"]


def test_a_merge_shares_nothing_with_what_it_was_made_of() -> None:
    base, over = {"a": {"b": [1]}}, {"c": {"d": [2]}}
    merged = merge(base, over)
    merged["a"]["b"].append(3)
    merged["c"]["d"].append(4)
    assert base == {"a": {"b": [1]}} and over == {"c": {"d": [2]}}


def test_what_was_set_always_names_its_slot_member() -> None:
    assert Part(pace=Slow()).model_dump(exclude_unset=True) == {"pace": {"type": "slow"}}


def test_nearest() -> None:
    assert nearest("topk", ["top_p", "top_k"]) == " Did you mean 'top_k'?"
    assert nearest("zzz", ["top_p", "top_k"]) == ""


def test_no_limit_comes_back_from_a_models_json() -> None:
    """JSON has no infinity, and a null would be no number."""
    text = Fast(speed=float("inf")).model_dump_json()
    assert json.loads(text, parse_constant=pytest.fail) and Fast.model_validate(json.loads(text)).speed == float("inf")
