"""What a router may want to know besides the rows themselves. Most ignore it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from moeforge.moe.bank import Bank


@dataclass(frozen=True)
class Context:
    """Facts about the T rows of one forward pass; a field that nobody provided is None."""

    batch_size: int = 1
    """B: the T rows are B sequences of T / B rows each."""
    token_ids: Tensor | None = None
    """[T] int64."""
    embedded: Tensor | None = None
    """[T, D]: the tokens' embeddings, as the first layer gets them."""
    positions: Tensor | None = None
    """[T] int64: position inside the document."""
    router_state: Tensor | None = None
    """What the previous MoE layer's router handed on."""
    step: int | None = None
    """Optimizer steps done, while training."""
    ids: Mapping[str, Tensor] = field(default_factory=dict)
    """[T] int64 by kind (``task``, ``domain``, ``modality``): what the rows are known to be."""
    cost: tuple[float, ...] | None = None
    """Of each expert, its work as a share of the dearest one's; 0 for no work. Set by the router."""
    banks: "Sequence[Bank] | None" = None
    """The layer's experts, for gates that ask them. Set by the layer."""
    importance: Tensor | None = None
    """[T] float32: mean attention that each row gets. Only where the router asks for it."""
    training: bool = False
    """Set by the router from its own mode: noise and dropping may differ."""

    def split(self, parts: int) -> "Context":
        """The facts about [T * parts] rows, each row being cut into ``parts`` neighbours."""
        if parts == 1:
            return self

        def each(ids_T: Tensor | None) -> Tensor | None:
            return None if ids_T is None else ids_T.repeat_interleave(parts)

        return replace(
            self,
            token_ids=each(self.token_ids),
            embedded=None if self.embedded is None else self.embedded.unflatten(1, (parts, -1)).flatten(0, 1),
            positions=each(self.positions),
            importance=each(self.importance),
            ids={kind: ids_T.repeat_interleave(parts) for kind, ids_T in self.ids.items()},
        )


def hashed(ids: Tensor, seed: int) -> Tensor:
    """int64 ids -> int64 below 2^16 that look random and never change."""
    mixed = (ids + 1 + seed) * 0x9E3779B1 % (1 << 32)
    return (mixed ^ (mixed >> 15)) * 0x5EBCA6B5 % (1 << 32) >> 16
