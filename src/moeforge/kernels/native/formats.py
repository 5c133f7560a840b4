"""How the codes of a weight in few bits lie: five formats of whole numbers, which the C++ reads (``narrow.h``).

Codes come in blocks of 128 inputs of one row, in an order that gives each quarter of a block its own lanes of a vector:
the 128 codes, taken as [quarter 4][step 4][half 2][4], are stored as [half][step][quarter][4]. A block is

- 8 bits, -127 to 127: 128 bytes int8.
- 4 bits, -7 to 7: 64 bytes, of code plus 8. The low four bits are the first half as stored, the high four the second.
- 3 bits, the odd numbers from -7 to 7, and 2 bits, those from -3 to 3: weights lie evenly around zero, and none of so
  few levels may be lost to it. Levels count from 0 for the lowest. 2 bits, 32 bytes: byte i has the levels at i,
  i + 32, i + 64 and i + 96, lowest bits first. 3 bits, 48 bytes: the low two bits of all levels likewise, then 16 bytes
  of high bits: bit b of byte i is that of the level at i + 16 b.
- ternary, -1 to 1, 26 bytes: byte i is the sum of 3^k times the level at i + 26 k, k from 0 to 4; past 127 are zeros.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Bits = Literal[8, 4, 3, 2, "ternary"]
BLOCK = 128
ORDER = torch.arange(BLOCK).view(4, 4, 2, 4).permute(2, 1, 0, 3).flatten()
"""The input of a block whose code lies at each place."""


@dataclass(frozen=True)
class Format:
    """Codes from ``-largest`` to ``largest``."""

    largest: int
    step: int
    """From one code to the next."""
    block: int
    """Bytes of a block."""
    number: int
    """Which one it is for the C++."""

    def nearest(self, ratio: Tensor) -> Tensor:
        """Weights divided by their scales -> codes int8."""
        centre = self.step - 1  # odd codes are two apart, around one
        codes = ((ratio - centre) / self.step).round() * self.step + centre if centre else ratio.round()
        return codes.clamp(-self.largest, self.largest).to(torch.int8)


FORMATS: dict[Bits, Format] = {
    8: Format(127, 1, 128, 8),
    4: Format(7, 1, 64, 4),
    3: Format(7, 2, 48, 3),
    2: Format(3, 2, 32, 2),
    "ternary": Format(1, 1, 26, 1),
}


def to_order(codes: Tensor) -> Tensor:
    """Codes [..., multiple of 128] in the order of inputs -> as they are stored."""
    return codes.unflatten(-1, (-1, BLOCK))[..., ORDER].flatten(-2)


def in_order(stored: Tensor) -> Tensor:
    """What ``to_order`` was given."""
    return stored.unflatten(-1, (-1, BLOCK))[..., ORDER.argsort()].flatten(-2)


def pack(codes: Tensor, bits: Bits) -> Tensor:
    """Codes [..., multiple of 128] int8 in the order of inputs -> bytes [..., blocks * bytes of a block]."""
    stored, form = to_order(codes), FORMATS[bits]
    if bits == 8:
        return stored.contiguous()
    if bits == 4:
        low, high = (stored + 8).to(torch.uint8).unflatten(-1, (-1, 2, BLOCK // 2)).unbind(-2)
        return (low | high << 4).flatten(-2)
    levels = ((stored.unflatten(-1, (-1, BLOCK)) + form.largest) // form.step).to(torch.uint8)
    if bits == "ternary":
        powers = 3 ** torch.arange(5, dtype=torch.uint8)[:, None]
        return (F.pad(levels, (0, 2)).unflatten(-1, (5, 26)) * powers).sum(-2, dtype=torch.uint8).flatten(-2)
    shifts = 2 * torch.arange(4, dtype=torch.uint8)[:, None]
    packed = ((levels & 3).unflatten(-1, (4, 32)) << shifts).sum(-2, dtype=torch.uint8)
    if bits == 3:
        high = (levels >> 2).unflatten(-1, (8, 16)) << torch.arange(8, dtype=torch.uint8)[:, None]
        packed = torch.cat([packed, high.sum(-2, dtype=torch.uint8)], -1)
    return packed.flatten(-2)


def unpack(packed: Tensor, bits: Bits) -> Tensor:
    """What ``pack`` was given."""
    form = FORMATS[bits]
    blocks = packed.unflatten(-1, (-1, form.block))
    if bits == 8:
        return in_order(packed)
    if bits == 4:
        return in_order(torch.stack([blocks & 15, blocks >> 4], -2).to(torch.int8).flatten(-3) - 8)
    if bits == "ternary":
        levels = torch.stack([blocks // 3**k % 3 for k in range(5)], -2).flatten(-2)[..., :BLOCK]
    else:
        levels = (blocks[..., None, :32] >> 2 * torch.arange(4, dtype=torch.uint8)[:, None] & 3).flatten(-2)
    if bits == 3:
        high = blocks[..., None, 32:] >> torch.arange(8, dtype=torch.uint8)[:, None] & 1
        levels = levels | high.flatten(-2) << 2
    return in_order((levels.to(torch.int8) * form.step - form.largest).flatten(-2))
