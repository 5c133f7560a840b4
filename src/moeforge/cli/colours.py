"""Text coloured by expert in a terminal; elsewhere each token is followed by the expert's number."""

import colorsys
import os
import sys
from collections.abc import Mapping

import typer

from moeforge.errors import UserError


class Painter:
    """Marks tokens by their strongest expert of one layer, and remembers which experts it has shown."""

    def __init__(self, experts: Mapping[int, int], layer: int | None = None) -> None:
        """``experts``: how many each layer has. ``layer`` None: the last. Raises UserError when it has none."""
        known = sorted(experts)
        if not known:
            raise UserError("this model has no experts to show: every layer is dense")
        self.layer = known[-1] if layer is None else layer
        if self.layer not in known:
            raise UserError(f"layer {layer} has no experts. Valid: {', '.join(map(str, known))}")
        self.num_experts = experts[self.layer]
        self.in_colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        self.seen: set[int] = set()

    def paint(self, text: str, experts: dict[int, list[int]]) -> str:
        """``text`` marked by the first of ``experts`` of the layer; as it is when there is none."""
        chosen = experts.get(self.layer)
        if not chosen:
            return text
        self.seen.add(chosen[0])
        return self._colour(text, chosen[0]) if self.in_colour else f"{text}[{chosen[0]}]"

    def legend(self) -> str:
        """One line that names the layer and the experts shown."""
        names = [self._colour(f"#{expert}", expert) if self.in_colour else f"{expert}" for expert in sorted(self.seen)]
        return f"strongest of {self.num_experts} experts in layer {self.layer}: {' '.join(names)}"

    def _colour(self, text: str, expert: int) -> str:
        """Hues go round by the golden ratio, so that neighbours in number are far apart in colour."""
        red, green, blue = colorsys.hls_to_rgb(expert * 0.618034 % 1, 0.6, 0.75)
        return typer.style(text, fg=(round(255 * red), round(255 * green), round(255 * blue)))
