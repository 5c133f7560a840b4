"""Kinds of token: a table of texts, and whole documents."""

import pytest
import torch

from moeforge.analyze.kinds import KEYWORD, NAME, NUMBER, OTHER, SPACE, SYMBOL, TEXT, classify, kinds_of
from moeforge.data.document import Document
from moeforge.data.packing import pack
from moeforge.data.tokenizers import BPE, Bytes, train_or_open

TABLE = [
    (
        ["def", " f", "(", "x", "):", "\n    ", "return", " 3", ".5"],
        [KEYWORD, NAME, SYMBOL, NAME, SYMBOL, SPACE, KEYWORD, NUMBER, NUMBER],
    ),
    (["x", " =", " '", "not", " a", " name", "'"], [NAME, SYMBOL, TEXT, TEXT, TEXT, TEXT, TEXT]),
    (["x", " = ", '"""', "two\nlines", '"""', "\ny"], [NAME, SYMBOL, TEXT, TEXT, TEXT, NAME]),
    (["f", "(", "rb", "'ab", "'", ")"], [NAME, SYMBOL, TEXT, TEXT, TEXT, SYMBOL]),
    (["x", "  # for", " all", "\n", "for"], [NAME, TEXT, TEXT, SPACE, KEYWORD]),
    (["see", " the", " docs", " for", " this", ".\n", "x", "=", "y"], [TEXT] * 5 + [SYMBOL, NAME, SYMBOL, NAME]),
    (["a", "\n", "b"], [NAME, SPACE, NAME]),
    (["→", "\t", ""], [OTHER, SPACE, OTHER]),
    (['s = "open', "\n", "x"], [NAME, SPACE, NAME]),
]


@pytest.mark.parametrize(("pieces", "kinds"), TABLE)
def test_table(pieces: list[str], kinds: list[int]) -> None:
    assert classify(pieces) == kinds


def test_a_line_with_two_names_side_by_side_is_prose_and_its_keywords_are_words() -> None:
    assert classify(["if", " the", " name", " is", " bound"]) == [TEXT] * 5
    assert classify(["if", " name", " is", " bound"]) == [KEYWORD, NAME, KEYWORD, NAME]


def test_an_apostrophe_opens_no_string() -> None:
    assert classify(["we", " don", "'", "t", " care", " and", " won", "'", "t"])[3:6] == [TEXT, TEXT, TEXT]
    assert classify(["x", " = ", "a", "'", "b"])[2:] == [NAME, SYMBOL, NAME]


def test_the_cut_into_tokens_does_not_matter_to_the_characters() -> None:
    text = 'class A:\n    """Doc string, with class."""\n    x = [1, 2]  # two numbers\n'
    by_letter = classify(list(text))
    assert [by_letter[text.index(part)] for part in ("class", "A", "Doc", "x =", "1", "#")] == [
        *(KEYWORD, NAME, TEXT, NAME, NUMBER, TEXT)
    ]
    assert classify([text[:8], text[8:]]) == [KEYWORD, TEXT]


@pytest.mark.parametrize("config", [Bytes(), BPE(vocab_size=270)])
def test_every_token_of_a_packed_text_has_a_kind(config: Bytes | BPE) -> None:
    documents = [Document("a", "'open\nx = 1\n"), Document("b", "import os\n")]
    tokenizer = train_or_open(config, documents)
    packed = pack(documents, tokenizer)
    kinds = kinds_of(packed, tokenizer)
    assert kinds.shape == packed.ids.shape and kinds.dtype == torch.int32
    assert kinds[packed.starts].tolist() == [OTHER, OTHER]
    assert kinds[packed.starts[1] + 1] == KEYWORD  # nothing leaks from the document before
