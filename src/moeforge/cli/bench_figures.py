"""What ``moeforge bench serve`` found, as lines of text and as a picture."""

from collections.abc import Iterator
from typing import Any

GREY, OURS = "#8a8f98", "#0077bb"
SECOND = {"moeforge over HTTP": "#66aadd"}


def rows(found: dict[str, Any]) -> Iterator[str]:
    """A block for each case, a line for each contestant: median, and least to most of the rounds."""
    speed, plan = found["limits"]["read GB/s"], found["plan"]
    yield f"memory is read at {speed:.0f} GB/s; {plan['threads']} threads; medians of {plan['rounds']} rounds"
    for case in _cases(found):
        yield case
        for name, one in found["contestants"].items():
            yield f"  {name:<26}{_line(one, case, speed)}"
    yield "start of the process to first token"
    for name, one in found["contestants"].items():
        yield f"  {name:<26}{one['start_s'][0]:9.1f} s, {one['start_peak_bytes'] / 1e9:.2f} GB of memory at most"


def _cases(found: dict[str, Any]) -> list[str]:
    return list(next(iter(found["contestants"].values()))["cases"])


def _line(one: dict[str, Any], case: str, speed: float) -> str:
    figures = one["cases"][case]
    middle, low, high = figures["tokens/s"]
    text = f"{middle:9.1f} tokens/s ({low:.1f} to {high:.1f}), first token after {figures['first token s'][0]:.3f} s"
    if "ms per token" in figures:
        text += f", then {figures['ms per token'][0]:.1f} ms each; {figures['all tokens/s'][0]:.1f} tokens/s over all"
    if case == "1 client" and one["active_bytes"]:
        reads = middle * one["active_bytes"] / 1e9
        text += f"; weights at {reads:.1f} GB/s, {reads / speed:.0%} of memory's speed"
    return text


def paint(found: dict[str, Any], figure: Any) -> None:
    """On a figure of matplotlib: a panel for each case, a bar for each contestant, its spread over the rounds on it."""
    cases = _cases(found)
    panels = figure.subplots(1, len(cases), sharey=True, squeeze=False)[0]
    for axis, case in zip(panels, cases, strict=True):
        _panel(axis, case, found["contestants"])


def _panel(axis: Any, case: str, contestants: dict[str, Any]) -> None:
    names = list(contestants)
    for place, name in enumerate(names):
        middle, low, high = contestants[name]["cases"][case]["tokens/s"]
        system = name.rpartition(" ")[0]
        colour = SECOND.get(system, OURS if system == "moeforge" else GREY)
        spread = [[middle - low], [high - middle]]
        axis.barh(-place, middle, xerr=spread, color=colour, height=0.75, error_kw={"linewidth": 0.8})
        axis.annotate(f"{middle:.0f}", (high, -place), (3, 0), textcoords="offset points", va="center", fontsize=7.5)
    axis.set_yticks([-place for place in range(len(names))], names, fontsize=8)
    axis.tick_params(length=0, axis="y")
    axis.set_title(case)
    axis.set_xlabel("tokens/s")
    axis.margins(x=0.16)
    axis.locator_params(axis="x", nbins=4)
