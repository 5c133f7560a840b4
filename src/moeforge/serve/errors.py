"""OpenAI's error objects, for whatever can be wrong with a request."""

import json
import logging
import traceback
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from moeforge.errors import UserError
from moeforge.generate import ContextError, FullError


class ApiError(Exception):
    """An answer that is no success: ``status``, and what the error object says."""

    def __init__(
        self, status: int, message: str, code: str | None = None, param: str | None = None, retry_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.retry_s = status, message, code, param, retry_s


log = logging.getLogger("moeforge.serve")
KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 503: "unavailable_error"}


def body(status: int, message: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """The error object."""
    kind = KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def of_engine(error: UserError) -> ApiError:
    """What an engine refuses."""
    if isinstance(error, FullError):
        return ApiError(429, str(error), "queue_full", retry_s=1)
    if isinstance(error, ContextError):
        return ApiError(400, str(error), "context_length_exceeded", "messages")
    return ApiError(400, str(error))


def install(app: FastAPI) -> None:
    """Every error of ``app`` becomes one of these objects; no traceback leaves the server."""

    @app.exception_handler(ApiError)
    async def _(request: Request, error: ApiError) -> JSONResponse:
        headers = {} if error.retry_s is None else {"Retry-After": str(error.retry_s)}
        if error.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        content = body(error.status, error.message, error.code, error.param)
        return JSONResponse(content, error.status, headers)

    @app.exception_handler(RequestValidationError)
    async def _(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            reason = first.get("ctx", {}).get("error", "it cannot be read")
            return JSONResponse(body(400, f"the body is no JSON: {reason}", "invalid_json"), 400)
        where = ".".join(str(part) for part in first["loc"][1:])
        message = f"{where}: {first['msg']}" if where else first["msg"]
        return JSONResponse(body(400, message, "invalid_value", where or None), 400)

    @app.exception_handler(HTTPException)
    async def _(request: Request, error: HTTPException) -> JSONResponse:
        code = "request_too_large" if error.status_code == 413 else None
        return JSONResponse(body(error.status_code, str(error.detail), code), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def _(request: Request, error: Exception) -> JSONResponse:
        where = traceback.extract_tb(error.__traceback__)[-1]  # no message: it may quote what was asked
        log.error(json.dumps({"error": type(error).__name__, "file": where.filename, "line": where.lineno}))
        return JSONResponse(body(500, "the server failed at this request; its log says why"), 500)
