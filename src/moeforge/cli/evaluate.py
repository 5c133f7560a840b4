"""``moeforge evaluate``: bits per byte of a model on held-out text, or the tasks of lm-evaluation-harness."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moeforge.cli.held_out import check, count, text_settings
from moeforge.errors import UserError

if TYPE_CHECKING:
    from moeforge.data.tokenizers import Tokenizer
    from moeforge.evaluate import Score
    from moeforge.hub.theirs import Theirs
    from moeforge.models import Decoder
    from moeforge.train import RunConfig

BATCH_SIZE = 8
"""Of requests to a task, unless --batch_size says otherwise."""


def evaluate(
    context: typer.Context,
    model: Annotated[Path, typer.Argument(help="A model folder or a run folder.")],
    *,
    tokens: Annotated[str | None, typer.Option(help="At most this many, spread evenly.", show_default="all")] = None,
    tasks: Annotated[str | None, typer.Option(help="Tasks of lm-evaluation-harness or YAML files, by commas.")] = None,
    limit: Annotated[int | None, typer.Option(help="Documents per task at most.", min=1, show_default="all")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")] = False,
) -> None:
    """Measure bits per byte and perplexity on the validation part of a corpus.

    The corpus is the run's own, or the standard library; --data=stdlib or --data.path=FILE names another.
    --seq_len, --batch_size and --dtype work as in training. With --tasks, those are scored instead.
    """
    from moeforge.hub.theirs import load_any

    if tasks is not None:
        if tokens is not None:
            raise UserError("--tokens belongs to bits per byte: with --tasks, --limit says how many documents")
        return _tasks(model, [name.strip() for name in tasks.split(",")], context.obj, limit, as_json)
    if limit is not None:
        raise UserError("--limit belongs to --tasks: --tokens says how much text")
    check(context.obj)
    most = None if tokens is None else count(tokens)
    opened, tokenizer = load_any(model)
    config = text_settings(model, opened.config, context.obj)
    score = _score(opened, tokenizer, config, most)
    found = {
        "model": str(model),
        "data": config.data.model_dump(),
        "bits_per_byte": score.bits_per_byte,
        "perplexity": score.perplexity,
        "tokens": score.num_targets,
        "bytes": score.num_bytes,
    }
    if as_json:
        print(json.dumps(found))
        return
    print(f"{score.bits_per_byte:.4f} bits per byte, perplexity {score.perplexity:.3f} per token")
    print(f"on {score.num_targets:,} tokens ({score.num_bytes:,} bytes) held out from {config.data.type}")


def _tasks(folder: Path, tasks: list[str], settings: list[str], limit: int | None, as_json: bool) -> None:
    from importlib.util import find_spec

    from moeforge.config import build, override
    from moeforge.train import RunConfig

    for text in settings:
        if not text.replace("-", "_").startswith("__batch_size="):
            raise UserError(f"{text} changes no task: with --tasks, of a run's settings only --batch_size counts")
    if find_spec("lm_eval") is None:
        raise UserError("--tasks needs lm-evaluation-harness, which is not installed: pip install 'moeforge[eval]'")
    size = build(RunConfig, override({}, settings), source="evaluate").batch_size if settings else BATCH_SIZE

    import torch

    from moeforge.evaluate.harness import run
    from moeforge.hub import load

    model, tokenizer = load(folder)
    scored = run(model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer, tasks, size, limit)
    if as_json:
        print(json.dumps({"model": str(folder), **scored._asdict()}))
        return
    for name, metrics in scored.results.items():
        for key, value in metrics.items():
            if isinstance(value, float) and "_stderr" not in key:
                error = metrics.get(key.replace(",", "_stderr,", 1))
                print(f"{name}  {key:<24}{value:8.4f}" + (f" ± {error:.4f}" if isinstance(error, float) else ""))
    if scored.truncated:
        room = model.config.max_seq_len
        print(f"{scored.truncated:,} requests were longer than the context of {room} tokens: their ends were read")


def _score(model: "Decoder | Theirs", tokenizer: "Tokenizer", config: "RunConfig", tokens: int | None) -> "Score":
    import torch

    from moeforge.data.corpora import split
    from moeforge.data.packing import evaluation_batches, pack
    from moeforge.evaluate import bits_per_byte

    _, validation = split(config.data)
    batches = evaluation_batches(
        pack(validation, tokenizer, model.config.domains), config.batch_size, config.seq_len, tokens
    )
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return bits_per_byte(model, batches, torch.bfloat16 if config.dtype == "bfloat16" else torch.float32)
