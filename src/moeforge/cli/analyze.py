"""``moeforge analyze``: a report on finished runs, one or several side by side."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from moeforge.analyze import Record, Sample
    from moeforge.data.prepare import TextData
    from moeforge.data.tokenizers import Tokenizer
    from moeforge.models import Decoder

EVALUATED_TOKENS = 300_000
TALLIED_TOKENS = 60_000
WRITTEN_TOKENS = 160
PROMPTS = ("def ", "The import statement ")


def analyze(
    runs: Annotated[list[Path], typer.Argument(help="Run folders; the first is the one others are compared with.")],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
) -> None:
    """Write a report on finished runs: learning, experts' load, who takes which tokens, what the models write."""
    from dataclasses import replace

    from moeforge.analyze import check_packages, write_report

    check_packages()
    records = [read_run(folder) for folder in runs]
    if len({record.name for record in records}) < len(records):
        records = [replace(record, name=record.folder) for record in records]
    write_report(records, out, shlex.join(["moeforge", "analyze", *map(str, runs), "--out", str(out)]))
    for record in records:
        typer.echo(f"{record.name}: {record.bits_per_byte:.4f} bits per byte of unseen text")
    typer.echo(f"report: {out}")


def read_run(folder: Path, data: "TextData | None" = None) -> "Record":
    """A finished run with its model, read from disk, evaluated, watched while it routes, and set to write.

    ``data`` is the run's own, for a caller that has it. Raises UserError when ``folder`` holds no finished run.
    """
    from moeforge.analyze import Record, kinds_of, tally
    from moeforge.config import build, read_yaml
    from moeforge.data.packing import evaluation_batches
    from moeforge.data.prepare import prepare
    from moeforge.errors import UserError
    from moeforge.evaluate import bits_per_byte
    from moeforge.hub import load
    from moeforge.models import measure
    from moeforge.train import RunConfig
    from moeforge.train.metrics import read_metrics

    settings, lines = read_yaml(folder / "config.yaml"), read_metrics(folder / "metrics.jsonl")
    config = build(RunConfig, settings, source=str(folder / "config.yaml"))
    if not any("eval/bits_per_byte" in line for line in lines):
        raise UserError(f"{folder} has no evaluation in metrics.jsonl: let the run finish first")
    model, tokenizer = load(folder)
    data = data or prepare(config.data, tokenizer)
    if model.config.domains not in ((), data.domains):
        raise UserError(f"{folder} routes by domain, and its data now has others: {', '.join(data.domains)}")
    text = data.validation
    batches = evaluation_batches(text, config.batch_size, config.seq_len, EVALUATED_TOKENS)
    score = bits_per_byte(model, batches)
    kinds = kinds_of(text, tokenizer) if model.moe_layers else None
    writes = not model.cannot_write  # others write only when asked
    return Record(
        name=config.name,
        folder=str(folder),
        settings=settings,
        lines=lines,
        size=measure(config.model, seq_len=config.seq_len),
        bits_per_byte=score.bits_per_byte,
        usage={} if kinds is None else tally(model, text, kinds, config.seq_len, TALLIED_TOKENS),
        tokens=tokenizer.pieces(range(tokenizer.vocab_size)),
        samples=[write(model, tokenizer, prompt, config.seed + i) for i, prompt in enumerate(PROMPTS)]
        if writes
        else [],
    )


def write(model: "Decoder", tokenizer: "Tokenizer", prompt: str, seed: int) -> "Sample":
    """A continuation of ``prompt``, with the experts of every token."""
    from moeforge.analyze import Sample
    from moeforge.generate import Sampling, generate, trace

    domain = next(iter(model.config.domains), None)  # the prompts are of no domain more than another
    sampling = Sampling(temperature=0.7, seed=seed, max_tokens=WRITTEN_TOKENS)
    tokens = generate(model, tokenizer, prompt, sampling, domain=domain).tokens
    given = trace(model, tokenizer, prompt, domain)
    pieces = [token.piece for token in given] + tokenizer.pieces([token.token_id for token in tokens])
    experts = [{layer: choice.experts for layer, choice in token.choices.items()} for token in given]
    return Sample(prompt, pieces, experts + [token.experts or {} for token in tokens])
