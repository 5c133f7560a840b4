"""The server's routes, and what stands before all of them: keys, sizes, logs."""

import json
import logging
import time
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moeforge import __version__
from moeforge.serve import chat, completions, errors, page
from moeforge.serve.call import OWNER
from moeforge.serve.errors import ApiError, body
from moeforge.serve.protocol import DetokenizeRequest, TokenizeRequest
from moeforge.serve.state import State

OPEN = ("/health", "/ready", "/", "/page.js", "/page.css")
"""Paths that need no key: they say nothing about the model."""
log = logging.getLogger("moeforge.serve")


def build(state: State) -> ASGIApp:
    """The application."""
    app = FastAPI(title="moeforge", version=__version__, docs_url=None, redoc_url=None)
    errors.install(app)
    app.include_router(completions.router(state))
    app.include_router(chat.router(state))
    app.include_router(page.router(state))
    _about(app, state)
    _tokens(app, state)
    return Gate(app, state)


def _about(app: FastAPI, state: State) -> None:
    def model() -> dict[str, Any]:
        facts = {"id": state.engine.name, "object": "model", "created": state.started, "owned_by": "moeforge"}
        return facts | {"max_model_len": state.engine.max_len}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The one model."""
        return {"object": "list", "data": [model()]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        """The model, by its name."""
        state.check(name)
        return model()

    @app.get("/health")
    async def health() -> dict[str, str]:
        """The process is alive."""
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> Response:
        """Requests are taken."""
        if state.draining or state.engine.broken:
            raise ApiError(503, state.engine.broken or "the server is stopping", "draining", retry_s=5)
        return JSONResponse({"status": "ready"})

    @app.get("/metrics")
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(state.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _tokens(app: FastAPI, state: State) -> None:
    @app.post("/tokenize")
    async def tokenize(asked: TokenizeRequest) -> dict[str, Any]:
        """Ids of a text."""
        state.check(asked.model)
        ids = await state.encode(asked.prompt)
        ids = ids if asked.add_special_tokens else ids[len(state.engine.tokenizer.start_ids) :]
        return {"tokens": ids, "count": len(ids), "max_model_len": state.engine.max_len}

    @app.post("/detokenize")
    async def detokenize(asked: DetokenizeRequest) -> dict[str, Any]:
        """Text of ids."""
        state.check(asked.model)
        absent = [token for token in asked.tokens if not 0 <= token < state.engine.vocab_size]
        if absent:
            raise ApiError(400, f"tokens: there is no token {absent[0]}", "invalid_value", "tokens")
        return {"prompt": state.engine.tokenizer.decode(asked.tokens)}


class Gate:
    """Before all routes: the key, the size of the body, one line of log for each answer, without any text of it."""

    def __init__(self, app: ASGIApp, state: State) -> None:
        self.app, self.state = app, state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started, status, path = time.perf_counter(), 499, scope["path"]

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            refused = self._refuses(scope)
            if refused is not None:
                headers = {"WWW-Authenticate": "Bearer"} if refused.status == 401 else {}
                content = body(refused.status, refused.message, refused.code)
                await JSONResponse(content, refused.status, headers)(scope, receive, watched)
            else:
                await self.app(scope, _at_most(receive, self.state.limits.max_request_bytes), watched)
        finally:
            self.state.metrics.answered(status)
            if path not in ("/health", "/ready", "/metrics"):
                seconds = round(time.perf_counter() - started, 4)
                line = {"method": scope["method"], "path": path, "status": status, "seconds": seconds}
                log.info(json.dumps(line))

    def _refuses(self, scope: Scope) -> ApiError | None:
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if self.state.keys:
            OWNER.set(headers.get("authorization", ""))
        if scope["path"] not in OPEN and not self.state.keys.allow(headers.get("authorization")):
            return ApiError(401, "a valid API key is needed: send Authorization: Bearer KEY", "invalid_api_key")
        length, most = headers.get("content-length", ""), self.state.limits.max_request_bytes
        if length.isdecimal() and int(length) > most:
            return ApiError(413, f"the body has {length} bytes, {most} are allowed", "request_too_large")
        return None


def _at_most(receive: Receive, most: int) -> Receive:
    """Raises ApiError when a body that did not say its length turns out longer."""
    got = 0

    async def counted() -> Message:
        nonlocal got
        message = await receive()
        got += len(message.get("body", b""))
        if got > most:
            raise HTTPException(413, f"the body has more than {most} bytes")  # FastAPI lets no other kind through
        return message

    return counted
