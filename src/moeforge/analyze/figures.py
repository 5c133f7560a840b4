"""The report's pictures, drawn with matplotlib: SVG that takes on the page's ink in light and dark, and one PNG."""

import io
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from moeforge.analyze.kinds import KINDS
from moeforge.analyze.record import Record, at_equal_time
from moeforge.analyze.routing import Usage
from moeforge.errors import UserError
from moeforge.moe.stats import load_entropy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Paint = Callable[["Figure"], None]

COLOURS = ("#8a8f98", "#0077bb", "#ee7733", "#009988", "#aa4499", "#cc3311")
"""Of the runs, in order: the first is the one that others are measured against (Paul Tol's vibrant scheme after it)."""
_INK = "#123456"  # stands for the page's text colour until the SVG is put into the page
_LESS, _MORE = "#ee7733", "#0077bb"
_COLUMNS = 160
_UNITS = {
    "tokens": ((1e6, "tokens, millions"), (1e3, "tokens, thousands"), (1, "tokens")),
    "seconds": ((3600, "time, hours"), (1, "time, seconds")),
}
_STYLE = {
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.8,
}
_INKED = ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color", "ytick.color")


def library() -> ModuleType:
    """matplotlib. Raises UserError with the command that installs it."""
    try:
        import matplotlib.figure
    except ImportError as error:
        raise UserError("reports need matplotlib: pip install 'moeforge[report]'") from error
    return matplotlib


def svg(paint: Paint, width: float, height: float) -> str:
    """The picture as an ``<svg>`` element for a page, ``width`` x ``height`` inches at least. Raises UserError."""
    text = io.StringIO()
    _save(paint, (width, height), text, _INK)
    body = text.getvalue()[text.getvalue().index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>|\s*xmlns(:xlink)?=\"[^\"]*\"", "", body, flags=re.DOTALL)
    return body.replace("xlink:href", "href").replace(_INK, "currentColor")


def png(paint: Paint, width: float, height: float, path: Path) -> None:
    """The picture as a file on white. Raises UserError when matplotlib is missing or the file cannot be written."""
    try:
        with path.open("wb") as file:
            _save(paint, (width, height), file, "#222222")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from error


def _save(paint: Paint, size: tuple[float, float], file: Any, ink: str) -> None:
    matplotlib = library()
    kind = "svg" if isinstance(file, io.StringIO) else "png"
    with matplotlib.rc_context({**_STYLE, **dict.fromkeys(_INKED, ink), "svg.hashsalt": "moeforge"}):
        figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
        paint(figure)
        unnamed = {"Date": None} if kind == "svg" else {}
        figure.savefig(file, format=kind, dpi=160, transparent=kind == "svg", metadata=unnamed)


def learning_curves(records: Sequence[Record]) -> Paint:
    """Bits per byte against tokens, and against training seconds."""

    def paint(figure: "Figure") -> None:
        by_tokens, by_seconds = figure.subplots(1, 2, sharey=True)
        draw_curves(by_tokens, records, "tokens")
        draw_curves(by_seconds, records, "seconds")
        by_tokens.set_ylabel("bits per byte (lower is better)")
        if len(records) > 1:
            ink = by_seconds.xaxis.label.get_color()
            by_seconds.axvline(at_equal_time(records).seconds, color=ink, lw=0.7, ls=(0, (4, 3)), zorder=0)

    return paint


def draw_curves(axes: "Axes", records: Sequence[Record], over: Literal["tokens", "seconds"]) -> None:
    """One line per run, its name at its end."""
    longest = max(getattr(record.curve, over)[-1] for record in records)
    unit, name = next((unit, name) for unit, name in _UNITS[over] if longest >= unit or unit == 1)
    for record, colour in zip(records, _cycle(len(records)), strict=True):
        x = [value / unit for value in getattr(record.curve, over)]
        axes.plot(x, record.curve.bits, color=colour, marker="o", markersize=2.8)
    every = sorted(bits for record in records for bits in record.curve.bits)
    low, high = every[0], every[-1]
    room = 0.06 * max(high - low, 0.01)
    axes.set_ylim(low - room, high + room)
    axes.set_xlabel(f"training {name}")
    axes.grid(axis="y", lw=0.4, alpha=0.35)
    ends = [(record.curve.bits[-1], getattr(record.curve, over)[-1] / unit) for record in records]
    places = _apart([bits for bits, _ in ends], 0.055 * (high - low))
    for record, (bits, x), place, colour in zip(records, ends, places, _cycle(len(records)), strict=True):
        axes.text(x, place, f" {record.name} {bits:.3f}", color=colour, va="center", fontweight="bold", fontsize=8.5)
    axes.set_xlim(left=0, right=1.32 * longest / unit)


def _apart(values: list[float], gap: float) -> list[float]:
    """The values, pushed apart upwards until neighbours are ``gap`` apart: places for labels."""
    placed: dict[int, float] = {}
    floor = -math.inf
    for index in sorted(range(len(values)), key=values.__getitem__):
        placed[index] = floor = max(values[index], floor + gap)
    return [placed[index] for index in range(len(values))]


def _cycle(count: int) -> list[str]:
    return [COLOURS[index % len(COLOURS)] for index in range(count)]


def loads(record: Record) -> Paint:
    """Per MoE layer, each expert's share of the tokens over training, with 1 for an even share."""

    def paint(figure: "Figure") -> None:
        sizes = [load.shape[1] for load in record.loads.values()]
        grid = figure.subplots(len(sizes), 1, sharex=True, squeeze=False, height_ratios=[8 + size for size in sizes])
        images = [draw_load(axes, record, layer) for axes, layer in zip(grid[:, 0], record.loads, strict=True)]
        grid[-1, 0].set_xlabel("training step")
        _key(figure, images[0], grid[:, 0], "tokens compared with an even share")

    return paint


def draw_load(axes: "Axes", record: Record, layer: int) -> Any:
    """The heat map of one layer; steps are averaged where there are more than columns."""
    load_SE = record.loads[layer].double()
    parts = [part.sum(0) for part in load_SE.tensor_split(min(_COLUMNS, len(load_SE)))]
    share_ES = torch.stack([part / part.sum() * len(part) for part in parts]).T
    last = record.lines[-1]["step"]
    experts = load_SE.shape[1]
    axes.set_title(f"layer {layer}: {experts} experts")
    axes.set_ylabel("expert")
    _experts_axis(axes, list(range(experts)))
    return _heat(axes, share_ES, (record.lines[0]["step"] - 1, last, experts - 0.5, -0.5))


def entropies(record: Record) -> Paint:
    """How even the load of each MoE layer is, over training."""

    def paint(figure: "Figure") -> None:
        axes = figure.subplots()
        last = record.lines[-1]["step"]
        finals = []
        for (layer, load_SE), colour in zip(record.loads.items(), COLOURS[1:] * len(record.loads), strict=False):
            parts = load_SE.tensor_split(min(_COLUMNS, len(load_SE)))
            values = [load_entropy(part.sum(0)) for part in parts]
            axes.plot([last * (i + 1) / len(values) for i in range(len(values))], values, color=colour)
            finals.append((values[-1], f" layer {layer}: {values[-1]:.3f}", colour))
        low, high = axes.get_ylim()
        for place, (_, name, colour) in zip(_apart([v for v, *_ in finals], 0.11 * (high - low)), finals, strict=True):
            axes.text(last, place, name, color=colour, va="center", fontweight="bold", fontsize=8.5)
        axes.set_xlim(0, last * 1.2)
        axes.set_xlabel("training step")
        axes.set_ylabel("load entropy")
        axes.grid(axis="y", lw=0.4, alpha=0.35)

    return paint


def preferences(usage: dict[int, Usage]) -> Paint:
    """Per MoE layer, each expert's share of every kind of token, compared with that kind's share of all tokens."""

    def paint(figure: "Figure") -> None:
        grid = figure.subplots(1, len(usage), squeeze=False)[0]
        for axes, (layer, used) in zip(grid, usage.items(), strict=True):
            order = by_favourite(used)
            image = _heat(axes, used.lift[order], (-0.5, len(KINDS) - 0.5, len(order) - 0.5, -0.5))
            axes.set_title(f"layer {layer}")
            axes.set_xticks(range(len(KINDS)), KINDS, rotation=40, ha="right", rotation_mode="anchor")
            _experts_axis(axes, order, every=1 if len(order) <= 40 else 8)
        grid[0].set_ylabel("expert")
        _key(figure, image, grid, "share compared with the average")

    return paint


def by_favourite(usage: Usage) -> list[int]:
    """Experts grouped by the kind they prefer most, the strongest preference first; idle experts last."""
    lift_EX = usage.lift.nan_to_num(0.0)
    best = lift_EX.max(1)
    return sorted(
        range(len(lift_EX)),
        key=lambda e: (not bool(usage.by_kind[e].sum()), int(best.indices[e]), -float(best.values[e])),
    )


def summary(records: Sequence[Record]) -> Paint:
    """For a README: the learning curves, and the load of the last MoE layer there is."""
    routed = next((record for record in reversed(records) if record.loads), None)

    def paint(figure: "Figure") -> None:
        panels = figure.subplots(1, 2 if routed else 1, squeeze=False)[0]
        draw_curves(panels[0], records, "tokens")
        panels[0].set_title("what a byte of unseen text costs")
        panels[0].set_ylabel("bits per byte (lower is better)")
        if routed:
            layer = max(routed.loads)
            image = draw_load(panels[1], routed, layer)
            panels[1].set_title(f"{routed.name}: tokens per expert, layer {layer}")
            panels[1].set_xlabel("training step")
            _key(figure, image, panels[1:], "compared with an even share")

    return paint


def _heat(axes: "Axes", ratio: Tensor, extent: tuple[float, float, float, float]) -> Any:
    """Ratios to 1 on a log scale from a quarter to four: orange is less, the page's own colour 1, blue more."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgba

    clear_less, clear_more = (*to_rgba(_LESS)[:3], 0.0), (*to_rgba(_MORE)[:3], 0.0)
    ends = [(0.0, to_rgba(_LESS)), (0.5, clear_less), (0.5, clear_more), (1.0, to_rgba(_MORE))]
    colours = LinearSegmentedColormap.from_list("ratio", ends)
    logs = ratio.double().clamp(2.0**-2, 2.0**2).log2().numpy()
    axes.spines[["left", "bottom"]].set_visible(False)
    return axes.imshow(logs, cmap=colours, vmin=-2, vmax=2, aspect="auto", interpolation="nearest", extent=extent)


def _experts_axis(axes: "Axes", order: list[int], every: int | None = None) -> None:
    every = every or max(1, len(order) // 4)
    places = range(0, len(order), every)
    axes.set_yticks(list(places), [str(order[place]) for place in places], fontsize=7)
    axes.tick_params(axis="y", length=0)


def _key(figure: "Figure", image: Any, panels: Any, label: str) -> None:
    bar = figure.colorbar(image, ax=list(panels), label=label, fraction=0.03, pad=0.02, aspect=30)
    bar.set_ticks([-2, -1, 0, 1, 2], labels=["≤ ¼×", "½×", "1×", "2×", "≥ 4×"])
    bar.outline.set_visible(False)
