"""The page: its parts, that it needs nothing from outside, and that no text becomes markup."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from moeforge.analyze import Record, at_equal_time, write_report
from moeforge.analyze.figures import png, summary
from moeforge.analyze.report import equal_time_text, headline, settings
from moeforge.errors import UserError
from tests.analyze.runs import made

VOID = {"meta", "input", "br", "img", "link", "hr"}
PAIR = ([3.0, 2.0, 1.85], [10.0, 20.0, 30.0]), ([2.9, 1.9, 1.8], [15.0, 30.0, 45.0])


class Page(HTMLParser):
    """Notes identifiers, tags and addresses, and that tags are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return [made("dense", *PAIR[0], routed=False), made("pr-moe", *PAIR[1])]


@pytest.fixture(scope="module")
def text(records: list[Record], tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("page") / "report.html"
    write_report(records, out, "moeforge analyze a b")
    return out.read_text(encoding="utf-8")


def test_every_section_is_there_and_the_tags_close(text: str) -> None:
    page = Page(text)
    assert page.open == []
    parts = {value for name, value in page.attributes if name in ("id", "class")}
    assert parts >= {"comparison", "curves", "writing", "load", "kinds", "settings"}
    assert page.tags.count("svg") == 4 == text.count("<figcaption>")


def test_nothing_comes_from_outside(text: str) -> None:
    assert "http" not in text and "@import" not in text
    addresses = [value or "" for name, value in Page(text).attributes if name in ("src", "href", "xlink:href")]
    assert [address for address in addresses if not address.startswith(("#", "data:"))] == []
    assert re.findall(r"url\((?!#)", text) == []


def test_no_text_becomes_markup(text: str) -> None:
    assert "script" not in Page(text).tags
    spans = re.findall(r'<span class="[^"]*" title="[^"]*">([^<]*)</span>', text)
    assert "&lt;" in spans and "&amp;" in spans


def test_colours_and_tooltips_name_the_experts(text: str) -> None:
    assert 'title="layer 0: expert 3, 1; layer 1: expert 0, 2"' in text
    assert '<span class="c0">expert 3</span>' in text and '<span class="c0">expert 0</span>' in text
    assert text.count('class="c0 prompt"') == 2 * len("<scr")


def test_the_headline_says_who_is_ahead_and_by_what(records: list[Record]) -> None:
    said = headline(records)
    assert "pr-moe needs 1.800" in said and "dense 1.850: 0.050 bits (2.7%) fewer" in said
    assert "after the same number of training tokens" in said
    assert "dense needs 1.850" in headline(records[:1])


def test_equal_time_reads_the_curves_where_the_fastest_ends(records: list[Record]) -> None:
    equal = at_equal_time(records)
    assert equal.seconds == 30.0 and equal.bits == [1.85, 1.9]
    assert equal.done == pytest.approx([1.0, 2 / 3])
    assert records[1].curve.at(37.5) == pytest.approx(1.85)
    assert records[1].curve.at(1.0) == 2.9 and records[1].curve.at(99.0) == 1.8
    said = equal_time_text(records, equal)
    assert "dense 1.850, pr-moe 1.900" in said and "pr-moe had done 67% of its steps" in said


def test_settings_are_split_into_equal_and_different(records: list[Record]) -> None:
    assert settings(records, differing=True) == [("name", ["dense", "pr-moe"]), ("optimizer.lr", ["3.0", "2.9"])]
    assert settings(records, differing=False) == [("seed", ["0", "0"])]


def test_one_run_without_experts_makes_a_page(tmp_path: Path) -> None:
    write_report([made("dense", *PAIR[0], routed=False)], tmp_path / "one.html", "again")
    parts = {value for name, value in Page((tmp_path / "one.html").read_text()).attributes if name in ("id", "class")}
    assert "comparison" in parts and "load" not in parts and "kinds" not in parts


def test_the_picture_is_a_png(records: list[Record], tmp_path: Path) -> None:
    png(summary(records), 6, 3, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="cannot write"):
        png(summary(records), 6, 3, tmp_path / "absent" / "picture.png")


@pytest.mark.parametrize("package", ["matplotlib.figure", "jinja2"])
def test_a_missing_package_is_named(
    records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(UserError, match=r"pip install 'moeforge\[report\]'"):
        write_report(records, tmp_path / "report.html", "again")
    assert not (tmp_path / "report.html").exists()
