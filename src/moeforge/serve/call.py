"""One request of the engine, awaited: its events cross from the engine's thread, and it ends when nobody listens."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from starlette.requests import Request

from moeforge.errors import UserError
from moeforge.generate import End, Event, Read, Sampling, Token
from moeforge.serve.errors import ApiError, of_engine

if TYPE_CHECKING:
    from moeforge.serve.state import State

OWNER: ContextVar[str] = ContextVar("owner", default="")
"""Who asks, by key: the start of a prompt is reused for its owner alone, so that no other one can tell it was asked."""


class Call:
    """Submitted when made. ``async with`` it: leaving cancels what still runs."""

    def __init__(self, state: "State", prompt: Sequence[int], sampling: Sampling) -> None:
        """Raises ApiError as the engine refuses."""
        loop, self._events = asyncio.get_running_loop(), asyncio.Queue[Event]()
        self._engine = state.engine

        def put(event: Event) -> None:
            if isinstance(event, End):  # here, where every one comes by, whoever still listens
                state.metrics.ended(event)
            try:
                loop.call_soon_threadsafe(self._events.put_nowait, event)
            except RuntimeError:  # the loop has ended, and with it whoever waited
                return

        try:
            self._request = state.engine.submit(prompt, sampling, put, state.show_routing, OWNER.get())
        except UserError as error:
            raise of_engine(error) from error

    async def __aenter__(self) -> "Call":
        return self

    async def __aexit__(self, *_: object) -> None:
        self._engine.cancel(self._request)

    async def events(self, deadline: float) -> AsyncIterator[Event]:
        """Until ``End``, which also comes when the loop's clock passes ``deadline``."""
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    event = await self._events.get()
            except TimeoutError:
                self._engine.cancel(self._request)
                event = await self._events.get()
            yield event
            if isinstance(event, End):
                return


@dataclass
class Written:
    """What a call gave, all of it."""

    end: End
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    prompt: Read | None = None


async def collect(call: Call, deadline: float) -> Written:
    """All events. Raises ApiError where the request failed."""
    text, tokens, prompt = [], [], None
    async for event in call.events(deadline):
        match event:
            case Token():
                text.append(event.text)
                tokens.append(event)
            case Read():
                prompt = event
            case End():
                if event.stop == "failed":
                    raise ApiError(500, event.error or "the request failed", "request_failed")
                return Written(event, "".join(text) + event.text, tokens, prompt)
    raise AssertionError("events end with End")


async def unless_gone(request: Request, work: Any) -> Any:
    """The result of ``work``, which is cancelled when the client hangs up."""
    task = asyncio.ensure_future(work)

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    watching = asyncio.ensure_future(watch())
    try:
        await asyncio.wait((task, watching), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client has gone")
        return task.result()
    finally:
        for running in (task, watching):
            running.cancel()
        await asyncio.gather(task, watching, return_exceptions=True)


def reason(end: End) -> str:
    """OpenAI's ``finish_reason``."""
    return "stop" if end.stop in ("end of document", "stop") else "length"
