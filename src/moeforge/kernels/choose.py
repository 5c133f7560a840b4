"""Which engine runs, and why: one table, one rule, and the reason in words for ``moeforge doctor``."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from moeforge.errors import UserError
from moeforge.kernels import grouped, native, streaming


@dataclass(frozen=True)
class Engine:
    """A pair of passes over the same operands; ``why_not`` names what it cannot run (None: it can)."""

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    why_not: Callable[[Tensor, Tensor, Tensor], str | None] = lambda x, up, down: None


ENGINES: dict[str, Engine | None] = {
    "reference": None,  # ordinary autograd: nothing to pair
    "streaming": Engine(streaming.forward, streaming.backward),
    "grouped": Engine(grouped.forward, grouped.backward, grouped.why_not),
    "native": Engine(native.forward, native.backward, native.why_not),
}


SMALL_EXPERT = 512 << 10
"""Bytes of one expert's weights up to which, on a CPU, one call for all experts beats calls per expert."""


def choose(x_TD: Tensor, up_EHD: Tensor, down_EDH: Tensor, wanted: str = "auto") -> tuple[str, str]:
    """(engine, reason). ``wanted`` other than ``auto`` is obeyed or refused with a UserError, never replaced."""
    if wanted not in ("auto", *ENGINES):
        raise UserError(f"there is no engine '{wanted}'. Valid: auto, {', '.join(ENGINES)}")
    refusal = grouped.why_not(x_TD, up_EHD, down_EDH)
    if wanted != "auto":
        if wanted == "grouped" and refusal:
            raise UserError(f"engine 'grouped' cannot run here: {refusal}. Use engine=streaming")
        return wanted, "asked for"
    if refusal:
        return "streaming", f"grouped cannot: {refusal}"
    if x_TD.device.type != "cpu":
        return "grouped", "one launch for all experts"
    if (up_EHD[0].numel() + down_EDH[0].numel()) * x_TD.element_size() <= SMALL_EXPERT:
        return "grouped", f"on a CPU, one call for all experts where each has at most {SMALL_EXPERT >> 10} KiB"
    return "streaming", "on a CPU, chunks of rows that stay in cache"
