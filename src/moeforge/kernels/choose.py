"""Which engine runs, and why: one table, one rule, and the reason in words for ``moeforge doctor``."""

import os
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from moeforge.errors import UserError
from moeforge.kernels import grouped, native, streaming, triton
from moeforge.kernels.compiled import constant


@dataclass(frozen=True)
class Engine:
    """Passes over the same operands; ``why_not`` names what it cannot run (None: it can)."""

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    why_not: Callable[[Tensor, Tensor, Tensor], str | None] = lambda x, up, down: None
    infer: Callable[..., Tensor] | None = None
    """y alone, where a forward pass without a backward one costs less."""
    uses_onednn: bool = True
    """Whether bf16 products on a CPU are torch's, which want few different numbers of rows (``pad_segments``)."""


ENGINES: dict[str, Engine | None] = {
    "reference": None,  # ordinary autograd: nothing to pair
    "streaming": Engine(streaming.forward, streaming.backward),
    "grouped": Engine(grouped.forward, grouped.backward, grouped.why_not),
    "native": Engine(native.forward, native.backward, native.why_not, native.infer, uses_onednn=False),
    "triton": Engine(triton.forward, triton.backward, triton.why_not),  # only when asked for: not yet run on a GPU
}


SMALL_EXPERT = 512 << 10
"""Bytes of one expert's weights up to which, on a CPU, one call for all experts beats calls per expert."""


def choose(x_TD: Tensor, up_EHD: Tensor, down_EDH: Tensor, wanted: str = "auto") -> tuple[str, str]:
    """(engine, reason). ``wanted`` other than ``auto`` is obeyed or refused with a UserError, never replaced; where it
    is ``auto``, the environment variable MOEFORGE_ENGINE may want one."""
    asked = "asked for"
    if wanted == "auto" and (wanted := _from_environment()) != "auto":
        asked = "asked for in MOEFORGE_ENGINE"
    if wanted not in ("auto", *ENGINES):
        raise UserError(f"there is no engine '{wanted}'. Valid: auto, {', '.join(ENGINES)}")
    if wanted == "auto":
        return _pick(x_TD, up_EHD, down_EDH)
    engine = ENGINES[wanted]
    if engine is not None and (refusal := engine.why_not(x_TD, up_EHD, down_EDH)):
        raise UserError(f"engine '{wanted}' cannot run here: {refusal}. Use engine=streaming")
    return wanted, asked


def _pick(x_TD: Tensor, up_EHD: Tensor, down_EDH: Tensor) -> tuple[str, str]:
    if x_TD.device.type == "cpu" and not (native.why_not(x_TD, up_EHD, down_EDH) or native.unmeasured(x_TD)):
        return "native", "on this CPU, faster than torch's products at every size measured (docs/kernels.md)"
    if refusal := grouped.why_not(x_TD, up_EHD, down_EDH):
        return "streaming", f"grouped cannot: {refusal}"
    if x_TD.device.type != "cpu":
        return "grouped", "one launch for all experts"
    if (up_EHD[0].numel() + down_EDH[0].numel()) * x_TD.element_size() <= SMALL_EXPERT:
        return "grouped", f"on a CPU, one call for all experts where each has at most {SMALL_EXPERT >> 10} KiB"
    return "streaming", "on a CPU, chunks of rows that stay in cache"


@constant
def _from_environment() -> str:
    return os.environ.get("MOEFORGE_ENGINE") or "auto"
