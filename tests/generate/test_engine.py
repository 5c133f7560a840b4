"""The engine's side towards those who ask: what is refused, what ends how, and that one request never harms another."""

import math
import os
import queue
import threading
from collections.abc import Iterator, Sequence
from time import perf_counter
from typing import Any

import pytest
import torch

from moeforge.data.tokenizers import Tokenizer
from moeforge.errors import UserError
from moeforge.generate import End, Engine, Event, Sampling, Token
from moeforge.generate.engine import ContextError, FullError
from moeforge.generate.request import Read
from moeforge.generate.runner import BlockRunner
from moeforge.generate.sample import likely
from moeforge.kernels.apart import linear
from moeforge.kernels.native.engine import missing
from moeforge.models import Cache, Decoder, ModelConfig
from tests.generate.driving import collect, drive, engine, sampling

PROMPT = [256, *b"def first"]


@pytest.fixture
def running(model: Decoder) -> Iterator[Engine]:
    with engine(model) as opened:
        yield opened


class Slow(BlockRunner):
    """Passes only when told to."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.go = threading.Semaphore(0)

    def run(self, *args: Any) -> Any:
        self.go.acquire()
        return super().run(*args)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.generate.driving.BlockRunner", Slow)


def greedy(model: Decoder, prompt: Sequence[int], count: int) -> list[int]:
    """One text alone, the plain way."""
    cache, ids, written = Cache(model, 1, model.config.max_seq_len), [*prompt], list[int]()
    with torch.no_grad():
        for _ in range(count):
            logits = model(torch.tensor([ids]), cache=cache).logits[0, -1]
            ids = [int(logits[:256].argmax())]
            written += ids
    return written


@pytest.mark.skipif(missing() is not None, reason="the native engine is not there")
def test_the_thread_that_made_it_keeps_no_workers(model: Decoder) -> None:
    """More of them than cores, and all would sleep between the calls of a pass."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        wide = torch.randn(64, 2048)
        linear(wide, wide)
        before = len(os.listdir("/proc/self/task"))
        with engine(model):
            assert len(os.listdir("/proc/self/task")) == before  # one of ours has ended, the engine's has begun
    finally:
        torch.set_num_threads(threads)


def test_it_writes_what_the_plain_model_writes(running: Engine, model: Decoder) -> None:
    how = sampling(temperature=0, max_tokens=12)
    jobs = [(PROMPT, how), ([256, 7, 7], how), ([5], how)]
    for (prompt, _), got in zip(jobs, drive(running, jobs), strict=True):
        assert [*got.tokens] == greedy(model, prompt, 12)
        assert got.end.stop == "max_tokens" and got.end.error is None


@pytest.mark.parametrize(
    ("prompt", "fields", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([3, 257], {}, "no token 257: ids go from 0 to 256"),
        ([-1], {}, "no token -1"),
        ([1] * 48, {}, "has 48 tokens, and the context takes 48"),
        ([1] * 49, {"max_tokens": 0, "prompt_logprobs": 0}, "has 49 tokens"),
        ([1], {"logit_bias": {999: 1.0}}, "logit_bias: there is no token 999"),
        ([1], {"stop_ids": (999,)}, "stop_ids: there is no token 999"),
    ],
)
def test_bad_requests_are_refused_at_once(
    running: Engine, prompt: list[int], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        running.submit(prompt, sampling(**fields), lambda event: None)
    assert running.report().running == running.report().waiting == 0
    assert len(drive(running, [(PROMPT, sampling())])[0].tokens) == 8


def test_too_long_a_prompt_has_an_error_of_its_own(running: Engine) -> None:
    with pytest.raises(ContextError):
        running.submit([1] * 48, sampling(), lambda event: None)


def test_the_context_ends_a_text(running: Engine) -> None:
    (got,) = drive(running, [([1] * 46, sampling(max_tokens=20))])
    assert len(got.tokens) == 2 and got.end.stop == "context full"


def test_the_end_of_the_document_ends_a_text(even_model: Decoder, tokenizer: Tokenizer) -> None:
    (end,) = tokenizer.end_ids
    with engine(even_model) as running:
        (got,) = drive(running, [(PROMPT, sampling(ignore_end=False, logit_bias={end: 100.0}))])
        assert got.tokens == () and got.end.stop == "end of document"
        (got,) = drive(running, [(PROMPT, sampling(logit_bias={end: 100.0}))])
        assert end not in got.tokens and got.end.stop == "max_tokens"


def test_stop_ids_and_stop_texts(running: Engine) -> None:
    (free,) = drive(running, [(PROMPT, sampling(5))])
    by_id, by_text = drive(
        running,
        [
            (PROMPT, sampling(5, stop_ids=(free.tokens[3],))),
            (PROMPT, sampling(5, logit_bias={ord("x"): 1e5}, stop=("xxx",))),
        ],
    )
    first = free.tokens.index(free.tokens[3])
    assert by_id.tokens == free.tokens[:first] and by_id.end.stop == "stop"
    assert len(by_text.tokens) == 3 and by_text.end.stop == "stop" and by_text.end.text == ""


def test_logprobs_of_the_prompt_are_the_models_own(running: Engine, model: Decoder) -> None:
    events = [*running.write(PROMPT, sampling(prompt_logprobs=2, max_tokens=0))]
    assert isinstance(events[0], Read) and isinstance(events[1], End) and len(events) == 2
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT])).logits[0]
    assert events[0].tokens[0] is None
    for at, entry in enumerate(events[0].tokens[1:], 1):
        assert entry is not None
        logprob, best = likely(logits[at - 1], PROMPT[at], 2)
        assert entry[0].token_id == PROMPT[at] and entry[0].logprob == pytest.approx(logprob, abs=1e-4)
        assert [other.token_id for other in entry[1]] == [token for token, _ in best]


def until_end(inbox: "queue.SimpleQueue[Event]") -> Iterator[Event]:
    while True:
        event = inbox.get(timeout=60)
        yield event
        if isinstance(event, End):
            return


def test_logprobs_of_the_prompt_come_whole_from_chunks_and_after_preemption(model: Decoder) -> None:
    how = sampling(prompt_logprobs=1, max_tokens=16)
    with engine(model) as roomy, engine(model, blocks=4, token_budget=7) as narrow:
        (alone, *_) = [*roomy.write([*range(20)], how)]
        inboxes = [queue.SimpleQueue[Event]() for _ in range(3)]
        for inbox in inboxes:
            narrow.submit([*range(20)], how, inbox.put)
        for inbox in inboxes:
            assert inbox.get(timeout=60) == alone
            events = [*until_end(inbox)]
            assert len(events) == 16 + 1, "what was read is told once"
        assert narrow.report().preemptions > 0


def test_numbers_that_are_none_fail_an_echo_too(model: Decoder) -> None:
    broken = Decoder(model.config)
    with torch.no_grad():
        broken.embedding.weight.fill_(torch.nan)
    with engine(broken) as running:
        (end,) = running.write(PROMPT, sampling(prompt_logprobs=0, max_tokens=0))
        assert isinstance(end, End) and end.stop == "failed" and "not finite" in str(end.error)


@pytest.mark.usefixtures("slow")
def test_one_more_than_may_wait_is_refused_and_taken_later(model: Decoder) -> None:
    with engine(model, max_running=1, max_waiting=2) as running:
        inbox: queue.SimpleQueue[Event] = queue.SimpleQueue()
        for _ in range(3):
            running.submit(PROMPT, sampling(max_tokens=1), inbox.put)
        with pytest.raises(FullError, match="wait already"):
            running.submit(PROMPT, sampling(), inbox.put)
        running.runner.go.release(100)  # type: ignore[attr-defined]
        for _ in range(3):
            assert collect(inbox).end.stop == "max_tokens"
        running.submit(PROMPT, sampling(max_tokens=1), inbox.put)
        assert collect(inbox).end.stop == "max_tokens"


@pytest.mark.usefixtures("slow")
def test_cancelling_who_runs_and_who_waits(model: Decoder) -> None:
    with engine(model, max_running=1) as running:
        inboxes = [queue.SimpleQueue[Event]() for _ in range(3)]
        requests = [running.submit(PROMPT, sampling(max_tokens=4), inbox.put) for inbox in inboxes]
        running.cancel(requests[0])
        running.cancel(requests[2])
        running.cancel(requests[2])
        running.runner.go.release(100)  # type: ignore[attr-defined]
        ends = [collect(inbox).end for inbox in inboxes]
        assert [end.stop for end in ends] == ["cancelled", "max_tokens", "cancelled"]
        assert all(inbox.empty() for inbox in inboxes), "an end comes once"
        running.cancel(requests[1])
        assert running.report().blocks_used == 0


def test_who_stops_listening_cancels(running: Engine) -> None:
    events = running.write(PROMPT, sampling(max_tokens=30))
    next(events)
    events.close()  # type: ignore[attr-defined]
    assert len(drive(running, [(PROMPT, sampling())])[0].tokens) == 8
    report = running.report()
    assert (report.running, report.waiting, report.blocks_used) == (0, 0, 0)


def test_a_receiver_that_raises_ends_its_own_request_alone(running: Engine) -> None:
    def gone(event: Event) -> None:
        raise RuntimeError("the event loop is closed")

    running.submit(PROMPT, sampling(max_tokens=30), gone)
    assert len(drive(running, [(PROMPT, sampling())])[0].tokens) == 8
    assert running.broken == "" and running.report().blocks_used == 0


def test_a_sampler_that_raises_ends_its_own_request_alone(running: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    import moeforge.generate.engine as module

    class Breaks(module.Sampler):
        def pick(self, *args: Any) -> Any:
            if self.sampling.seed == 1:
                raise RuntimeError("no such bit")
            return super().pick(*args)

    monkeypatch.setattr(module, "Sampler", Breaks)
    broken, mine = drive(running, [(PROMPT, sampling(1)), (PROMPT, sampling(2))])
    assert broken.end.stop == "failed" and broken.end.error == "RuntimeError: no such bit"
    assert len(mine.tokens) == 8


def test_when_a_pass_breaks_everybody_is_told_and_nobody_waits(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*args: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(BlockRunner, "run", run)
    with engine(model, max_running=1) as running:
        inboxes = [queue.SimpleQueue[Event]() for _ in range(3)]
        try:
            for inbox in inboxes:
                running.submit(PROMPT, sampling(), inbox.put)
        except UserError:  # it broke before the last came
            pass
        end = collect(inboxes[0]).end
        assert end.stop == "failed" and "MemoryError: no room" in str(end.error)
        with pytest.raises(UserError, match="the engine has stopped: MemoryError: no room"):
            running.submit(PROMPT, sampling(), lambda event: None)
        assert "no room" in running.broken


def test_closing_ends_what_runs_and_refuses_what_comes(model: Decoder) -> None:
    running = engine(model)
    inbox: queue.SimpleQueue[Event] = queue.SimpleQueue()
    running.submit(PROMPT, sampling(max_tokens=38), inbox.put)
    running.close()
    assert collect(inbox).end.stop in ("cancelled", "context full")
    with pytest.raises(UserError, match="closed"):
        running.submit(PROMPT, sampling(), inbox.put)
    running.close()


def test_draining_lets_them_finish(model: Decoder) -> None:
    running = engine(model, max_running=1)
    inboxes = [queue.SimpleQueue[Event]() for _ in range(3)]
    for inbox in inboxes:
        running.submit(PROMPT, sampling(), inbox.put)
    running.close(drain_s=60)
    assert [collect(inbox).end.stop for inbox in inboxes] == ["max_tokens"] * 3


@pytest.mark.usefixtures("slow")
def test_draining_has_an_end(model: Decoder) -> None:
    running = engine(model)
    inbox: queue.SimpleQueue[Event] = queue.SimpleQueue()
    running.submit(PROMPT, sampling(max_tokens=30), inbox.put)
    running.runner.go.release(2)  # type: ignore[attr-defined]
    threading.Timer(0.3, running.runner.go.release, [100]).start()  # type: ignore[attr-defined]
    started = perf_counter()
    running.close(drain_s=0.1)
    assert perf_counter() - started < 5
    assert collect(inbox).end.stop == "cancelled"


def test_experts_come_to_who_asked(running: Engine, model: Decoder) -> None:
    shown = [e for e in running.write(PROMPT, sampling(max_tokens=3), show_experts=True) if isinstance(e, Token)]
    plain = [e for e in running.write(PROMPT, sampling(max_tokens=3)) if isinstance(e, Token)]
    assert [e.token_id for e in shown] == [e.token_id for e in plain]
    assert all(event.experts is not None and [*event.experts] == [*model.moe_layers] for event in shown)


@pytest.mark.usefixtures("slow")
def test_a_token_whose_experts_are_still_to_come_is_not_lost(model: Decoder) -> None:
    running = engine(model, max_running=1)
    inbox: queue.SimpleQueue[Event] = queue.SimpleQueue()
    request = running.submit(PROMPT, sampling(max_tokens=30), inbox.put, show_experts=True)
    running.runner.go.release(3)  # type: ignore[attr-defined]
    while running.report().passes < 3:
        pass
    running.cancel(request)
    running.runner.go.release(100)  # type: ignore[attr-defined]
    got = collect(inbox)
    assert got.end.stop == "cancelled" and len(got.tokens) == got.end.usage.written_tokens >= 3
    running.close()


def test_the_report_counts(running: Engine, model: Decoder) -> None:
    long = [256, *range(30)]
    first, second = (drive(running, [(long, sampling(max_tokens=3))])[0] for _ in range(2))
    report = running.report()
    assert report.tokens_read == 31 + (31 - 16) and report.tokens_reused == 16
    assert report.tokens_written == 6 and report.blocks_total == 64 and report.busy_s > 0
    assert (first.end.usage.prompt_tokens, first.end.usage.written_tokens) == (31, 3)
    assert second.end.usage.reused_tokens == 16
    rows = 31 + 2 + 15 + 2  # the last token that is written is never read
    chosen = next(iter(model.moe_layers.values())).config.router.select.k
    assert {layer: sum(counts) for layer, counts in report.tokens_per_expert.items()} == dict.fromkeys(
        model.moe_layers, rows * chosen
    )


def test_owners_share_nothing(running: Engine) -> None:
    long, events = [256, *range(30)], queue.SimpleQueue[Event]()
    reused = []
    for owner in ("a", "b", "a"):
        running.submit(long, sampling(max_tokens=1), events.put, owner=owner)
        reused.append(collect(events).end.usage.reused_tokens)
    assert reused == [0, 0, 16]


def test_many_threads_at_once(running: Engine) -> None:
    """Submitting, cancelling and looking while it runs."""
    results: list[End] = []

    def client(number: int) -> None:
        for turn in range(5):
            events = running.write(PROMPT, Sampling(max_tokens=5, seed=number))
            for event in events:
                running.report()
                if turn % 2 and isinstance(event, Token):
                    events.close()  # type: ignore[attr-defined]
                    break
                if isinstance(event, End):
                    results.append(event)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(results) >= 24 and all(end.error is None for end in results)
    assert len(drive(running, [(PROMPT, sampling())])[0].tokens) == 8
    assert running.report().blocks_used == 0


def test_a_padded_vocabulary_counts_in_probabilities_and_is_never_listed() -> None:
    """Public models round theirs up: what a token's probability was does not depend on who asks, writer or reader."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "d_model": 16, "num_layers": 2, "num_heads": 2, "max_seq_len": 64}
    moe = {"experts": {"num_experts": 4, "d_expert": 8}}
    padded = Decoder(ModelConfig.model_validate({**sizes, "moe": moe})).eval()
    with engine(padded) as running:
        (written,) = drive(running, [([256, 97], sampling(max_tokens=5, logprobs=400))])
        ids = [256, 97, *written.tokens]
        read, *_ = running.write(ids, Sampling(max_tokens=0, prompt_logprobs=400))
    assert isinstance(read, Read)
    for token, entry in zip(written.logprobs, read.tokens[2:], strict=True):
        assert entry is not None and token == (entry[0].logprob, entry[1])
        assert len(entry[1]) == 257 and sum(math.exp(one.logprob) for one in entry[1]) < 0.99
