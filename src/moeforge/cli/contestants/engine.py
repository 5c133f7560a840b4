"""Our engine in the process that asks it."""

import threading
import time
from collections.abc import Sequence

from moeforge.cli.contestants import Job, Texts, Write, take_turns
from moeforge.generate.engine import Engine


def opened(job: Job) -> tuple[Write, float]:
    """An engine with room for all texts."""
    import torch

    from moeforge.generate.opening import open_engine
    from moeforge.generate.settings import Settings
    from moeforge.kernels.allocator import keep_freed_memory

    torch.set_num_threads(job.threads)
    engine = open_engine(job.path, Settings.model_validate({"weights": job.weights, "max_running": job.clients}))
    keep_freed_memory()  # as the server does, and not before: layers that are rounded leave memory
    _write(engine, [[1]], 4)  # passes of one token each
    report = engine.report()
    return lambda prompts, new: _write(engine, prompts, new), report.weight_bytes / report.passes


def _write(engine: Engine, prompts: Sequence[Sequence[int]], new: int) -> Texts:
    from moeforge.generate.request import End, Event, Token
    from moeforge.generate.sample import Sampling

    tokens: list[list[int]] = [[] for _ in prompts]
    times: list[list[float]] = [[] for _ in prompts]
    ended = threading.Semaphore(0)

    def listen(text: int, event: Event) -> None:
        if isinstance(event, Token):
            tokens[text].append(event.token_id)
            times[text].append(time.perf_counter() - started)
        elif isinstance(event, End):
            ended.release()

    sampling = Sampling(temperature=0, max_tokens=new, ignore_end=True)
    started = time.perf_counter()
    for text, prompt in enumerate(prompts):
        engine.submit(prompt, sampling, lambda event, text=text: listen(text, event))
    for _ in prompts:
        ended.acquire()
    return {"tokens": tokens, "times": times}


if __name__ == "__main__":
    take_turns(opened)
