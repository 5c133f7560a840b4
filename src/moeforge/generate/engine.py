"""The engine: one thread that reads and writes many texts at once, and hands each its tokens as they come."""

import queue
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Self

import torch

from moeforge.data.tokenizers import Tokenizer
from moeforge.errors import UserError
from moeforge.generate.blocks import Pool
from moeforge.generate.grammar import Matcher
from moeforge.generate.request import End, Event, Likely, Put, Read, Request, Stop, Token, Usage
from moeforge.generate.runner import Passed, Runner
from moeforge.generate.sample import Sampler, Sampling, check_finite, likely
from moeforge.generate.schedule import Piece, Schedule, Text
from moeforge.generate.settings import Settings
from moeforge.generate.text import Held
from moeforge.kernels.native.engine import end_workers


class FullError(UserError):
    """The waiting line is full: ask again later."""


class ContextError(UserError):
    """The prompt is longer than the context."""


@dataclass
class Report:
    """What an engine does and did. Cheap to take, from any thread."""

    running: int = 0
    waiting: int = 0
    blocks_used: int = 0
    blocks_cached: int = 0
    blocks_total: int = 0
    tokens_read: int = 0
    """Of prompts, those that were computed."""
    tokens_reused: int = 0
    tokens_written: int = 0
    preemptions: int = 0
    passes: int = 0
    busy_s: float = 0.0
    """Seconds spent in passes."""
    weight_bytes: int = 0
    """Of weights, those that passes have read: all but the experts, and the experts that some token took."""
    tokens_per_expert: dict[int, list[int]] = field(default_factory=dict)
    """By layer, choices of all tokens of all requests together."""


class _Writing:
    """What the engine holds of a request besides its text: its sampler, its decoder, what the prompt's tokens were."""

    def __init__(self, text: Text, tokenizer: Tokenizer, vocab_size: int) -> None:
        request, sampling = text.request, text.request.sampling
        self.ends = frozenset() if sampling.ignore_end else tokenizer.end_ids
        banned = sorted(tokenizer.end_ids) if sampling.ignore_end else ()
        matcher = None if sampling.grammar is None else Matcher(sampling.grammar, tokenizer)
        self.sampler = Sampler(sampling, request.prompt, banned, matcher, vocab_size)
        self.held = Held(tokenizer.stream(request.prompt), sampling.stop)
        self.prompt: list[tuple[Likely, tuple[Likely, ...]] | None] = [None]
        self.unread: tuple[Token, Stop | None] | None = None
        """Where experts are asked for: the token that was written and is yet to be read, and whether it is the last."""


class Engine:
    """Continuous batching: every pass has one token of each text that is being written, and chunks of prompts.

    ``submit``, ``cancel`` and ``report`` may be called from any thread. A request's tokens and probabilities do not
    depend on the other requests, bit for bit.
    """

    def __init__(
        self, runner: Runner, tokenizer: Tokenizer, settings: Settings, blocks: int, name: str = "model"
    ) -> None:
        self.runner, self.tokenizer, self.settings, self.name, self.about = runner, tokenizer, settings, name, ""
        self.max_len, self.vocab_size = runner.max_len, min(tokenizer.vocab_size, runner.vocab_size)
        self._pool = Pool(blocks, settings.block_size, settings.prefix_reuse)
        self._schedule = Schedule(self._pool, settings.max_running, settings.token_budget)
        self._writing: dict[Text, _Writing] = {}
        self._texts: dict[Request, Text] = {}
        self._new: deque[Text] = deque()
        self._cancelled: deque[Request] = deque()
        self._wake = threading.Condition()
        self._report, self._counts = Report(blocks_total=blocks), dict[int, torch.Tensor]()
        self._closing, self._broken = False, ""
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        end_workers()  # those that loaded the model: the engine's thread has its own
        self._thread.start()

    def submit(
        self, prompt: Sequence[int], sampling: Sampling, put: Put, show_experts: bool = False, owner: str = ""
    ) -> Request:
        """Takes a request; its events go to ``put``, ``End`` last. Prefixes are reused among requests of one ``owner``.

        Raises UserError as ``check``, and ``FullError`` where too many wait already.
        """
        self.check(prompt, sampling)
        request = Request(prompt, sampling, put, show_experts)
        if sampling.contrast is not None:  # the weak pass has keys and values only of texts of its own kind
            owner = f"{owner}\0{sampling.contrast.rank}"
        text = Text(request, [*prompt], sampling.prompt_logprobs is None, owner)
        writing = _Writing(text, self.tokenizer, self.vocab_size)
        with self._wake:
            if self._broken or self._closing:
                raise UserError(self._broken or "the engine is closed")
            if len(self._texts) >= self.settings.max_running + self.settings.max_waiting:
                raise FullError(f"{self._waiting} requests wait already: try again later")
            self._texts[request], self._writing[text] = text, writing
            self._new.append(text)
            self._wake.notify()
        return request

    def check(self, prompt: Sequence[int], sampling: Sampling) -> None:
        """Raises UserError for a prompt that is empty, has ids that are no tokens or leaves no room in the context, and
        for settings that the model does not take."""
        if not prompt:
            raise UserError("the prompt is empty: give at least one token")
        absent = [token for token in prompt if not 0 <= token < self.vocab_size]
        if absent:
            raise UserError(f"there is no token {absent[0]}: ids go from 0 to {self.vocab_size - 1}")
        room = self.max_len - len(prompt)
        if room < min(1, sampling.max_tokens):
            raise ContextError(
                f"the prompt has {len(prompt)} tokens, and the context takes {self.max_len} with what is to be written"
            )
        sampling.check(self.vocab_size)
        self.runner.check(sampling)

    def cancel(self, request: Request) -> None:
        """Ends a request; nothing happens to one that has ended."""
        with self._wake:
            self._cancelled.append(request)
            self._wake.notify()

    def write(self, prompt: Sequence[int], sampling: Sampling, show_experts: bool = False) -> Iterator[Event]:
        """The events of one request, for who waits for them. Closing the iterator cancels."""
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        request = self.submit(prompt, sampling, events.put, show_experts)
        try:
            while True:
                event = events.get()
                yield event
                if isinstance(event, End):
                    return
        finally:
            self.cancel(request)

    def report(self) -> Report:
        """Counts until now."""
        with self._wake:
            schedule, pool = self._schedule, self._pool
            now = Report(**vars(self._report))
            now.running, now.waiting = len(schedule.running), self._waiting
            now.blocks_used, now.blocks_cached = pool.used, pool.cached
            now.preemptions = schedule.preemptions
            now.tokens_per_expert = {layer: counts.tolist() for layer, counts in self._counts.items()}
            return now

    def close(self, drain_s: float = 0) -> None:
        """Takes nothing new; ends what still runs after ``drain_s`` seconds as cancelled."""
        with self._wake:
            self._closing = True
            self._wake.wait_for(lambda: not self._texts, timeout=drain_s)
            self._cancelled.extend(self._texts)
            self._wake.notify_all()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def broken(self) -> str:
        """Why it has stopped, or nothing."""
        return self._broken

    @property
    def _waiting(self) -> int:
        return len(self._new) + len(self._schedule.waiting)

    def _work(self) -> None:
        """The thread."""
        try:
            while self._take_orders():
                pieces = self._schedule.next_pass()
                if pieces:
                    self._pass(pieces)
        except BaseException as error:
            self._broken = f"the engine has stopped: {type(error).__name__}: {error}"
            with self._wake:
                for text in list(self._texts.values()):
                    self._tell_end(text, "failed", error=self._broken)
                self._texts.clear()
                self._wake.notify_all()
            if not isinstance(error, Exception):
                raise

    def _take_orders(self) -> bool:
        """Waits for something to do, takes what is new and drops what is cancelled; False when all is over."""
        with self._wake:
            self._wake.wait_for(lambda: self._texts or self._closing)
            if self._closing and not self._texts:
                return False
            self._schedule.waiting.extend(self._new)
            self._new.clear()
            cancelled = [self._texts[request] for request in self._cancelled if request in self._texts]
            self._cancelled.clear()
        for text in dict.fromkeys(cancelled):
            self._end(text, "cancelled")
        return True

    def _pass(self, pieces: list[Piece]) -> None:
        started = perf_counter()
        passed = self.runner.run(pieces, any(piece.text.request.show_experts for piece in pieces))
        with self._wake:
            self._count(pieces, passed, perf_counter() - started)
            self._schedule.done(pieces)
        for index, piece in enumerate(pieces):
            experts = passed.experts[index] if passed.experts else None
            weak = passed.weak.get(index) if passed.weak else None
            try:
                self._take(piece, passed.logits[index], experts, weak)
            except Exception as error:  # of this text alone: the others go on
                reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
                self._end(piece.text, "failed", error=reason)

    def _count(self, pieces: list[Piece], passed: Passed, seconds: float) -> None:
        report = self._report
        report.passes += 1
        report.busy_s += seconds
        for piece in pieces:
            if piece.start < len(piece.text.request.prompt):
                report.tokens_read += piece.end - piece.start
        report.weight_bytes += passed.weight_bytes
        for layer, counts in passed.counts.items():
            self._counts[layer] = counts if layer not in self._counts else self._counts[layer] + counts

    def _take(
        self, piece: Piece, logits: torch.Tensor, experts: dict[int, list[int]] | None, weak_V: torch.Tensor | None
    ) -> None:
        """What follows for one text from a piece that was read."""
        text, sampling = piece.text, piece.text.request.sampling
        writing = self._writing[text]
        if sampling.prompt_logprobs is not None and piece.start < len(text.request.prompt):
            self._note_prompt(piece, writing, logits)
        if not piece.complete:
            return
        if writing.unread is not None:
            (written, stop), writing.unread = writing.unread, None
            text.request.put(replace(written, experts=experts))
            if stop is not None:
                return self._end(text, stop)
        if sampling.max_tokens == 0:
            return self._end(text, "max_tokens")
        picked = writing.sampler.pick(logits[-1], weak_V)
        token = picked.token_id
        if token in writing.ends:
            return self._end(text, "end of document")
        if token in sampling.stop_ids:
            return self._end(text, "stop")
        text.first = text.first or perf_counter()
        text.tokens.append(token)
        text.request.written.append(token)
        self._report.tokens_written += 1
        printable, stopped = writing.held.push(token)
        alternatives = tuple(Likely(*pair) for pair in picked.alternatives)
        written, stop = Token(token, printable, picked.logprob, alternatives), self._last(text, stopped)
        if text.request.show_experts:  # those of its own position: known when it has been read
            writing.unread = written, stop
            return
        text.request.put(written)
        if stop is not None:
            self._end(text, stop)

    def _last(self, text: Text, stopped: bool) -> Stop | None:
        """Why the token that was just written is the last one, if it is."""
        if stopped:
            return "stop"
        if len(text.request.written) == text.request.sampling.max_tokens:
            return "max_tokens"
        return "context full" if len(text.tokens) == self.max_len else None

    def _note_prompt(self, piece: Piece, writing: _Writing, logits: torch.Tensor) -> None:
        """The logits of a token are about the one after it."""
        check_finite(logits)
        prompt, count = piece.text.request.prompt, piece.text.request.sampling.prompt_logprobs or 0
        for at, logits_V in zip(range(piece.start + 1, piece.end + 1), logits, strict=True):
            if at < len(prompt) and at == len(writing.prompt):
                logprob, others = likely(logits_V, prompt[at], count, self.vocab_size)
                alternatives = tuple(Likely(*pair) for pair in others)
                writing.prompt.append((Likely(prompt[at], logprob), alternatives))
        if piece.end >= len(prompt) and writing.prompt:
            piece.text.request.put(Read(tuple(writing.prompt)))
            writing.prompt = []

    def _end(self, text: Text, stop: Stop, error: str | None = None) -> None:
        with self._wake:
            self._schedule.remove(text)
            self._texts.pop(text.request)
            self._report.tokens_reused += text.reused
            self._wake.notify_all()
        self._tell_end(text, stop, error)

    def _tell_end(self, text: Text, stop: Stop, error: str | None = None) -> None:
        writing, rest = self._writing.pop(text, None), ""
        if writing is not None and writing.unread is not None:
            with suppress(Exception):
                text.request.put(writing.unread[0])
        if writing is not None and stop != "stop":
            rest, stopped = writing.held.finish()
            stop = "stop" if stopped else stop
        now, request = perf_counter(), text.request
        first = None if text.first is None else text.first - text.submitted
        queued = (text.started or now) - text.submitted
        usage = Usage(len(request.prompt), len(request.written), text.reused, queued, first, now - text.submitted)
        with suppress(Exception):  # nobody is there to be told: no matter of the others
            request.put(End(stop, usage, rest, error))
