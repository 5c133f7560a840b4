"""Telling a command's own options from settings."""

import pytest

from moeforge.cli.settings import split_settings
from moeforge.errors import UserError

OWN = {"--out", "--quiet", "--help"}


@pytest.mark.parametrize(
    ("given", "rest", "settings"),
    [
        ([], [], []),
        (["pr-moe", "--steps=5"], ["pr-moe"], ["--steps=5"]),
        (["--steps", "5", "pr-moe"], ["pr-moe"], ["--steps=5"]),
        (
            ["pr-moe", "--model.d_model", "32", "--out", "x", "--quiet"],
            ["pr-moe", "--out", "x", "--quiet"],
            ["--model.d_model=32"],
        ),
        (["--out=x", "--optimizer.lr", "-1"], ["--out=x"], ["--optimizer.lr=-1"]),
        (["-h", "--a=b=c"], ["-h"], ["--a=b=c"]),
        (["--a=1", "--", "--b=2"], ["--", "--b=2"], ["--a=1"]),
    ],
)
def test_settings_may_stand_anywhere(given, rest, settings):
    assert split_settings(given, OWN) == (rest, settings)


@pytest.mark.parametrize("given", [["--quite"], ["--quite", "--out", "x"]])
def test_a_setting_without_value_is_an_error_that_knows_the_options(given):
    with pytest.raises(UserError, match=r"--quite=VALUE\. Did you mean '--quiet'\?"):
        split_settings(given, OWN)
