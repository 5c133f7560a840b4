"""``/v1/chat/completions`` and the text part of ``/v1/responses``: conversations through the model's own template."""

import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from moeforge.errors import UserError
from moeforge.generate import End, Sampling, Token
from moeforge.serve.call import Written, reason, unless_gone
from moeforge.serve.completions import all_written, usage
from moeforge.serve.errors import ApiError
from moeforge.serve.events import merged, streamed
from moeforge.serve.protocol import ChatRequest, Message, ResponseFormat, ResponsesRequest
from moeforge.serve.state import State, new_id, seeds

NO_TEMPLATE = "this model has no chat template: it goes on with texts, at /v1/completions"


def router(state: State) -> APIRouter:
    """Its two routes."""
    routes = APIRouter()

    @routes.post("/v1/chat/completions")
    async def chat(asked: ChatRequest, request: Request) -> Response:
        """Answers a conversation."""
        state.check(asked.model)
        state.many(asked.n)
        tools = None if asked.tool_choice == "none" else asked.tools
        prompt = prompt_of(state, asked.messages, tools, asked.chat_template_kwargs)
        jobs = [(prompt, one) for one in seeds(_sampling(state, asked, len(prompt)), asked.n)]
        head = {"id": new_id("chatcmpl"), "created": int(time.time()), "model": state.engine.name}
        if asked.stream:
            return await streamed(request, _chunks(state, asked, jobs, head))
        written = await unless_gone(request, all_written(state, jobs))
        choices = [_choice(state, asked, index, one) for index, one in enumerate(written)]
        used = usage([one.end for one in written], asked.n)
        return JSONResponse({**head, "object": "chat.completion", "choices": choices, "usage": used})

    @routes.post("/v1/responses")
    async def responses(asked: ResponsesRequest, request: Request) -> Response:
        """Answers a text or a conversation."""
        state.check(asked.model)
        messages = [Message(role="user", content=asked.input)] if isinstance(asked.input, str) else asked.input
        if asked.instructions is not None:
            messages = [Message(role="system", content=asked.instructions), *messages]
        prompt = prompt_of(state, messages, None, {})
        sampling = state.sampling(asked, len(prompt), asked.max_output_tokens)
        if asked.stream:
            return await streamed(request, _response_events(state, prompt, sampling), named=True)

        (written,) = await unless_gone(request, all_written(state, [(prompt, sampling)]))
        return JSONResponse(_response(state, new_id("resp"), written.text, written.end))

    return routes


def prompt_of(state: State, messages: list[Message], tools: list[Any] | None, more: dict[str, Any]) -> list[int]:
    """Ids of a conversation. Raises ApiError where the model has no template, or it refuses."""
    if state.template is None:
        raise ApiError(400, NO_TEMPLATE, "no_chat_template", "messages")
    plain = [_plain(message) for message in messages]
    try:
        return state.template.prompt(plain, tools, more)
    except UserError as error:
        raise ApiError(400, str(error), "invalid_value", "messages") from error


def _plain(message: Message) -> dict[str, Any]:
    """A message with its text in one piece. Raises ApiError for parts that are no text."""
    fields = message.model_dump(exclude_none=True)
    if isinstance(message.content, list):
        kinds = {part.get("type") for part in message.content}
        if not kinds <= {"text", "input_text", "output_text"}:
            raise ApiError(
                400, f"messages: only text is understood, not {sorted(map(str, kinds))}", "unsupported", "messages"
            )
        fields["content"] = "".join(str(part.get("text", "")) for part in message.content)
    return fields


def _sampling(state: State, asked: ChatRequest, prompt_tokens: int) -> Sampling:
    if asked.top_logprobs is not None and not asked.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", "invalid_value", "top_logprobs")
    if (asked.top_logprobs or 0) > state.limits.max_logprobs:
        raise ApiError(400, f"top_logprobs: {state.limits.max_logprobs} are the most", "invalid_value", "top_logprobs")
    more: dict[str, Any] = {"logprobs": (asked.top_logprobs or 0) if asked.logprobs else None}
    more |= _grammar(asked.response_format)
    most = asked.max_completion_tokens if asked.max_completion_tokens is not None else asked.max_tokens
    return state.sampling(asked, prompt_tokens, most, **more)


def _grammar(form: ResponseFormat | None) -> dict[str, Any]:
    if form is None or form.type == "text":
        return {}
    if form.type == "json_object":
        return {"grammar": {"json_schema": {"type": "object"}}}
    if form.json_schema is None:
        raise ApiError(400, "response_format: json_schema is missing", "invalid_value", "response_format")
    return {"grammar": {"json_schema": form.json_schema.schema_}}


def _logprobs(state: State, tokens: list[Token]) -> dict[str, Any]:
    """In the form of chats."""

    def entry(token_id: int, logprob: float | None) -> dict[str, Any]:
        piece = state.engine.tokenizer.pieces([token_id])[0]
        return {"token": piece, "logprob": logprob, "bytes": list(piece.encode("utf-8"))}

    content = []
    for token in tokens:
        others = [entry(one.token_id, one.logprob) for one in token.alternatives]
        content.append({**entry(token.token_id, token.logprob), "top_logprobs": others})
    return {"content": content, "refusal": None}


def _choice(state: State, asked: ChatRequest, index: int, written: Written) -> dict[str, Any]:
    message = {"role": "assistant", "content": written.text, "refusal": None}
    known = _logprobs(state, written.tokens) if asked.logprobs else None
    choice = {"index": index, "message": message, "logprobs": known, "finish_reason": reason(written.end)}
    return choice | ({"routing": [token.experts for token in written.tokens]} if state.show_routing else {})


async def _chunks(
    state: State, asked: ChatRequest, jobs: list[tuple[list[int], Sampling]], head: dict[str, Any]
) -> AsyncIterator[dict[str, Any]]:
    head = {**head, "object": "chat.completion.chunk"}

    def chunk(index: int, delta: dict[str, Any], end: End | None = None, **more: Any) -> dict[str, Any]:
        return {
            **head,
            "choices": [{"index": index, "delta": delta, "finish_reason": reason(end) if end else None, **more}],
        }

    greeted, ends = set[int](), dict[int, End]()
    async for index, event in merged(state, jobs):
        if index not in greeted:
            greeted.add(index)
            yield chunk(index, {"role": "assistant", "content": ""})
        match event:
            case Token():
                more: dict[str, Any] = {"logprobs": _logprobs(state, [event])} if asked.logprobs else {}
                more |= {"routing": event.experts} if state.show_routing else {}
                if event.text or more:
                    yield chunk(index, {"content": event.text}, **more)
            case End():
                if event.stop == "failed":
                    raise ApiError(500, event.error or "the request failed", "request_failed")
                ends[index] = event
                if event.text:
                    yield chunk(index, {"content": event.text})
                yield chunk(index, {}, event)
    if asked.stream_options is not None and asked.stream_options.include_usage:
        yield {**head, "choices": [], "usage": usage([ends[index] for index in sorted(ends)], asked.n)}


def _response(state: State, name: str, text: str | None, end: End | None) -> dict[str, Any]:
    status = "in_progress" if end is None else "completed" if reason(end) == "stop" else "incomplete"
    content = [{"type": "output_text", "text": text, "annotations": []}]
    message = {"type": "message", "id": f"msg-{name}", "role": "assistant", "status": status, "content": content}
    used = None
    if end is not None:
        read, wrote = end.usage.prompt_tokens, end.usage.written_tokens
        used = {"input_tokens": read, "output_tokens": wrote, "total_tokens": read + wrote}
        used |= {"input_tokens_details": {"cached_tokens": end.usage.reused_tokens}}
        used |= {"output_tokens_details": {"reasoning_tokens": 0}}
    return {
        **{"id": name, "object": "response", "created_at": int(time.time()), "status": status, "error": None},
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        **{"instructions": None, "metadata": {}, "model": state.engine.name, "parallel_tool_calls": False},
        **{"tools": [], "tool_choice": "none", "temperature": None, "top_p": None},
        "output": [message] if text is not None else [],
        "usage": used,
    }


async def _response_events(state: State, prompt: list[int], sampling: Sampling) -> AsyncIterator[dict[str, Any]]:
    name, text, number = new_id("resp"), "", 0
    where = {"item_id": f"msg-{name}", "output_index": 0, "content_index": 0}

    def event(kind: str, **fields: Any) -> dict[str, Any]:
        nonlocal number
        number += 1
        return {"type": kind, "sequence_number": number - 1, **fields}

    begun = False
    async for _, one in merged(state, [(prompt, sampling)]):
        if not begun:
            begun = True
            yield event("response.created", response=_response(state, name, None, None))
            empty = {
                "type": "message",
                "id": where["item_id"],
                "role": "assistant",
                "status": "in_progress",
                "content": [],
            }
            yield event("response.output_item.added", output_index=0, item=empty)
            part = {"type": "output_text", "text": "", "annotations": []}
            yield event("response.content_part.added", **where, part=part)
        if isinstance(one, End) and one.stop == "failed":
            raise ApiError(500, one.error or "the request failed", "request_failed")
        if isinstance(one, Token | End) and one.text:
            text += one.text
            yield event("response.output_text.delta", **where, delta=one.text, logprobs=[])
        if isinstance(one, End):
            done = _response(state, name, text, one)
            yield event("response.output_text.done", **where, text=text, logprobs=[])
            yield event("response.content_part.done", **where, part=done["output"][0]["content"][0])
            yield event("response.output_item.done", output_index=0, item=done["output"][0])
            yield event(f"response.{done['status']}", response=done)
