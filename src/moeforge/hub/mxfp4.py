"""MXFP4 weights (OCP Microscaling Formats 1.0): 32 numbers of four bits share a power of two."""

import torch
from torch import Tensor

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Of the lower three bits; the fourth is the sign."""


def unpack(blocks: Tensor, scales: Tensor) -> Tensor:
    """Blocks [E, R, G, 16] uint8, the lower half of a byte first, and exponents plus 127 [E, R, G] uint8 -> weights
    [E, R, 32 G] bfloat16, which holds every such number exactly."""
    table = torch.tensor([*MAGNITUDES, *(-value for value in MAGNITUDES)], dtype=torch.bfloat16)
    rows = torch.empty(*blocks.shape[:2], 32 * blocks.shape[2], dtype=torch.bfloat16)
    for packed, exponent, row in zip(blocks, scales, rows, strict=True):  # one expert's indices at a time
        halves = torch.stack((packed & 15, packed >> 4), -1).flatten(-2)
        row.copy_(torch.ldexp(table[halves.int()], exponent.int()[..., None] - 127).flatten(-2))
    return rows
