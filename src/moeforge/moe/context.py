"""What a router may want to know besides the rows themselves. Most ignore it."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Context:
    """Facts about the T rows of one forward pass; a field that nobody provided is None."""

    batch_size: int = 1
    """B: the T rows are B sequences of T / B rows each."""
    token_ids: Tensor | None = None
    """[T] int64."""
    positions: Tensor | None = None
    """[T] int64: position inside the document."""
    router_state: Tensor | None = None
    """What the previous MoE layer's router handed on."""
    step: int | None = None
    """Optimizer steps done, while training."""
