"""llama.cpp through llama-cpp-python: all texts in one batch, a token of each per call."""

import ctypes
import time
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from moeforge.cli.contestants import Job, Texts, Write, take_turns

CHUNK = 2048
"""Most tokens of one call, llama.cpp's default."""


def opened(job: Job) -> tuple[Write, float]:
    """A context with a stream of keys and values for each text."""
    api = import_module("llama_cpp")

    quiet = api.llama_log_callback(lambda level, text, data: None)
    api.llama_log_set(quiet, None)
    api.llama_backend_init()
    model = api.llama_model_load_from_file(job.path.encode(), api.llama_model_default_params())
    settings = api.llama_context_default_params()
    settings.n_seq_max, settings.n_batch = job.clients, CHUNK
    settings.n_ctx = job.clients * -(-job.length // 256) * 256
    settings.n_threads = settings.n_threads_batch = job.threads
    context = api.llama_init_from_model(model, settings)
    batch = api.llama_batch_init(CHUNK, 0, 1)
    kept = (quiet, model)

    def write(prompts: Sequence[Sequence[int]], new: int) -> Texts:
        return _write(api, context, batch, prompts, new, kept)

    return write, job.active_share * api.llama_model_size(model)


def _write(api: Any, context: Any, batch: Any, prompts: Sequence[Sequence[int]], new: int, kept: object) -> Texts:
    started = time.perf_counter()
    api.llama_memory_clear(api.llama_get_memory(context), False)
    size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(api.llama_get_model(context)))
    tokens: list[list[int]] = [[] for _ in prompts]
    times: list[list[float]] = [[] for _ in prompts]
    rows = [(token, at, text, at == len(ids) - 1) for text, ids in enumerate(prompts) for at, token in enumerate(ids)]
    while rows:
        now, rows = rows[:CHUNK], rows[CHUNK:]
        picked = _pass(api, context, batch, now, size)
        moment = time.perf_counter() - started
        for text, token in picked.items():
            tokens[text].append(token)
            times[text].append(moment)
            if len(tokens[text]) < new:
                rows.append((token, len(prompts[text]) + len(tokens[text]) - 1, text, True))
    return {"tokens": tokens, "times": times}


def _pass(api: Any, context: Any, batch: Any, rows: list[tuple[int, int, int, bool]], size: int) -> dict[int, int]:
    """Text -> likeliest next token, of the rows that want one."""
    import numpy

    batch.n_tokens = len(rows)
    for row, (token, at, text, wanted) in enumerate(rows):
        batch.token[row], batch.pos[row], batch.logits[row] = token, at, wanted
        batch.n_seq_id[row], batch.seq_id[row][0] = 1, text
    failed = api.llama_decode(context, batch)
    if failed:
        raise RuntimeError(f"llama_decode returned {failed}")
    logits = {text: api.llama_get_logits_ith(context, row) for row, (*_, text, wanted) in enumerate(rows) if wanted}
    return {text: int(numpy.ctypeslib.as_array(found, (size,)).argmax()) for text, found in logits.items()}


def quantise(source: str, target: str, bits: int, threads: int) -> None:
    """A GGUF file in Q8_0 or Q4_0, every matrix of it, as llama.cpp's own program writes with ``--pure``."""
    api = import_module("llama_cpp")

    settings = api.llama_model_quantize_default_params()
    settings.ftype = {8: api.LLAMA_FTYPE_MOSTLY_Q8_0, 4: api.LLAMA_FTYPE_MOSTLY_Q4_0}[bits]
    settings.nthread, settings.pure = threads, True
    if api.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(settings)):
        raise RuntimeError(f"llama.cpp could not quantise {source}")


if __name__ == "__main__":
    take_turns(opened)
