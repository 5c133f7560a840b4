"""A stack of experts of which some are kept in more bits than others, and some may be the same."""

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from moeforge.errors import UserError
from moeforge.kernels.edges import Edges, EdgeTensors
from moeforge.kernels.native.coded import CodedWeight
from moeforge.kernels.native.formats import BLOCK
from moeforge.kernels.native.quantised import Copied, Matrix, QuantisedWeight, array
from moeforge.kernels.native.vectors import VectorWeight

Part = Tensor | QuantisedWeight | CodedWeight | VectorWeight
"""A stack [n, out, in] in one format."""


@dataclass(frozen=True)
class MixedWeight(Copied):
    """The weights [E, out, in] of E experts in several formats. One call runs them all, unless some are ``whole``."""

    parts: tuple[Part, ...]
    place: tuple[tuple[int, int], ...]
    """Of each expert: which part, and which weight of it. Several experts may have the same."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight that it stands for."""
        return (len(self.place), *self.parts[0].shape[1:])

    @property
    def nbytes(self) -> int:
        """Bytes in memory or in a mapped file."""
        return sum(part.nbytes for part in self.parts)

    @property
    def whole(self) -> bool:
        """Whether some experts are in no fewer bits than the rows."""
        return any(isinstance(part, Tensor) for part in self.parts)

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.parts[0].device

    @property
    def group(self) -> int:
        """Inputs that share a scale, where that is the same for all."""
        groups = {part.group for part in self.parts if not isinstance(part, Tensor)}
        return groups.pop() if len(groups) == 1 else BLOCK

    @cached_property
    def matrices(self) -> ctypes.Array[Matrix]:
        """What the C++ reads; of experts that are not whole."""
        packed = [part.matrices for part in self.parts if not isinstance(part, Tensor)]
        return array([packed[part][row] for part, row in self.place])

    def dequantise(self) -> Tensor:
        """[E, out, in] float32."""
        wide = [part.float() if isinstance(part, Tensor) else part.dequantise() for part in self.parts]
        return torch.stack([wide[part][row] for part, row in self.place])

    @cached_property
    def rows(self) -> tuple[Tensor, ...]:
        """By part, [E] int64: the weight of each expert, or -1 where that is in another part."""
        where = torch.tensor(self.place)
        return tuple(torch.where(where[:, 0] == part, where[:, 1], -1) for part in range(len(self.parts)))


def mixed_edges(edges: Edges, weight: MixedWeight) -> Iterator[tuple[int, EdgeTensors]]:
    """By part that has any, its edges over its own weights."""
    counts_E = edges.ends.diff(prepend=edges.ends.new_zeros(1)).long()
    expert_N = torch.repeat_interleave(torch.arange(len(counts_E)), counts_E)
    for part, (held, row_E) in enumerate(zip(weight.parts, weight.rows, strict=True)):
        row_N = row_E[expert_N]
        kept_M = (row_N >= 0).nonzero().flatten()
        if len(kept_M):
            kept_M = kept_M[row_N[kept_M].argsort(stable=True)]  # experts that are the same have one segment
            ends = torch.bincount(row_N[kept_M], minlength=held.shape[0]).cumsum(0).to(torch.int32)
            yield part, EdgeTensors(edges.token[kept_M], edges.weight[kept_M], ends, edges.num_tokens)


def expert_mlp_mixed(
    x_TD: Tensor,
    edges: Edges,
    up: MixedWeight,
    down: MixedWeight,
    run: Callable[[Tensor, EdgeTensors, Any, Any], Tensor],
) -> Tensor:
    """``expert_mlp`` without gradients, format by format through ``run``: float32 [T, D].

    A row's bits depend on its own experts alone.
    """
    if up.place != down.place:
        raise UserError("up and down of a stack must have the same experts in the same formats")
    y_TD = torch.zeros_like(x_TD, dtype=torch.float32)
    for part, own in mixed_edges(edges, up):
        above, below = up.parts[part], down.parts[part]
        y_TD += run(x_TD.to(above.dtype) if isinstance(above, Tensor) else x_TD, own, above, below)
    return y_TD
