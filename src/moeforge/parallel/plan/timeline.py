"""A played step as a picture: for Chrome's trace viewer (or Perfetto), and as an SVG."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

import torch

from moeforge.errors import UserError
from moeforge.parallel.plan.job import Arrangement
from moeforge.parallel.plan.messages import Message
from moeforge.parallel.plan.simulate import Played

SHOWN = 16
"""Processes: where there are more, the busiest, the idlest, and some between them."""
LANES = ("computes", "sends")
COLOURS = {
    "attention": "#4e79a7",
    "router": "#9c755f",
    "experts": "#f28e2b",
    "shared": "#edc948",
    "mlp": "#edc948",
    "output": "#76b7b2",
    "dispatch": "#e15759",
    "combine": "#b07aa1",
    "gather": "#59a14f",
    "scatter": "#59a14f",
    "sum": "#59a14f",
    "norm": "#bab0ac",
    "optimizer": "#bab0ac",
    "other": "#d3d3d3",
}
"""By the first word of a name."""
WIDTH, LEFT, RIGHT, BAR, GAP, TOP = 1200, 110, 40, 11, 5, 46
"""Of the SVG, in pixels."""


@dataclass(frozen=True)
class Bar:
    """One operation of one process, in seconds from the start of the step."""

    rank: int
    lane: int
    name: str
    start: float
    seconds: float


def write_timeline(played: list[Played], arrangement: Arrangement, path: Path) -> None:
    """``.json`` or ``.svg``; every part once, in order. Raises UserError for another name, or no such folder."""
    writers = {".json": _trace, ".svg": _svg}
    if path.suffix not in writers:
        raise UserError(f"--timeline {path}: its name must end in .json (for chrome://tracing) or .svg")
    text = writers[path.suffix](list(bars(played, arrangement)), played)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--timeline {path}: {error.strerror}") from error


def bars(played: list[Played], arrangement: Arrangement) -> Iterator[Bar]:
    """Of at most ``SHOWN`` processes."""
    shown, began = _shown(played, arrangement), 0.0
    for each in played:
        for event in each.events:
            lane, starts, ends = int(isinstance(event.operation.does, Message)), event.start, event.end
            for rank in shown:
                group, place = divmod(rank, arrangement.team)
                where = min(group, len(starts) - 1), min(place, starts.shape[1] - 1)
                start, end = float(starts[where]), float(ends[where])
                if end > start:
                    yield Bar(rank, lane, event.operation.name, began + start, end - start)
        began += each.seconds


def _shown(played: list[Played], arrangement: Arrangement) -> list[int]:
    """Ranks, ascending; of data groups that are all alike, those of the first."""
    shape = torch.broadcast_shapes(*(event.start.shape for each in played for event in each.events))
    busy = torch.zeros(shape[0], arrangement.team, dtype=torch.float64)
    for each in played:
        for event in each.events:
            if not isinstance(event.operation.does, Message):
                busy += event.end - event.start
    order = busy.flatten().argsort(stable=True).tolist()
    if len(order) <= SHOWN:
        return sorted(order)
    return sorted({order[round(place * (len(order) - 1) / (SHOWN - 1))] for place in range(SHOWN)})


def _trace(found: list[Bar], played: list[Played]) -> str:
    """The trace event format: complete events in microseconds; a process' lanes are its threads."""
    events: list[dict[str, object]] = []
    for rank in sorted({bar.rank for bar in found}):
        events.append({"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}})
        for lane, name in enumerate(LANES):
            events.append({"ph": "M", "name": "thread_name", "pid": rank, "tid": lane, "args": {"name": name}})
    for bar in found:
        place = {"pid": bar.rank, "tid": bar.lane, "ts": bar.start * 1e6, "dur": bar.seconds * 1e6}
        events.append({"ph": "X", "name": bar.name, "cat": LANES[bar.lane], **place})
    times = {each.part.name: each.part.times for each in played}
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"times in a step": times}})


def _svg(found: list[Bar], played: list[Played]) -> str:
    total = sum(each.seconds for each in played)
    rows = {key: row for row, key in enumerate(sorted({(bar.rank, bar.lane) for bar in found}))}
    scale, height = (WIDTH - LEFT - RIGHT) / max(total, 1e-12), TOP + len(rows) * (BAR + GAP) + 34
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" font-family="sans-serif" '
        f'font-size="10">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        *_legend({"other", *(bar.name.split()[0] for bar in found)}),
    ]
    for (rank, lane), row in rows.items():
        label = f"rank {rank} {LANES[lane]}"
        lines.append(f'<text x="{LEFT - 6}" y="{_y(row) + 9}" text-anchor="end">{label}</text>')
    for bar in found:
        x, width = LEFT + bar.start * scale, bar.seconds * scale
        said = escape(f"{bar.name}: {bar.seconds * 1e3:.4g} ms")
        lines.append(
            f'<rect x="{x:.2f}" y="{_y(rows[bar.rank, bar.lane])}" width="{max(width, 0.3):.2f}" height="{BAR}" '
            f'fill="{_colour(bar.name)}"><title>{said}</title></rect>'
        )
    began = 0.0
    for each in played:
        x = LEFT + began * scale
        name = each.part.name + (f" (x {each.part.times})" if each.part.times > 1 else "")
        lines.append(f'<line x1="{x:.2f}" x2="{x:.2f}" y1="{TOP - 6}" y2="{height - 22}" stroke="#888"/>')
        lines.append(f'<text x="{x + 3:.2f}" y="{TOP - 6}" fill="#555">{escape(name)}</text>')
        began += each.seconds
    for tick in range(6):
        x = LEFT + tick * (WIDTH - LEFT - RIGHT) / 5
        lines.append(f'<text x="{x:.1f}" y="{height - 8}" text-anchor="middle">{tick * total / 5 * 1e3:.4g} ms</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"


def _y(row: int) -> int:
    return TOP + row * (BAR + GAP)


def _colour(name: str) -> str:
    return COLOURS.get(name.split()[0], COLOURS["other"])


def _legend(words: set[str]) -> list[str]:
    lines, x = [], LEFT
    for word, colour in COLOURS.items():
        if word in words:
            lines.append(f'<rect x="{x}" y="10" width="{BAR}" height="{BAR}" fill="{colour}"/>')
            lines.append(f'<text x="{x + BAR + 4}" y="19">{word}</text>')
            x += 30 + 6 * len(word)
    return lines
