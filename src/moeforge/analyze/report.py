"""``report.html``: one self-contained page on one run, or on several side by side. Reads without network or script."""

import os
import platform
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moeforge import __version__
from moeforge.analyze import figures
from moeforge.analyze.record import EqualTime, Record, Sample, at_equal_time
from moeforge.errors import UserError
from moeforge.hub.whole import write_text

if TYPE_CHECKING:
    from jinja2 import Environment

_SPAN_COLOURS = 8
"""Experts with a colour of their own in one text; the rest share a grey."""
_TYPICAL = 5
_NO_DIFFERENCE = 0.002  # bits per byte: less than another seed moves them
_VISIBLE = str.maketrans({" ": "␣", "\n": "↵", "\t": "⇥"})


def write_report(records: Sequence[Record], out: Path, command: str) -> None:
    """Writes the page; ``command`` is what to type to get it again. The first run is the one others are compared with.

    Raises UserError when matplotlib or jinja2 is missing or the file cannot be written.
    """
    page = Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8")
    write_text(out, environment().from_string(page).render(_content(records, command)))


def check_packages() -> None:
    """Raises UserError when a package that reports need is missing: ask before a long computation, not after it."""
    environment()
    figures.library()


def environment() -> "Environment":
    """What pages are made with. Raises UserError where jinja2 is missing."""
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise UserError("reports need jinja2: pip install 'moeforge[report]'") from error
    return Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def _content(records: Sequence[Record], command: str) -> dict[str, Any]:
    equal = at_equal_time(records) if len(records) > 1 else None
    return {
        "records": records,
        "title": " and ".join(record.name for record in records),
        "headline": headline(records),
        "equal": equal,
        "equal_text": equal_time_text(records, equal) if equal else "",
        "colours": figures.COLOURS,
        "most_layers": max((len(record.loads) for record in records), default=0),
        "curves": figures.svg(figures.learning_curves(records), 9.2, 3.4),
        "routed": [_routed(record) for record in records if record.loads],
        "written": [(record, [_coloured(sample) for sample in record.samples]) for record in records],
        "differing": settings(records, differing=True),
        "shared": settings(records, differing=False),
        "command": command,
        "versions": f"moeforge {__version__}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{torch.get_num_threads()} threads, {platform.machine()}, {os.cpu_count()} cores",
    }


def headline(records: Sequence[Record]) -> str:
    """The result in one sentence."""
    first, best = records[0], min(records, key=lambda record: record.bits_per_byte)
    if len(records) == 1:
        return f"{first.name} needs {first.bits_per_byte:.3f} bits for each byte of text it has never seen."
    others = [record for record in records if record is not best]
    rival = first if best is not first else min(others, key=lambda record: record.bits_per_byte)
    gain = rival.bits_per_byte - best.bits_per_byte
    if gain < _NO_DIFFERENCE:
        return (
            f"{best.name} and {rival.name} do equally well, {best.bits_per_byte:.3f} bits for each byte of unseen text."
        )
    return (
        f"{best.name} needs {best.bits_per_byte:.3f} bits for each byte of text it has never seen, {rival.name} "
        f"{rival.bits_per_byte:.3f}: {gain:.3f} bits ({gain / rival.bits_per_byte:.1%}) fewer, {_terms(best, rival)}."
    )


def _terms(one: Record, other: Record) -> str:
    """What was equal between two runs, and what was not."""
    ratio = one.size.flops_per_token / other.size.flops_per_token
    tokens = one.tokens_seen / other.tokens_seen
    seen = (
        "after the same number of training tokens" if tokens == 1 else f"after {tokens:.2f} times the training tokens"
    )
    work = "the same arithmetic per token" if abs(ratio - 1) < 0.02 else f"{ratio:.2f} times the arithmetic per token"
    return f"{seen} and with {work}"


def equal_time_text(records: Sequence[Record], equal: EqualTime) -> str:
    """The comparison at equal training time, and how far to trust it."""
    shown = ", ".join(f"{record.name} {bits:.3f}" for record, bits in zip(records, equal.bits, strict=True))
    slow = [f"{r.name} had done {done:.0%}" for r, done in zip(records, equal.done, strict=True) if done < 0.995]
    unfinished = (
        f" {' and '.join(slow)} of its steps by then, with its learning rate still high; "
        "a schedule that ends at that second would have served it better."
        if slow
        else ""
    )
    return (
        f"At equal training time, {equal.seconds:.0f} seconds, the curves stand at: {shown} bits per byte.{unfinished}"
    )


def settings(records: Sequence[Record], differing: bool) -> list[tuple[str, list[str]]]:
    """Rows of dotted setting and its value in each run: those that differ, or those that are the same in all."""
    trees = [dict(_flat({k: v for k, v in record.settings.items() if k != "recipe"})) for record in records]
    names = sorted({name for tree in trees for name in tree})
    rows = [(name, [tree.get(name, "–") for tree in trees]) for name in names]
    return [(name, values) for name, values in rows if (len(set(values)) > 1) is differing]


def _flat(tree: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from _flat(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, "null" if tree is None else str(tree)


def _routed(record: Record) -> dict[str, Any]:
    """What the page says of one run's experts."""
    heights = [0.35 + 0.028 * load.shape[1] for load in record.loads.values()]
    widest = max((len(used.by_kind) for used in record.usage.values()), default=0)
    return {
        "record": record,
        "loads": figures.svg(figures.loads(record), 9.2, 0.9 + 1.5 * sum(heights)),
        "entropies": figures.svg(figures.entropies(record), 9.2, 2.3),
        "kinds": figures.svg(figures.preferences(record.usage), 9.2, 1.7 + 0.13 * min(widest, 40)) if widest else "",
        "typical": {layer: (_typical(record, layer), len(used.by_kind)) for layer, used in record.usage.items()},
    }


@dataclass(frozen=True)
class Row:
    """One expert of one layer in the table of what it takes; those that took nothing have none."""

    expert: int
    share: float
    """Of the layer's tokens, 1 for an even share."""
    pieces: list[str]


def _typical(record: Record, layer: int) -> list[Row]:
    used = record.usage[layer]
    count_E = used.by_kind.sum(1)
    share_E = (count_E * len(count_E) / count_E.sum().clamp_min(1)).tolist()
    typical = used.typical(_TYPICAL)
    return [
        Row(expert, share_E[expert], [record.tokens[token].translate(_VISIBLE) for token in typical[expert]])
        for expert in figures.by_favourite(used)
        if count_E[expert]
    ]


@dataclass(frozen=True)
class Span:
    """Neighbouring characters of a generated text that went the same way."""

    text: str
    style: str
    title: str


@dataclass(frozen=True)
class Coloured:
    """One text once per MoE layer, with the legend of the colours; a dense model's has one layer, without colours."""

    prompt: str
    layers: dict[int, list[Span]]
    legends: dict[int, list[tuple[str, str]]]
    """Style and name."""


def _coloured(sample: Sample) -> Coloured:
    layers = sorted(sample.experts[-1]) if sample.experts else []
    styles = {layer: _styles(sample, layer) for layer in layers}
    spans = {layer: _spans(sample, layer, styles[layer]) for layer in layers}
    legends = {
        layer: [*((style, f"expert {expert}") for expert, style in styles[layer].items()), ("rest", "the others")]
        for layer in layers
    }
    return Coloured(sample.prompt, spans or {0: _spans(sample, 0, {})}, legends)


def _styles(sample: Sample, layer: int) -> dict[int, str]:
    """Colour classes ``c0``, ``c1``, ... for the experts with most of the text."""
    busiest = Counter(token[layer][0] for token in sample.experts if token.get(layer))
    return {expert: f"c{rank}" for rank, (expert, _) in enumerate(busiest.most_common(_SPAN_COLOURS))}


def _spans(sample: Sample, layer: int, styles: dict[int, str]) -> list[Span]:
    spans, position = [], 0
    for piece, experts in zip(sample.pieces, sample.experts, strict=True):
        chosen = experts.get(layer)
        style = styles.get(chosen[0], "rest") if chosen else "plain"
        style += " prompt" if position < len(sample.prompt) else ""
        title = "; ".join(f"layer {at}: expert {', '.join(map(str, ids))}" for at, ids in sorted(experts.items()))
        spans.append(Span(piece.replace("\n", "↵\n"), style, title))
        position += len(piece)
    return spans
