"""What requests may say: OpenAI's fields, and a few that other servers made usual."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from moeforge.generate import Contrast

IGNORED = "user metadata store service_tier safety_identifier prompt_cache_key parallel_tool_calls".split()
"""Fields that OpenAI's clients send and that change nothing here; any other unknown field is an error."""


class Fields(BaseModel):
    """A request's fields; unknown ones are refused."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class StreamOptions(Fields):
    """Of a stream."""

    include_usage: bool = False
    include_obfuscation: bool = False
    """Taken and not done: chunks are as long as their text."""


class Drawing(Fields):
    """What all three kinds of requests say about sampling."""

    model: str | None = None
    stream: bool = False
    temperature: float = Field(1.0, ge=0, le=10)
    top_p: float = Field(1.0, gt=0, le=1)
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    parallel_tool_calls: bool | None = None
    top_k: int | None = Field(None, ge=-1)
    """Not OpenAI's: draw from the so many likeliest; 0 and -1 mean all."""
    min_p: float = Field(0.0, ge=0, le=1)
    """Not OpenAI's."""
    repetition_penalty: float = Field(1.0, ge=0.01, le=100)
    """Not OpenAI's."""
    ignore_eos: bool = False
    """Not OpenAI's: go on when the model ends its text."""


class Writing(Drawing):
    """Completions and chat."""

    n: int = Field(1, ge=1)
    stop: str | list[str] | None = None
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: dict[str, float] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    stream_options: StreamOptions | None = None
    stop_token_ids: list[int] = []
    """Not OpenAI's."""
    contrast: Contrast | None = None
    """Not OpenAI's: write against a weaker pass of the same model (arXiv:2405.14507)."""


class CompletionRequest(Writing):
    """``/v1/completions``."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = Field(None, ge=0)
    echo: bool = False
    logprobs: int | None = Field(None, ge=0)
    best_of: int | None = Field(None, ge=1)
    suffix: str | None = None


class Message(BaseModel):
    """One message; what else stands in it goes to the template."""

    model_config = ConfigDict(extra="allow")

    role: str
    content: str | list[dict[str, Any]] | None = None


class JsonSchema(Fields):
    """A schema that the answer must fit."""

    name: str = "answer"
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Fields):
    """What form an answer has."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatRequest(Writing):
    """``/v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    response_format: ResponseFormat | None = None
    chat_template_kwargs: dict[str, Any] = {}
    """Not OpenAI's: more variables for the template."""


class ResponsesRequest(Drawing):
    """The text part of ``/v1/responses``."""

    input: str | list[Message]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)


class TokenizeRequest(Fields):
    """``/tokenize``."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool = True


class DetokenizeRequest(Fields):
    """``/detokenize``."""

    model: str | None = None
    tokens: list[int]
