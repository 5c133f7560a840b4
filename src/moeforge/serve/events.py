"""Streams of server-sent events."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

from fastapi import Request
from fastapi.responses import StreamingResponse

from moeforge.generate import End, Event, Sampling
from moeforge.serve.call import Call, unless_gone
from moeforge.serve.errors import ApiError, body
from moeforge.serve.state import State


async def streamed(request: Request, chunks: AsyncIterator[dict[str, Any]], named: bool = False) -> StreamingResponse:
    """A response of the chunks as events. It starts with the first of them, so that what the engine refuses is an
    answer with that status.

    ``named`` events carry their ``type`` as the event's name, and nothing follows the last.
    """
    first = await unless_gone(request, anext(chunks))
    return StreamingResponse(_lines(first, chunks, named), media_type="text/event-stream")


async def _lines(first: dict[str, Any], chunks: AsyncIterator[dict[str, Any]], named: bool) -> AsyncIterator[str]:
    """``[DONE]`` after the last. What goes wrong midway is an event with an error object."""

    def line(chunk: dict[str, Any]) -> str:
        name = f"event: {chunk['type']}\n" if named else ""
        return f"{name}data: {json.dumps(chunk, ensure_ascii=False)}\n\n"

    try:
        yield line(first)
        async for chunk in chunks:
            yield line(chunk)
    except ApiError as error:
        yield f"data: {json.dumps(body(error.status, error.message, error.code, error.param))}\n\n"
    if not named:
        yield "data: [DONE]\n\n"


async def merged(state: State, jobs: list[tuple[list[int], Sampling]]) -> AsyncIterator[tuple[int, Event]]:
    """Events of several requests as they come, each with the number of its request. Leaving it cancels all."""
    deadline, ready = state.deadline(), asyncio.Queue[tuple[int, Event]]()

    async def pump(index: int, call: Call) -> None:
        async for event in call.events(deadline):
            await ready.put((index, event))

    async with AsyncExitStack() as stack:
        calls = [await stack.enter_async_context(Call(state, *job)) for job in jobs]
        pumps = [asyncio.ensure_future(pump(index, call)) for index, call in enumerate(calls)]
        try:
            left = len(calls)
            while left:
                index, event = await ready.get()
                if isinstance(event, End):
                    left -= 1
                yield index, event
        finally:
            for one in pumps:
                one.cancel()
