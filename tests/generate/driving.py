"""Several requests through one engine at once, and what each of them got."""

import queue
from collections.abc import Sequence
from typing import Any, NamedTuple

from moeforge.data.tokenizers import Bytes, Tokenizer, train_or_open
from moeforge.generate import End, Engine, Event, Sampling, Settings, Token
from moeforge.generate.runner import BlockRunner
from moeforge.models import Decoder

TOKENIZER: Tokenizer = train_or_open(Bytes(), ())
BLOCKS = 64


class Got(NamedTuple):
    """Of one request."""

    tokens: tuple[int, ...]
    logprobs: tuple[object, ...]
    """Of each token its own and those of the likeliest, every bit."""
    end: End


def engine(
    model: Decoder, blocks: int = BLOCKS, tokenizer: Tokenizer = TOKENIZER, domain: str | None = None, **settings: Any
) -> Engine:
    """An engine of ``blocks`` blocks of 16 tokens."""
    chosen = Settings(kv_blocks=blocks, **settings)
    domain = model.config.domains[0] if model.config.domains else domain
    return Engine(BlockRunner(model, chosen, blocks, domain), tokenizer, chosen, blocks)


def sampling(seed: int = 0, max_tokens: int = 8, **fields: Any) -> Sampling:
    """Drawn, not greedy: every bit of every probability counts."""
    asked = {"temperature": 1.0, "seed": seed, "max_tokens": max_tokens, "ignore_end": True, "logprobs": 3}
    return Sampling(**asked | fields)


def drive(running: Engine, jobs: Sequence[tuple[Sequence[int], Sampling]]) -> list[Got]:
    """All jobs at once; what each of them got."""
    queues: list[queue.SimpleQueue[Event]] = [queue.SimpleQueue() for _ in jobs]
    for (prompt, how), events in zip(jobs, queues, strict=True):
        running.submit(prompt, how, events.put)
    return [collect(events) for events in queues]


def collect(events: "queue.SimpleQueue[Event]") -> Got:
    """Everything until the end."""
    tokens: list[Token] = []
    while True:
        event = events.get(timeout=60)
        if isinstance(event, Token):
            tokens.append(event)
        if isinstance(event, End):
            bits = tuple((token.logprob, token.alternatives) for token in tokens)
            return Got(tuple(token.token_id for token in tokens), bits, event)
