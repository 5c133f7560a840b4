"""What kind of thing each token is, in Python and in English, judged from the text alone.

A small scanner, not a parser: it never fails, and gives the same answer for the same text. It is meant for asking
which experts prefer what, where a few wrong labels in a thousand change nothing.
"""

import keyword
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from moeforge.data.packing import Packed
from moeforge.data.tokenizers import Tokenizer

KINDS = ("indents, breaks", "keywords", "names", "numbers", "symbols", "text", "other")
"""White space; Python's reserved words; identifiers; numbers; operators and punctuation; words of English, comments and
strings; all else, such as the mark between documents."""
SPACE, KEYWORD, NAME, NUMBER, SYMBOL, TEXT, OTHER = range(len(KINDS))

_RESERVED = {*keyword.kwlist, "match", "case"}
_SCAN = re.compile(
    r"""
    (?P<text> \#[^\n]*
      | (?<!\w) [rbfuRBFU]{0,2} (?: "{3}[\s\S]*?(?:"{3}|\Z) | '{3}[\s\S]*?(?:'{3}|\Z)
                                  | "(?:\\.|[^"\\\n])*" | '(?:\\.|[^'\\\n])*' ) )
    | (?P<word> [^\W\d]\w* )
    | (?P<number> \d[\w.]* )
    | (?P<space> \s+ )
    | (?P<symbol> [!-/:-@\[-`{-~] )
    """,
    re.VERBOSE,
)
_KIND_OF = {"text": TEXT, "word": NAME, "number": NUMBER, "space": SPACE, "symbol": SYMBOL}


def classify(pieces: Sequence[str]) -> list[int]:
    """The kind of each token of one document, given as text pieces: that of its first character but white space."""
    kinds, position, result = _kinds_of_characters("".join(pieces)), 0, []
    for piece in pieces:
        lead = len(piece) - len(piece.lstrip())
        result.append(kinds[position + lead] if lead < len(piece) else SPACE if piece else OTHER)
        position += len(piece)
    return result


def kinds_of(packed: Packed, tokenizer: Tokenizer) -> Tensor:
    """[N] int32: the kind of every token of ``packed``; documents are judged one by one."""
    kinds: list[int] = []
    lead = len(packed.lead)
    for start, size in zip(packed.starts.tolist(), packed.sizes.tolist(), strict=True):
        ids = packed.ids[start + lead : start + size].tolist()
        kinds += [*[OTHER] * lead, *classify(tokenizer.pieces(ids))]
    return torch.tensor(kinds, dtype=torch.int32)


def _kinds_of_characters(text: str) -> bytearray:
    found = list(_SCAN.finditer(text))
    lines = _line_numbers(found)
    prose = _prose_lines(found, lines)
    kinds = bytearray([OTHER]) * len(text)
    for match, line in zip(found, lines, strict=True):
        kind = _KIND_OF[match.lastgroup or ""]
        if kind == NAME:
            kind = TEXT if line in prose else KEYWORD if match[0] in _RESERVED else NAME
        kinds[match.start() : match.end()] = bytes([kind]) * len(match[0])
    return kinds


def _line_numbers(found: list[re.Match[str]]) -> list[int]:
    """Of the line that each match starts in."""
    numbers, line = [], 0
    for match in found:
        numbers.append(line)
        line += match[0].count("\n")
    return numbers


def _prose_lines(found: list[re.Match[str]], lines: list[int]) -> set[int]:
    """Lines with two names side by side: that is never code, so all words there are words of a language."""
    triples = zip(found, found[1:], found[2:], lines, strict=False)
    return {
        line
        for first, gap, second, line in triples
        if first.lastgroup == second.lastgroup == "word"
        and not gap[0].strip(" \t")
        and not {first[0], second[0]} & _RESERVED
    }
