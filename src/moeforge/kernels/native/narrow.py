"""Weights of 3 bits, 2 bits or three values, for experts that must be small: widened to the 4-bit format on use.

The codes are some of those that 4 bits have (``quantised.py``), so that one kernel multiplies with all of them:
odd numbers from -7 to 7 for 3 bits and from -3 to 3 for 2 bits, since weights are spread evenly around zero and none of
so few levels may be lost to it; -1, 0 and 1 for ``ternary``. A weight is its code times the float16 scale of its group.

``packed`` [..., out, blocks * bytes] uint8 holds the codes of each block of 128 inputs, in the order of
``quantised.py``, each as the number of its level, from 0 for the lowest:

- 2 bits, 32 bytes: byte i has the levels at i, i + 32, i + 64 and i + 96, lowest bits first.
- 3 bits, 48 bytes: the low two bits of every level as above, then 16 bytes of high bits: bit b of byte i is that of the
  level at i + 16 b.
- ternary, 26 bytes: byte i is the sum of 3^k times the level at i + 26 k, k from 0 to 4; levels past 127 are 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from moeforge.kernels.native.quantised import BLOCK, QuantisedWeight, in_order, to_order

Narrow = Literal[3, 2, "ternary"]
BYTES: dict[Narrow, int] = {3: 48, 2: 32, "ternary": 26}
"""Of a block of 128 codes."""
LEVELS: dict[Narrow, tuple[int, int, int]] = {3: (-7, 2, 8), 2: (-3, 2, 4), "ternary": (-1, 1, 3)}
"""Lowest code, step from one to the next, how many."""


@dataclass(frozen=True)
class NarrowWeight:
    """A weight [..., out, in] in a format that the module describes."""

    packed: Tensor
    scales: Tensor
    """[..., out, in / group] float16."""
    bits: Narrow
    group: int
    shape: tuple[int, ...]
    """Of the weight that it stands for."""

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.packed.nbytes + self.scales.nbytes

    def widen(self, experts: Sequence[int]) -> QuantisedWeight:
        """The 4-bit weight that some experts of a stack [E, out, in] stand for: the same numbers, bit for bit."""
        which = list(experts)
        codes = unpack(self.packed[which], self.bits)
        return QuantisedWeight.of_codes(codes, self.scales[which], 4, self.group, self.shape[-1])

    def dequantise(self) -> Tensor:
        """[E, out, in] float32: what the numbers of a stack stand for."""
        return self.widen(range(self.shape[0])).dequantise()


def pack(codes: Tensor, bits: Narrow) -> Tensor:
    """Codes [..., multiple of 128] int8 in the order of inputs -> bytes [..., blocks * bytes] uint8."""
    low, step, _ = LEVELS[bits]
    levels = ((to_order(codes).unflatten(-1, (-1, BLOCK)) - low) // step).to(torch.uint8)
    if bits == "ternary":
        parts = F.pad(levels, (0, 2)).unflatten(-1, (5, 26))
        packed = sum(parts[..., k, :] * 3**k for k in range(5))
        assert isinstance(packed, Tensor)
        return packed.to(torch.uint8).flatten(-2)
    parts = (levels & 3).unflatten(-1, (4, 32))
    packed = parts[..., 0, :] | parts[..., 1, :] << 2 | parts[..., 2, :] << 4 | parts[..., 3, :] << 6
    if bits == 3:
        high = (levels >> 2).unflatten(-1, (8, 16)) << torch.arange(8, dtype=torch.uint8)[:, None]
        packed = torch.cat([packed, high.sum(-2).to(torch.uint8)], -1)
    return packed.flatten(-2)


def unpack(packed: Tensor, bits: Narrow) -> Tensor:
    """What ``pack`` was given."""
    blocks = packed.unflatten(-1, (-1, BYTES[bits]))
    if bits == "ternary":
        levels = torch.stack([blocks // 3**k % 3 for k in range(5)], -2).flatten(-2)[..., :BLOCK]
    else:
        pairs = blocks[..., :32]
        levels = torch.stack([pairs >> shift & 3 for shift in (0, 2, 4, 6)], -2).flatten(-2)
        if bits == 3:
            high = blocks[..., None, 32:] >> torch.arange(8, dtype=torch.uint8)[:, None] & 1
            levels = levels | high.flatten(-2) << 2
    low, step, _ = LEVELS[bits]
    return in_order((levels.to(torch.int8) * step + low).flatten(-2))
