"""From logits to the next token: what is made likelier or less, temperature, and three ways to cut off the unlikely."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from moeforge.config import Config, Count
from moeforge.errors import UserError
from moeforge.generate.contrast import Contrast, contrasted
from moeforge.generate.grammar import Grammar, Matcher


class Sampling(Config):
    """How tokens are drawn, and when to stop.

    In this order: ``contrast``, ``logit_bias``, ``repetition_penalty``, the other two penalties, ``temperature``, then
    the cuts ``sample_k``, ``top_p``, ``min_p``, each applied to what is left.
    """

    temperature: float = Field(0.8, ge=0)
    """Logits are divided by it; 0 always takes the likeliest token."""
    sample_k: int | None = Field(None, ge=1)
    """Keep the so many likeliest tokens; null keeps all. (``top_k`` is the router's word for experts per token.)"""
    top_p: float = Field(1.0, gt=0, le=1)
    """Keep the fewest likeliest tokens that have this probability together (nucleus, arXiv:1904.09751)."""
    min_p: float = Field(0.0, ge=0, le=1)
    """Keep tokens at least this likely relative to the likeliest (arXiv:2407.01082)."""
    seed: int | None = Field(None, ge=0, lt=2**63)
    """Equal seeds give equal text; null draws one."""
    max_tokens: Count = Field(200, ge=0)
    """Stop after so many; 0 only where ``prompt_logprobs`` are wanted."""
    repetition_penalty: float = Field(1.0, ge=0.01, le=100)
    """Positive logits of tokens that were read or written are divided by it, negative ones multiplied
    (arXiv:1909.05858)."""
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    """Taken from the logits of tokens that were written."""
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    """Taken from the logits of tokens that were written, as often as they were."""
    logit_bias: dict[int, float] = Field(default_factory=dict)
    """Added to the logits of these token ids."""
    stop: tuple[str, ...] = ()
    """Stop before any of these texts would appear."""
    stop_ids: tuple[int, ...] = ()
    """Stop before any of these tokens."""
    ignore_end: bool = False
    """Go on when the model ends the document; its end token is then never drawn."""
    logprobs: int | None = Field(None, ge=0)
    """Give each token's log probability, and those of so many likeliest."""
    prompt_logprobs: int | None = Field(None, ge=0)
    """The same of the tokens of the prompt."""
    grammar: Grammar | None = None
    """What form the text has."""
    contrast: Contrast | None = None
    """Write against a second, weaker pass, which takes as long again."""

    @model_validator(mode="after")
    def _acts(self) -> Self:
        if self.temperature == 0 and self.cuts:
            raise ValueError("temperature = 0 takes the likeliest token: sample_k, top_p and min_p would do nothing")
        if self.max_tokens == 0 and self.prompt_logprobs is None:
            raise ValueError("max_tokens = 0 would do nothing: only with prompt_logprobs is there something to give")
        if self.grammar is not None and self.ignore_end:
            raise ValueError("ignore_end: with a grammar the text ends where that is complete")
        if "" in self.stop:
            raise ValueError("stop: an empty text stops everything before it starts")
        if any(value != value or abs(value) > 1e6 for value in self.logit_bias.values()):
            raise ValueError("logit_bias: values are numbers between -1e6 and 1e6")
        return self

    @property
    def cuts(self) -> bool:
        """Whether unlikely tokens are left out."""
        return (self.sample_k, self.top_p, self.min_p) != (None, 1.0, 0.0)

    def generator(self) -> torch.Generator:
        """A fresh source of randomness by ``seed``."""
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        return generator if self.seed is None else generator.manual_seed(self.seed)

    def check(self, vocab_size: int) -> None:
        """Raises UserError for token ids that there are not."""
        for name, ids in (("logit_bias", self.logit_bias), ("stop_ids", self.stop_ids)):
            absent = [token for token in ids if not 0 <= token < vocab_size]
            if absent:
                raise UserError(f"{name}: there is no token {absent[0]}, ids go from 0 to {vocab_size - 1}")


class Picked(NamedTuple):
    """The next token, and what was likely at its place."""

    token_id: int
    logprob: float | None
    alternatives: tuple[tuple[int, float], ...]


class Sampler:
    """Draws the tokens of one text. What it draws depends on that text and its settings alone."""

    def __init__(
        self,
        sampling: Sampling,
        prompt: Sequence[int],
        banned: Sequence[int] = (),
        matcher: Matcher | None = None,
        vocab_size: int | None = None,
    ) -> None:
        """``banned`` tokens are never drawn, nor what lies past ``vocab_size``: public models round theirs up.
        ``matcher`` is that of the grammar."""
        self._vocab_size = vocab_size
        self.sampling, self._generator, self._matcher = sampling, sampling.generator(), matcher
        self._banned = torch.tensor(sorted(banned), dtype=torch.int64)
        self._seen = {*prompt} if sampling.repetition_penalty != 1 else set[int]()
        self._written: Counter[int] = Counter()

    def pick(self, logits_V: Tensor, weak_V: Tensor | None = None) -> Picked:
        """The next token after the ones before; ``weak_V`` is what ``contrast`` compares with.

        Raises UserError when a logit is not finite: the weights are broken.
        """
        logits_V = logits_V.detach().cpu().float()
        check_finite(logits_V)
        told_V, against = logits_V, self.sampling.contrast
        if against is not None and weak_V is not None:
            check_finite(weak_V)
            told_V = contrasted(logits_V, weak_V, against)
        token = draw(self._changed(told_V), self.sampling, self._generator)
        if self._matcher is not None:
            self._matcher.take(token)
        if self.sampling.repetition_penalty != 1:
            self._seen.add(token)
        if self.sampling.presence_penalty or self.sampling.frequency_penalty:
            self._written[token] += 1
        if self.sampling.logprobs is None:
            return Picked(token, None, ())
        return Picked(token, *likely(logits_V, token, self.sampling.logprobs, self._vocab_size))

    def _changed(self, logits_V: Tensor) -> Tensor:
        sampling, logits_V = self.sampling, logits_V.clone()
        if sampling.logit_bias:
            ids = torch.tensor(list(sampling.logit_bias))
            logits_V[ids] += torch.tensor(list(sampling.logit_bias.values()))
        if self._seen:
            ids = torch.tensor(sorted(self._seen))
            seen, penalty = logits_V[ids], sampling.repetition_penalty
            logits_V[ids] = torch.where(seen > 0, seen / penalty, seen * penalty)
        if self._written:
            ids = torch.tensor(list(self._written))
            times = torch.tensor(list(self._written.values()))
            logits_V[ids] -= sampling.presence_penalty + sampling.frequency_penalty * times
        logits_V[self._banned] = -torch.inf
        if self._vocab_size is not None:
            logits_V[self._vocab_size :] = -torch.inf
        if self._matcher is not None:
            logits_V[self._matcher.forbidden(len(logits_V))] = -torch.inf
        return logits_V


def check_finite(logits: Tensor) -> None:
    """Raises UserError when a logit is no number."""
    if not bool(torch.isfinite(logits.sum())):  # of one that is no number, or infinite, neither is the sum
        raise UserError("the model's logits are not finite: its weights are damaged, or its training diverged")


def draw(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One token id; ties of the likeliest go to the lowest."""
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    sums_V = probabilities(logits_V, sampling).cumsum(0, dtype=torch.float64)
    point = torch.rand(1, generator=generator, dtype=torch.float64) * sums_V[-1]
    return int(torch.searchsorted(sums_V, point, right=True).clamp_max(len(sums_V) - 1))


def probabilities(logits_V: Tensor, sampling: Sampling) -> Tensor:
    """[V] float32 probabilities that the next token is drawn by; temperature must be above 0."""
    logits_V = logits_V.float()
    temperature = max(sampling.temperature, torch.finfo(torch.float32).tiny)  # smaller ones are 0 in float32
    probs_V = ((logits_V - logits_V.max()) / temperature).softmax(-1)
    if not sampling.cuts:
        return probs_V
    kept = min(sampling.sample_k or len(probs_V), len(probs_V))
    if sampling.top_p < 1:
        kept = _nucleus(probs_V, kept, sampling.top_p)
    if kept < len(probs_V):
        probs_V = _likeliest(probs_V, kept)
    if sampling.min_p:
        probs_V = probs_V.masked_fill(probs_V < sampling.min_p * probs_V.max(), 0)
    return probs_V / probs_V.sum()


def _nucleus(probs_V: Tensor, kept: int, top_p: float) -> int:
    """How many of the ``kept`` likeliest have ``top_p`` of their probability. Sorts few where that is enough."""
    total = probs_V.sum() if kept == len(probs_V) else probs_V.topk(kept).values.sum()
    for size in sorted({min(256, kept), kept}):
        sorted_K = probs_V.topk(size).values
        before_K = (sorted_K.cumsum(0) - sorted_K) / total
        inside = int((before_K < top_p).sum())
        if inside < size:
            return max(inside, 1)  # a top_p that is 0 in float32 keeps the likeliest
    return kept


def _likeliest(probs_V: Tensor, kept: int) -> Tensor:
    """Zero but for the ``kept`` largest; of equal ones those with the lowest ids."""
    last = probs_V.topk(kept).values[-1]
    above_V, equal_V = probs_V > last, probs_V == last
    chosen_V = above_V | (equal_V & (equal_V.cumsum(0) <= kept - int(above_V.sum())))
    return probs_V.masked_fill(~chosen_V, 0)


def likely(
    logits_V: Tensor, token: int, count: int, vocab_size: int | None = None
) -> tuple[float, tuple[tuple[int, float], ...]]:
    """log(probability) of ``token``, and the ``count`` likeliest tokens with theirs, best first, lowest id first.

    Probabilities are over all logits, as the model has them; what is listed is a token below ``vocab_size``.
    """
    logprobs_V = logits_V.float().log_softmax(-1)
    if count == 0:
        return float(logprobs_V[token]), ()
    known_V = logprobs_V[:vocab_size]
    kept = min(count, len(known_V))
    least = known_V.topk(kept).values[-1]
    ids = (known_V >= least).nonzero().flatten().tolist()
    best = sorted(((float(logprobs_V[i]), i) for i in ids), key=lambda pair: (-pair[0], pair[1]))
    return float(logprobs_V[token]), tuple((i, value) for value, i in best[:kept])
