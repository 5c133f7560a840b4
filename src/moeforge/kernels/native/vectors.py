"""Weights in vectors of four, each one of 256 that a matrix has: 2 bits a weight, beside scales and 512 bytes.

For a weight [..., out, in], ``in`` padded with zeros to blocks of 128:

- ``packed`` [..., out, in / 4] uint8: of each four neighbours in the order of ``formats.py``, which keeps four inputs
  side by side, the number of their vector.
- ``codebook`` [..., 256] int16 (the bits of uint16): the vectors of a matrix, four codes from -7 to 7, each plus 8 in
  four bits, lowest first.
- ``scales`` [..., out, in / group] float16: a weight is its code times the scale of its group.
"""

import ctypes
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from moeforge.kernels.native import engine
from moeforge.kernels.native.formats import BLOCK, in_order, to_order
from moeforge.kernels.native.quantised import Copied, Matrix, array

VECTORS, LENGTH, LARGEST = 256, 4, 7
NUMBER = -1
"""Which format it is for the C++."""
SHIFTS = 4 * torch.arange(LENGTH)


@dataclass(frozen=True)
class VectorWeight(Copied):
    """A weight [..., out, in] in the format that the module describes."""

    packed: Tensor
    scales: Tensor
    codebook: Tensor
    group: int
    shape: tuple[int, ...]
    """Of the weight that it stands for."""

    @classmethod
    def of_codes(cls, codes: Tensor, scales: Tensor, codebook: Tensor, group: int, width: int) -> "VectorWeight":
        """One matrix, as a stack of one: codes [out, multiple of 128] int8 in the order of inputs, any four of them a
        row of ``codebook`` [256, 4]; the first ``width`` inputs count."""
        place = torch.zeros(1 << 4 * LENGTH, dtype=torch.uint8)
        place[_key(codebook)] = torch.arange(VECTORS, dtype=torch.uint8)
        packed = place[_key(to_order(codes).unflatten(-1, (-1, LENGTH)))]
        return cls(packed[None], scales[None], _key(codebook).to(torch.int16)[None], group, (1, len(codes), width))

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.packed.nbytes + self.scales.nbytes + self.codebook.nbytes

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.packed.device

    @cached_property
    def matrices(self) -> ctypes.Array[Matrix]:
        """What the C++ reads."""
        sizes = NUMBER, self.group, self.shape[-2], -(-self.shape[-1] // BLOCK)
        own = self.packed, self.scales, self.codebook
        stack = zip(*own, strict=True) if len(self.shape) > 2 else [own]
        pointers = ([engine.pointer(tensor) for tensor in one] for one in stack)
        return array([Matrix(packed, scales, None, codebook, *sizes) for packed, scales, codebook in pointers])

    def dequantise(self) -> Tensor:
        """[..., out, in] float32: what the numbers stand for."""
        vectors = (self.codebook.long()[..., None] >> SHIFTS & 15) - 8  # [..., 256, 4]
        number = self.packed.long().flatten(-2)[..., None].expand(*self.packed.shape[:-2], -1, LENGTH)
        codes = in_order(vectors.gather(-2, number).unflatten(-2, self.packed.shape[-2:]).flatten(-2))
        grouped = codes.float().unflatten(-1, (-1, self.group)) * self.scales.float()[..., None]
        return grouped.flatten(-2)[..., : self.shape[-1]]


def _key(vectors: Tensor) -> Tensor:
    """Four codes [..., 4] -> their 16 bits, [...] int64."""
    return (vectors.long() + 8 << SHIFTS).sum(-1)
