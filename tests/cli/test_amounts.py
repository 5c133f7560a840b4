"""Numbers as people read them."""

import pytest

from moeforge.cli.amounts import in_bytes, short


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1536, "1.536 kB"), (2.5e9, "2.5 GB"), (3e15, "3,000 TB")],
)
def test_bytes(number, text):
    assert in_bytes(number) == text


@pytest.mark.parametrize(("number", "text"), [(0, "0"), (12, "12"), (1234567, "1.235M"), (7e9, "7G"), (5e16, "5e+04T")])
def test_counts(number, text):
    assert short(number) == text
