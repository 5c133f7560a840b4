"""``/v1/completions``."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from moeforge.generate import End, Read, Sampling, Token
from moeforge.generate.request import Likely
from moeforge.serve.call import Call, Written, collect, reason, unless_gone
from moeforge.serve.errors import ApiError
from moeforge.serve.events import merged, streamed
from moeforge.serve.protocol import CompletionRequest
from moeforge.serve.state import State, new_id, seeds


def router(state: State) -> APIRouter:
    """Its one route."""
    routes = APIRouter()

    @routes.post("/v1/completions")
    async def completions(asked: CompletionRequest, request: Request) -> Response:
        """Goes on with texts."""
        state.check(asked.model)
        prompts = await _prompts(state, asked)
        state.many(len(prompts) * asked.n)
        if asked.suffix is not None or asked.best_of not in (None, asked.n):
            raise ApiError(
                400, "suffix and best_of are not supported", "unsupported", "suffix" if asked.suffix else "best_of"
            )
        if asked.logprobs is not None and asked.logprobs > state.limits.max_logprobs:
            raise ApiError(400, f"logprobs: {state.limits.max_logprobs} are the most", "invalid_value", "logprobs")
        samplings = [_sampling(state, asked, len(prompt)) for prompt in prompts]
        jobs = [
            (prompt, one) for prompt, all_of in zip(prompts, samplings, strict=True) for one in seeds(all_of, asked.n)
        ]
        head = {
            "id": new_id("cmpl"),
            "object": "text_completion",
            "created": int(time.time()),
            "model": state.engine.name,
        }
        if asked.stream:
            return await streamed(request, _chunks(state, asked, jobs, head))
        written = await unless_gone(request, all_written(state, jobs))
        choices = [
            _choice(state, asked, index, prompt, one)
            for index, ((prompt, _), one) in enumerate(zip(jobs, written, strict=True))
        ]
        return JSONResponse({**head, "choices": choices, "usage": usage([one.end for one in written], asked.n)})

    return routes


def usage(ends: list[End], n: int) -> dict[str, Any]:
    """OpenAI's count: a prompt with several answers counts once."""
    read, wrote = sum(end.usage.prompt_tokens for end in ends[::n]), sum(end.usage.written_tokens for end in ends)
    reused = sum(end.usage.reused_tokens for end in ends[::n])
    details = {"cached_tokens": reused}
    return {
        "prompt_tokens": read,
        "completion_tokens": wrote,
        "total_tokens": read + wrote,
        "prompt_tokens_details": details,
    }


async def all_written(state: State, jobs: list[tuple[list[int], Sampling]]) -> list[Written]:
    """All requests, side by side; when one fails, the others are cancelled."""
    deadline = state.deadline()

    async def one(prompt: list[int], sampling: Sampling) -> Written:
        async with Call(state, prompt, sampling) as call:
            return await collect(call, deadline)

    tasks = [asyncio.create_task(one(*job)) for job in jobs]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def _prompts(state: State, asked: CompletionRequest) -> list[list[int]]:
    prompt: Any = asked.prompt
    if isinstance(prompt, str):
        return [await state.encode(prompt)]
    if not prompt:
        raise ApiError(400, "prompt: the list is empty", "invalid_value", "prompt")
    if isinstance(prompt[0], int):
        return [list(prompt)]
    return [await state.encode(one) if isinstance(one, str) else list(one) for one in prompt]


def _sampling(state: State, asked: CompletionRequest, prompt_tokens: int) -> Sampling:
    more: dict[str, Any] = {"logprobs": asked.logprobs}
    if asked.echo and asked.logprobs is not None:
        more["prompt_logprobs"] = asked.logprobs
    wanted = 16 if asked.max_tokens is None else asked.max_tokens
    if wanted == 0 and not asked.echo:
        raise ApiError(400, "max_tokens: 0 is for echo: true", "invalid_value", "max_tokens")
    if wanted == 0 and asked.logprobs is None:
        more["prompt_logprobs"] = 0
    return state.sampling(asked, prompt_tokens, wanted, **more)


def _shown(state: State, asked: CompletionRequest, index: int, prompt: list[int]) -> list[int]:
    """The prompt as it was sent: of a text without what documents start with, of token ids every one."""
    given: Any = asked.prompt
    sent = given if isinstance(given, str) or isinstance(given[0], int) else given[index // asked.n]
    start = state.engine.tokenizer.start_ids
    return prompt[len(start) :] if isinstance(sent, str) and prompt[: len(start)] == start else prompt


def _choice(state: State, asked: CompletionRequest, index: int, prompt: list[int], written: Written) -> dict[str, Any]:
    shown = _shown(state, asked, index, prompt) if asked.echo else []
    before = state.engine.tokenizer.decode(shown) if asked.echo else ""
    choice: dict[str, Any] = {"index": index, "text": before + written.text, "finish_reason": reason(written.end)}
    choice["logprobs"] = None
    if asked.logprobs is not None:
        rows = []
        if asked.echo and written.prompt is not None:
            rows += _of_prompt(written.prompt, shown)
        rows += [(token.token_id, token.logprob, token.alternatives) for token in written.tokens]
        choice["logprobs"] = logprobs(state, rows)
    if state.show_routing:
        choice["routing"] = [token.experts for token in written.tokens]
    return choice


Row = tuple[int, float | None, tuple[Likely, ...]]


def _of_prompt(read: Read, shown: list[int]) -> list[Row]:
    rows: list[Row] = []
    known = read.tokens[len(read.tokens) - len(shown) :]
    for token, entry in zip(shown, known, strict=True):
        rows.append((token, None, ()) if entry is None else (token, entry[0].logprob, entry[1]))
    return rows


def logprobs(state: State, rows: list[Row], offset: int = 0) -> dict[str, Any]:
    """In the form of completions: parallel lists."""
    tokenizer = state.engine.tokenizer
    pieces = tokenizer.pieces([token for token, _, _ in rows])
    offsets = []
    for piece in pieces:
        offsets.append(offset)
        offset += len(piece)
    tops = [
        None if value is None else {tokenizer.pieces([one.token_id])[0]: one.logprob for one in others}
        for _, value, others in rows
    ]
    return {
        "tokens": pieces,
        "token_logprobs": [value for _, value, _ in rows],
        "top_logprobs": tops,
        "text_offset": offsets,
    }


async def _chunks(
    state: State, asked: CompletionRequest, jobs: list[tuple[list[int], Sampling]], head: dict[str, Any]
) -> AsyncIterator[dict[str, Any]]:
    def chunk(index: int, text: str, rows: list[Row], end: End | None, routing: Any = None) -> dict[str, Any]:
        known = logprobs(state, rows) if asked.logprobs is not None and rows else None
        choice = {"index": index, "text": text, "logprobs": known, "finish_reason": reason(end) if end else None}
        return {**head, "choices": [choice | ({"routing": routing} if state.show_routing else {})]}

    ends: dict[int, End] = {}
    if asked.echo:
        for prompt, sampling in jobs:
            state.accepts(prompt, sampling)
        for index, (prompt, sampling) in enumerate(jobs):
            if sampling.prompt_logprobs is None:
                yield chunk(index, state.engine.tokenizer.decode(_shown(state, asked, index, prompt)), [], None)
    async for index, event in merged(state, jobs):
        match event:
            case Read():
                shown = _shown(state, asked, index, jobs[index][0])
                text = state.engine.tokenizer.decode(shown) if asked.echo else ""
                yield chunk(index, text, _of_prompt(event, shown), None)
            case Token():
                row = (event.token_id, event.logprob, event.alternatives)
                yield chunk(index, event.text, [row], None, event.experts)
            case End():
                if event.stop == "failed":
                    raise ApiError(500, event.error or "the request failed", "request_failed")
                ends[index] = event
                yield chunk(index, event.text, [], event)
    if asked.stream_options is not None and asked.stream_options.include_usage:
        yield {**head, "choices": [], "usage": usage([ends[index] for index in sorted(ends)], asked.n)}
