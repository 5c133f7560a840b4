"""What all routes of one server share."""

import asyncio
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from moeforge.errors import UserError
from moeforge.generate import Engine, Sampling
from moeforge.serve.errors import ApiError, of_engine
from moeforge.serve.limits import Keys, Limits
from moeforge.serve.metrics import Metrics
from moeforge.serve.protocol import Drawing, Writing
from moeforge.serve.template import ChatTemplate


@dataclass
class State:
    """Of one server."""

    engine: Engine
    limits: Limits
    keys: Keys
    template: ChatTemplate | None
    metrics: Metrics
    show_routing: bool = False
    facts: dict[str, Any] = field(default_factory=dict)
    draining: bool = False
    started: int = field(default_factory=lambda: int(time.time()))

    def check(self, model: str | None) -> None:
        """Raises ApiError when the server is about to stop or has no such model."""
        if self.draining:
            raise ApiError(503, "the server is stopping: ask another one", "draining", retry_s=5)
        if model is not None and model != self.engine.name:
            raise ApiError(
                404, f"there is no model '{model}' here, only '{self.engine.name}'", "model_not_found", "model"
            )

    def deadline(self) -> float:
        """When a request that starts now has to end, by the loop's clock."""
        return asyncio.get_running_loop().time() + self.limits.max_seconds

    async def encode(self, text: str) -> list[int]:
        """Ids of a text, its start included; beside the loop where it is long."""
        tokenizer = self.engine.tokenizer

        def work() -> list[int]:
            return [*tokenizer.start_ids, *tokenizer.encode(text)]

        return work() if len(text) < 4096 else await asyncio.to_thread(work)

    def sampling(self, asked: Drawing, prompt_tokens: int, max_tokens: int | None, **more: Any) -> Sampling:
        """As the engine wants it: without ``max_tokens`` there is room for what the context has left.

        With temperature 0 the cuts would have nothing to cut, and are left out. Raises ApiError with the field's name.
        """
        room = max(0, self.engine.max_len - prompt_tokens)
        fields: dict[str, Any] = {"temperature": asked.temperature, "repetition_penalty": asked.repetition_penalty}
        fields |= {"max_tokens": max(1, room) if max_tokens is None else max_tokens, "ignore_end": asked.ignore_eos}
        if asked.temperature > 0:
            top_k = asked.top_k if asked.top_k and asked.top_k > 0 else None
            fields |= {"top_p": asked.top_p, "min_p": asked.min_p, "sample_k": top_k}
        if isinstance(asked, Writing):
            fields |= _writing(asked)
        try:
            return Sampling.model_validate(fields | more)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or None
            raise ApiError(400, f"{where + ': ' if where else ''}{first['msg']}", "invalid_value", where) from error
        except UserError as error:
            raise ApiError(400, str(error), "invalid_value") from error

    def accepts(self, prompt: Sequence[int], sampling: Sampling) -> None:
        """Raises ApiError as the engine would refuse."""
        try:
            self.engine.check(prompt, sampling)
        except UserError as error:
            raise of_engine(error) from error

    def many(self, n: int) -> None:
        """Raises ApiError for more completions at once than are allowed."""
        if n > self.limits.max_n:
            raise ApiError(
                400, f"n: {n} completions in one request, {self.limits.max_n} are allowed", "invalid_value", "n"
            )


def _writing(asked: Writing) -> dict[str, Any]:
    stops = [asked.stop] if isinstance(asked.stop, str) else asked.stop or []
    bias = asked.logit_bias or {}
    if any(not token.isdecimal() for token in bias):
        raise ApiError(400, "logit_bias: keys are token ids", "invalid_value", "logit_bias")
    return {
        "stop": tuple(stops),
        "stop_ids": tuple(asked.stop_token_ids),
        "presence_penalty": asked.presence_penalty,
        "frequency_penalty": asked.frequency_penalty,
        "logit_bias": {int(token): value for token, value in bias.items()},
        "contrast": asked.contrast,
        "seed": None if asked.seed is None else asked.seed % 2**63,
    }


def seeds(sampling: Sampling, n: int) -> list[Sampling]:
    """``n`` ways to go on: each with a seed of its own, the first with the one that was given."""
    if sampling.seed is None:
        return [sampling] * n
    return [sampling.model_copy(update={"seed": (sampling.seed + index) % 2**63}) for index in range(n)]


def new_id(kind: str) -> str:
    """Of an answer."""
    return f"{kind}-{uuid.uuid4().hex}"
