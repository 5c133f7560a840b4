"""``moeforge generate``: a model continues a text."""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moeforge.cli.colours import Painter
from moeforge.errors import UserError

if TYPE_CHECKING:
    from moeforge.data.tokenizers import Tokenizer
    from moeforge.generate import Sampling, Step
    from moeforge.models import Decoder

UNSAFE = "Write although this model's routers compare tokens (expert choice, soft slots, capacity)."


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
    max_tokens: Annotated[int | None, typer.Option(help="Stop after so many.", show_default="200")] = None,
    seed: Annotated[int | None, typer.Option(help="Equal seeds, equal text.", show_default="random")] = None,
    domain: Annotated[str | None, typer.Option(help="Of the text, for a model that routes by it.")] = None,
    show_experts: Annotated[bool, typer.Option("--show-experts", help="Colour each token by its expert.")] = False,
    layer: Annotated[int | None, typer.Option(help="Whose experts.", show_default="last with experts")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, with every token's experts.")] = False,
    unsafe_batch_dependent: Annotated[bool, typer.Option("--unsafe-batch-dependent", help=UNSAFE)] = False,
) -> None:
    """Continue a text with a trained model."""
    from moeforge.generate import generate as run
    from moeforge.hub import load

    if layer is not None and not show_experts:
        raise UserError("--layer says whose experts to show: add --show-experts")
    if show_experts and as_json:
        raise UserError("--json lists every layer's experts anyway: leave --show-experts out")
    asked = {"temperature": temperature, "sample_k": sample_k, "top_p": top_p, "min_p": min_p}
    sampling = read_sampling({**asked, "max_tokens": max_tokens, "seed": seed})
    text = _prompt(prompt)
    opened, tokenizer = load(model)
    steps = run(opened, tokenizer, text, sampling, unsafe_batch_dependent, domain)
    if as_json:
        _print_json(text, steps)
    else:
        _stream(opened, tokenizer, text, steps, Painter(opened, layer) if show_experts else None, domain)


def read_sampling(asked: dict[str, float | None]) -> "Sampling":
    """The options that were given, checked."""
    from moeforge.config import build
    from moeforge.generate import Sampling

    return build(Sampling, {name: value for name, value in asked.items() if value is not None}, source="generate")


def _prompt(prompt: str | None) -> str:
    if prompt == "-" or (prompt is None and not sys.stdin.isatty()):
        return sys.stdin.read().removesuffix("\n")
    return prompt or ""


def _print_json(prompt: str, written: Iterator["Step"]) -> None:
    steps = list(written)
    text = "".join(step.text for step in steps)
    stop = steps[-1].stop if steps else "end of document"
    print(json.dumps({"prompt": prompt, "text": text, "stop": stop, "steps": [asdict(step) for step in steps]}))


def _stream(
    model: "Decoder",
    tokenizer: "Tokenizer",
    prompt: str,
    steps: Iterator["Step"],
    painter: Painter | None,
    domain: str | None,
) -> None:
    from moeforge.generate import trace

    if painter is None:
        _emit(prompt)
    else:
        for piece, choices in trace(model, tokenizer, prompt, domain):
            _emit(painter.paint(piece, {number: choice.experts for number, choice in choices.items()}))
    last: Step | None = None
    for last in steps:
        _emit(painter.paint(last.text, last.experts) if painter else last.text)
    _emit("\n")
    if painter:
        print(painter.legend())
    if last is not None and last.stop == "context full":
        print(f"stopped: the model's context of {model.config.max_seq_len} tokens is full", file=sys.stderr)


def _emit(text: str) -> None:
    """At once, not when a line is full."""
    sys.stdout.write(text)
    sys.stdout.flush()
