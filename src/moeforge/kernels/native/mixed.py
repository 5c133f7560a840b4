"""A stack of experts in several formats: each a row of one of several stacks, and several may be the same row."""

import ctypes
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from moeforge.kernels.native.coded import CodedWeight
from moeforge.kernels.native.formats import BLOCK
from moeforge.kernels.native.quantised import Copied, Matrix, QuantisedWeight, array


@dataclass(frozen=True)
class MixedWeight(Copied):
    """A weight [E, out, in] whose experts lie in ``parts``. One call runs them all."""

    parts: tuple[QuantisedWeight | CodedWeight, ...]
    """Stacks [n, out, in] of the same out and in."""
    place: tuple[tuple[int, int], ...]
    """Of each expert: (part, row in it). Experts that were merged name one place."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight that it stands for."""
        return (len(self.place), *self.parts[0].shape[1:])

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return sum(part.nbytes for part in self.parts)

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.parts[0].device

    @property
    def group(self) -> int:
        """Inputs that share a scale, where that is the same for all."""
        groups = {part.group for part in self.parts}
        return groups.pop() if len(groups) == 1 else BLOCK

    @cached_property
    def matrices(self) -> ctypes.Array[Matrix]:
        """What the C++ reads."""
        return array([self.parts[part].matrices[row] for part, row in self.place])

    def dequantise(self) -> Tensor:
        """[E, out, in] float32: what the numbers stand for."""
        parts = [part.dequantise() for part in self.parts]
        return torch.stack([parts[part][row] for part, row in self.place])
