"""``moeforge generate``: a model continues a text."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeforge.cli.colours import Painter
from moeforge.errors import UserError

if TYPE_CHECKING:
    from moeforge.generate import Document, End, Sampling, Token

UNSAFE = "Write although this model's routers compare tokens (expert choice, soft slots, capacity)."
CONTRAST = "Write against the second-best expert of each layer, so strongly (arXiv:2405.14507: 0.5)."
WEIGHTS = "as stored, float32, bf16, int8 or int4."


def generate(
    model: Annotated[Path, typer.Argument(help="A model folder or a run folder.")],
    prompt: Annotated[
        str | None, typer.Argument(help="The text to continue; - reads it from stdin, less one final line break.")
    ] = None,
    *,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.", show_default="0.8")] = None,
    sample_k: Annotated[int | None, typer.Option(help="Draw from the likeliest so many.", show_default="all")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from this much probability.", show_default="1")] = None,
    min_p: Annotated[float | None, typer.Option(help="Least likelihood, to the best's.", show_default="0")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1: fewer.", show_default="1")] = None,
    contrast: Annotated[float | None, typer.Option(help=CONTRAST, show_default="none")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Stop after so many.", show_default="200")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop before this text; may be repeated.")] = None,
    regex: Annotated[str | None, typer.Option(help="What the written text must match.")] = None,
    json_schema: Annotated[Path | None, typer.Option(help="A file: the written text is JSON of this schema.")] = None,
    seed: Annotated[int | None, typer.Option(help="Equal seeds, equal text.", show_default="random")] = None,
    weights: Annotated[str, typer.Option(help=WEIGHTS)] = "as stored",
    domain: Annotated[str | None, typer.Option(help="Of the text, for a model that routes by it.")] = None,
    show_experts: Annotated[bool, typer.Option("--show-experts", help="Colour each token by its expert.")] = False,
    layer: Annotated[int | None, typer.Option(help="Whose experts.", show_default="last with experts")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, with every token's experts.")] = False,
    unsafe_batch_dependent: Annotated[bool, typer.Option("--unsafe-batch-dependent", help=UNSAFE)] = False,
) -> None:
    """Continue a text with a trained model."""
    from moeforge.config import build
    from moeforge.generate import ALONE, BlockRunner, Document, Settings, open_engine

    if layer is not None and not show_experts:
        raise UserError("--layer says whose experts to show: add --show-experts")
    if show_experts and as_json:
        raise UserError("--json lists every layer's experts anyway: leave --show-experts out")
    asked = {"temperature": temperature, "sample_k": sample_k, "top_p": top_p, "min_p": min_p, "seed": seed}
    asked |= {"repetition_penalty": repetition_penalty, "max_tokens": max_tokens, "stop": stop or None}
    asked |= {"contrast": None if contrast is None else {"beta": contrast}}
    sampling = read_sampling({**asked, "grammar": _grammar(regex, json_schema)})
    changed = {"weights": weights, "unsafe_batch_dependent": unsafe_batch_dependent}
    text = _prompt(prompt)
    with open_engine(model, build(Settings, ALONE.model_dump() | changed, source="generate"), domain=domain) as engine:
        if show_experts and not isinstance(engine.runner, BlockRunner):
            raise UserError("--show-experts: a model that runs through the bridge does not tell its tokens' experts")
        document = Document(engine)
        document.read(text)
        if as_json:
            _print_json(text, document.write(sampling, show_experts=True))
        else:
            painter = Painter(engine.runner.experts, layer) if show_experts else None
            _stream(document, text, sampling, painter, domain)


def read_sampling(asked: dict[str, Any]) -> "Sampling":
    """The options that were given, checked."""
    from moeforge.config import build
    from moeforge.generate import Sampling

    return build(Sampling, {name: value for name, value in asked.items() if value is not None}, source="generate")


def _grammar(regex: str | None, json_schema: Path | None) -> dict[str, Any] | None:
    if json_schema is None:
        return None if regex is None else {"regex": regex}
    if regex is not None:
        raise UserError("--regex and --json-schema both say what the text must be: give one")
    try:
        schema = json.loads(json_schema.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{json_schema} cannot be read as a JSON schema: {error}") from error
    return {"json_schema": schema}


def _prompt(prompt: str | None) -> str:
    if prompt == "-" or (prompt is None and not sys.stdin.isatty()):
        return sys.stdin.read().removesuffix("\n")
    return prompt or ""


def _print_json(prompt: str, events: "Iterator[Token | End]") -> None:
    from moeforge.generate import Token

    *tokens, end = events
    steps = [{"token_id": t.token_id, "text": t.text, "experts": t.experts} for t in tokens if isinstance(t, Token)]
    text = "".join(event.text for event in (*tokens, end))
    print(json.dumps({"prompt": prompt, "text": text, "stop": getattr(end, "stop", None), "steps": steps}))


def _stream(
    document: "Document", prompt: str, sampling: "Sampling", painter: Painter | None, domain: str | None
) -> None:
    from moeforge.generate import BlockRunner, End, trace

    engine = document.engine
    if painter is None or not isinstance(engine.runner, BlockRunner):
        emit(prompt)
    else:
        for piece, choices in trace(engine.runner.model, engine.tokenizer, prompt, domain):
            emit(painter.paint(piece, {number: choice.experts for number, choice in choices.items()}))
    for event in document.write(sampling, show_experts=painter is not None):
        if isinstance(event, End):
            emit(event.text + "\n")
            if painter:
                print(painter.legend())
            if event.stop == "context full":
                print(f"stopped: the model's context of {engine.max_len} tokens is full", file=sys.stderr)
        else:
            emit(painter.paint(event.text, event.experts or {}) if painter else event.text)


def emit(text: str) -> None:
    """At once, not when a line is full."""
    sys.stdout.write(text)
    sys.stdout.flush()
