"""Text that has a form: a JSON schema or a regular expression says which tokens may come next (llguidance)."""

import json
from functools import lru_cache
from typing import Any, Self

import torch
from pydantic import model_validator
from torch import Tensor

from moeforge.config import Config
from moeforge.data.tokenizers import Tokenizer
from moeforge.errors import UserError

INSTALL = "structured output needs llguidance, which is not installed: pip install 'moeforge[serve]'"


SPACES: Any = {"whitespace_pattern": r"[\x20\x0A]{1,20}"}
"""Between parts of JSON: room for any usual layout, and no end of spaces."""


class Grammar(Config):
    """What the whole text must be: exactly one of the two."""

    json_schema: dict[str, Any] | None = None
    """A JSON schema; ``{"type": "object"}`` is any object."""
    regex: str | None = None
    """A regular expression in Rust's syntax, for all of the text."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.json_schema is None) == (self.regex is None):
            raise ValueError("grammar: give either json_schema or regex")
        return self


class Matcher:
    """Which tokens may come next, as a text grows."""

    def __init__(self, grammar: Grammar, tokenizer: Tokenizer) -> None:
        """Raises UserError, with llguidance's reason, for a schema or an expression that it cannot follow."""
        try:
            from llguidance import LLMatcher
        except ImportError as error:
            raise UserError(INSTALL) from error
        try:
            if grammar.regex is not None:
                form = LLMatcher.grammar_from_regex(grammar.regex)
            else:
                form = LLMatcher.grammar_from_json_schema(json.dumps(grammar.json_schema), overrides=SPACES)
        except ValueError as error:
            raise UserError(f"grammar: {error}") from error
        self._matcher = LLMatcher(_tokens_of(tokenizer), form, log_level=0)
        self._check()
        self._mask = torch.zeros((tokenizer.vocab_size + 31) // 32, dtype=torch.int32)

    def forbidden(self, size: int) -> Tensor:
        """[size] bool: tokens that may not come next. The end of the text may, where the grammar is complete."""
        self._matcher.unsafe_compute_mask_ptr(self._mask.data_ptr(), self._mask.nbytes)
        self._check()
        bits = (self._mask[:, None] >> torch.arange(32, dtype=torch.int32)) & 1
        allowed = torch.zeros(size, dtype=torch.bool)
        known = min(size, bits.numel())
        allowed[:known] = bits.flatten()[:known].bool()
        return ~allowed

    def take(self, token: int) -> None:
        """It came."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise UserError(f"grammar: {self._matcher.get_error().strip().splitlines()[0]}")


@lru_cache(maxsize=4)
def _tokens_of(tokenizer: Tokenizer) -> Any:
    from llguidance import LLTokenizer

    ends = sorted(tokenizer.end_ids, key=lambda token: token != tokenizer.eos_id)
    return LLTokenizer(tokenizer.inner.to_str(), n_vocab=tokenizer.vocab_size, eos_token=ends)
