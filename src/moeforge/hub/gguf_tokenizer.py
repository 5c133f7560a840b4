"""A tokenizer in a GGUF file's metadata, as llama.cpp runs it: byte-level BPE, or sentencepiece's with byte tokens."""

import json
import re
from typing import Any

from moeforge.config import Tree
from moeforge.data.tokenizers import Tokenizer
from moeforge.errors import UserError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Types of tokens."""

WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {
    rf"{WORD}\p{{N}}{REST}": ("qwen2", False),
    rf"{WORD}\p{{N}}{{1,3}}{REST}": ("llama-bpe", True),
}
"""How a text is cut before merging -> (the pre-tokenizer's name, whether words that are tokens skip the merges)."""
NO_MERGES = [""]
"""llama.cpp wants a list of merges, and this one never happens."""


def add_tokenizer(writer: Any, tokenizer: Tokenizer, rows: int) -> None:
    """Adds tokens for all ``rows`` of the embedding. Raises UserError for a tokenizer that llama.cpp cannot run."""
    tree = json.loads(tokenizer.inner.to_str())
    model = tree["model"]
    if model["type"] != "BPE":
        raise UserError(f"no GGUF for this tokenizer: its model is {model['type']}, llama.cpp runs BPE here")
    if len(tokenizer.start_ids) > 1:
        raise UserError(f"no GGUF for this tokenizer: a text starts with {len(tokenizer.start_ids)} tokens, not one")
    if model["byte_fallback"]:
        _add_sentencepiece(writer, tree)
    else:
        _add_byte_level(writer, tree)
    tokens, types = _tokens(tree, rows)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_bos_token_id(tokenizer.start_ids[0])
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_add_bos_token(tokenizer.start_ids != [tokenizer.eos_id])
    writer.add_add_eos_token(False)
    if model["byte_fallback"]:
        writer.add_token_scores(_scores(model, tokens))


def _tokens(tree: Tree, rows: int) -> tuple[list[str], list[int]]:
    """Name and type by id; rows without a token get a name of their own."""
    names = {token: name for name, token in tree["model"]["vocab"].items()}
    types = dict.fromkeys(names, NORMAL)
    if tree["model"]["byte_fallback"]:
        types |= {token: BYTE for token, name in names.items() if re.fullmatch("<0x[0-9A-F]{2}>", name)}
    for added in tree["added_tokens"]:
        names[added["id"]] = added["content"]
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    unknown = tree["model"]["vocab"].get(tree["model"]["unk_token"])
    if unknown is not None:
        types[unknown] = UNKNOWN
    return [names.get(token, f"[PAD{token}]") for token in range(rows)], [types.get(t, UNUSED) for t in range(rows)]


def _add_byte_level(writer: Any, tree: Tree) -> None:
    model, normalizer = tree["model"], tree["normalizer"]
    name = _pre_tokenizer(tree["pre_tokenizer"], model)
    if name is None or (normalizer and normalizer["type"] != "NFC"):
        cut = json.dumps(tree["pre_tokenizer"] if name is None else normalizer)
        raise UserError(f"no GGUF for this tokenizer: llama.cpp has no name for {cut[:200]}")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]] or NO_MERGES)


def _pre_tokenizer(tree: Tree | None, model: Tree) -> str | None:
    """llama.cpp's name for how a text is cut, or None."""
    steps = tree["pretokenizers"] if tree and tree["type"] == "Sequence" else [tree] if tree else []
    if not steps or steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return None
    name, whole_words = None, False
    match steps:
        case [{"pattern": {"Regex": cut}, "behavior": "Isolated", "invert": False}, {"use_regex": False}]:
            name, whole_words = PATTERNS.get(cut, (None, False))
        case [{"type": "Digits", "individual_digits": True}, {"use_regex": True}]:
            name = "smollm"
        case [{"use_regex": by_itself}] if by_itself or not model["merges"]:  # without merges, cuts do not matter
            name = "gpt-2"
    return name if whole_words == bool(model.get("ignore_merges")) else None


def _add_sentencepiece(writer: Any, tree: Tree) -> None:
    """Raises UserError unless spaces become U+2581, with or without one in front, and nothing else is done."""
    steps = [*_steps(tree["normalizer"], "normalizers"), *_steps(tree["pre_tokenizer"], "pretokenizers")]
    match steps:
        case [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]:
            space = True
        case [{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]:
            space = False
        case [{"type": "Metaspace", "replacement": "▁", "split": False, "prepend_scheme": scheme}]:
            space = scheme != "never"
        case _:
            raise UserError(f"no GGUF for this tokenizer: llama.cpp has no name for {json.dumps(steps)[:200]}")
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_add_space_prefix(space)
    unknown = tree["model"]["vocab"].get(tree["model"]["unk_token"])
    if unknown is not None:
        writer.add_unk_token_id(unknown)


def _steps(tree: Tree | None, inside: str) -> list[Tree]:
    return [] if tree is None else tree[inside] if tree["type"] == "Sequence" else [tree]


def _scores(model: Tree, tokens: list[str]) -> list[float]:
    """Of each token, the better the sooner it is merged. sentencepiece merges any two that make a token, the best
    first: raises UserError where the merges leave some out, or come to one token at two times."""
    order: dict[str, int] = {}
    last, pairs = None, set()
    for left, right in model["merges"]:
        piece = left + right
        if piece != last and piece in order:
            raise UserError(f"no GGUF for this tokenizer: its merges come back to {piece!r}, unlike sentencepiece's")
        order.setdefault(piece, len(order))
        last = piece
        pairs.add((left, right))
    for piece in order:
        for cut in range(1, len(piece)):
            pair = (piece[:cut], piece[cut:])
            if pair not in pairs and pair[0] in model["vocab"] and pair[1] in model["vocab"]:
                raise UserError(f"no GGUF for this tokenizer: its merges leave out {' + '.join(map(repr, pair))}")
    return [-float(order[token]) if token in order else 0.0 for token in tokens]
