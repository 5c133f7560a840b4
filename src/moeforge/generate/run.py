"""Streaming generation with a KV cache: a document that grows, token by token or by what a user adds."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from moeforge.data.tokenizers import Tokenizer
from moeforge.errors import UserError
from moeforge.generate.sample import Sampler, Sampling
from moeforge.generate.trace import choices, refuse_blocks
from moeforge.models import Cache, Decoder
from moeforge.models.domain import known

Stop = Literal["end of document", "max_tokens", "context full"]


@dataclass(frozen=True)
class Step:
    """One generated token."""

    token_id: int
    text: str
    """What became printable with it; empty inside a character of several tokens."""
    experts: dict[int, list[int]]
    """By layer number, the experts of this token's own position: of the pass that read it, not the one before."""
    stop: Stop | None = None
    """Set on the last one: why there are no more."""


class Writer:
    """One document: ``read`` adds given text, ``write`` lets the model go on. Each token is computed once.

    It starts as the tokenizer has documents start: ours with the end of the one before. Raises UserError for a model
    whose routers compare tokens, unless ``unsafe_batch_dependent``, and as ``known`` does for its ``domain``.
    """

    def __init__(
        self, model: Decoder, tokenizer: Tokenizer, unsafe_batch_dependent: bool = False, domain: str | None = None
    ) -> None:
        refuse_blocks(model)
        leaking = model.cannot_write
        if leaking and not unsafe_batch_dependent:
            raise UserError(
                f"in {', '.join(leaking)} a token's experts depend on other tokens than itself, "
                "so text token by token is not what was trained; generate --unsafe-batch-dependent writes anyway"
            )
        self.model, self.tokenizer, self.domain = model, tokenizer, domain
        self.max_len = model.config.max_seq_len
        self._cache = Cache(model, 1, self.max_len)
        self._unread, self._text = [*tokenizer.start_ids], list[int]()
        known(model, domain, torch.empty(0))
        self._logits = torch.empty(0)

    @property
    def length(self) -> int:
        """Tokens of the document, its start included."""
        return self._cache.length + len(self._unread)

    def read(self, text: str) -> None:
        """Appends ``text``. Raises UserError, and appends nothing, when no room would be left to write."""
        ids = self.tokenizer.encode_inside(text) if self._text else self.tokenizer.encode(text)
        if self.length + len(ids) >= self.max_len:
            room = max(0, self.max_len - self.length - 1)
            raise UserError(
                f"the text has {len(ids)} tokens, but the context has room for {room} (max_seq_len = {self.max_len})"
            )
        self._unread += ids
        self._text += ids

    def write(self, sampling: Sampling) -> Iterator[Step]:
        """Streams tokens until the model ends the document, ``max_tokens``, or the context is full.

        Each step comes after its token was read, so it carries that token's own experts and the document can go on
        from there. Nothing comes when the model ends the document at once.
        """
        sampler, stream = Sampler(sampling, self._text), self.tokenizer.stream(self._text)
        if self._unread:
            self._feed(self._unread)
            self._unread = []
        token = sampler.pick(self._logits).token_id
        for count in range(1, sampling.max_tokens + 1):
            if token in self.tokenizer.end_ids or self.length == self.max_len:
                return
            experts = self._feed([token])
            self._text.append(token)
            following = sampler.pick(self._logits).token_id
            stop = self._stop(following, count == sampling.max_tokens)
            yield Step(token, stream.push(token) + (stream.finish() if stop else ""), experts, stop)
            token = following

    def _stop(self, following: int, enough: bool) -> Stop | None:
        if following in self.tokenizer.end_ids:
            return "end of document"
        if enough:
            return "max_tokens"
        return "context full" if self.length == self.max_len else None

    @torch.no_grad()
    def _feed(self, ids: list[int]) -> dict[int, list[int]]:
        """Runs ``ids``; keeps the logits after the last of them, of all that is a token, and returns its experts."""
        held = [(layer, layer.length, layer.tensors) for layer in self._cache.layers.values()]
        try:
            input_ids = torch.tensor([ids], device=self.model.embedding.weight.device)
            output = self.model(input_ids, cache=self._cache, known=known(self.model, self.domain, input_ids))
        except BaseException:  # Ctrl-C too: some layers have stored these tokens, others have not
            for layer, length, tensors in held:
                layer.length, layer.tensors = length, tensors
            raise
        self._logits = output.logits[0, -1, : self.tokenizer.vocab_size]  # public vocabularies are rounded up
        return {layer: choice.experts for layer, choice in choices(output)[-1].items()}


def generate(
    model: Decoder,
    tokenizer: Tokenizer,
    prompt: str,
    sampling: Sampling,
    unsafe_batch_dependent: bool = False,
    domain: str | None = None,
) -> Iterator[Step]:
    """Continues ``prompt``, which may be empty. Raises UserError when it fills the model's context, and as Writer."""
    writer = Writer(model, tokenizer, unsafe_batch_dependent, domain)
    writer.read(prompt)
    return writer.write(sampling)
