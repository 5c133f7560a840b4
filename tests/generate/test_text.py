"""Streamed text with stop strings, against: write everything, then cut."""

from hypothesis import given
from hypothesis import strategies as st

from moeforge.generate.text import Held
from tests.generate.driving import TOKENIZER

words = st.text(alphabet="abcä€", min_size=1, max_size=5)


def cut(text: str, stops: list[str]) -> tuple[str, bool]:
    """The text before the stop string that is complete first; of those that end at the same place, the longest."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


@given(text=st.text(alphabet="abcä€", max_size=30), stops=st.lists(words, max_size=3))
def test_it_is_what_cutting_afterwards_gives(text: str, stops: list[str]) -> None:
    held, shown, stopped = Held(TOKENIZER.stream(), stops), "", False
    for token in TOKENIZER.encode(text):
        piece, stopped = held.push(token)
        shown += piece
        if stopped:
            break
        assert not any(stop in shown for stop in stops)
    if not stopped:
        piece, stopped = held.finish()
        shown += piece
    assert (shown, stopped) == cut(text, stops)


def test_without_stop_strings_every_character_comes_at_once() -> None:
    held = Held(TOKENIZER.stream(), ())
    assert [held.push(token)[0] for token in TOKENIZER.encode("aä€")] == ["a", "", "ä", "", "", "€"]


def test_what_may_become_a_stop_string_is_held_back_no_longer_than_needed() -> None:
    held = Held(TOKENIZER.stream(), ["stop"])
    assert [held.push(token)[0] for token in b"a sto sx"] == ["a", " ", "", "", "", "sto ", "", "sx"]


def test_half_a_character_at_the_end_is_shown_as_such() -> None:
    held = Held(TOKENIZER.stream(), ["x"])
    assert held.push("€".encode()[0]) == ("", False)
    assert held.finish() == ("�", False)
