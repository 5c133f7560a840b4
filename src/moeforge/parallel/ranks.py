"""What a training loop asks of the processes it runs on: the same questions whether it is one or many."""

from typing import TYPE_CHECKING, TypeAlias, TypeVar

from torch import Tensor, nn
from torch.optim import Optimizer

from moeforge.config import Tree
from moeforge.data.packing import Batch
from moeforge.models import Decoder

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from moeforge.parallel.piece import Piece
    from moeforge.parallel.together import Together

T = TypeVar("T")
Ranks: TypeAlias = "Alone | Together"
"""A string, so that a run of one process need not import torch's distributed parts."""
State: TypeAlias = "dict[str, Tensor | Piece]"
"""By name: a DTensor or a Piece is what this process holds, any other tensor is the same everywhere."""


class Alone:
    """One process: it has all rows, all parameters, and nobody to ask."""

    size, first = 1, True
    speakers: "ProcessGroup | None" = None
    """By whom ``gather`` gathers."""

    def for_a_thread(self) -> "Alone":
        """Itself."""
        return self

    def place(self, model: Decoder) -> None:
        """The model stays as it is."""

    def begin(self, seed: int, step: int) -> None:
        """A step: the random numbers go on as they are."""

    def settle(self, step: int, loads: dict[str, Tensor], optimizer: Optimizer) -> None:
        """Experts stay where they are."""

    def whereabouts(self) -> Tree:
        """Experts are all here."""
        return {}

    def take_up(self, whereabouts: Tree) -> None:
        """Experts stay where they are."""

    def sent(self) -> dict[str, int]:
        """Nothing."""
        return {}

    def own(self, batch: Batch) -> Batch:
        """All of it."""
        return batch

    def total(self, values: Tensor) -> Tensor:
        """As they are."""
        return values

    def any(self, flag: bool) -> bool:
        """As it is."""
        return flag

    def gather(self, value: T) -> list[T]:
        """The one."""
        return [value]

    def clip(self, model: Decoder, max_norm: float) -> Tensor:
        """Scales the gradients down to ``max_norm``; returns the norm that they had."""
        return nn.utils.clip_grad_norm_(model.parameters(), max_norm)

    def parameters(self, model: Decoder) -> dict[str, nn.Parameter]:
        """By name."""
        return dict(model.named_parameters())

    def whole(self, name: str, tensor: Tensor) -> "Tensor | Piece":
        """The tensor: there are no pieces."""
        return tensor


ALONE = Alone()
