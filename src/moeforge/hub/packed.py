"""Weights that lie on disk in fewer bits, their scales in a second tensor: read as the bfloat16 they stand for."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

METHODS = ("mxfp4", "fp8")
"""What ``quantization_config`` may name."""
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Of the lower three of four bits; the fourth is the sign."""
BLOCK = (128, 128)


class Packed(NamedTuple):
    """One weight in two tensors."""

    values: str
    scales: str
    shape: torch.Size
    """Of the weight."""
    unpack: Callable[[Tensor, Tensor], Tensor]


def find_packed(
    shapes: Mapping[str, torch.Size], dtypes: Mapping[str, torch.dtype], settings: Any
) -> dict[str, Packed]:
    """The packed weights among a folder's tensors, by the names that they have where they are not packed.

    ``settings`` is the folder's ``quantization_config``, or nothing. Raises ValueError for scales that do not fit.
    """
    rows, columns = (settings or {}).get("weight_block_size") or BLOCK
    found = {}
    for name, shape in shapes.items():
        if name.endswith("_blocks"):
            weight, scales = name.removesuffix("_blocks"), f"{name.removesuffix('_blocks')}_scales"
            fits = len(shape) == 4 and shape[3] == 16 and shapes.get(scales) == shape[:3]
            types, kind = {torch.uint8}, "MXFP4"
            packed = Packed(
                name, scales, torch.Size((shape[0], 32 * shape[2], shape[1])) if fits else shape, from_mxfp4
            )
        elif f"{name}_scale_inv" in shapes:
            weight, scales = name, f"{name}_scale_inv"
            fits = len(shape) == 2 and shapes[scales] == (-(-shape[0] // rows), -(-shape[1] // columns))
            types, kind = {torch.float8_e4m3fn}, f"FP8 in blocks of {rows} x {columns}"
            packed = Packed(name, scales, shape, partial(from_fp8, block=(rows, columns)))
        else:
            continue
        if not fits or dtypes[name] not in types:
            raise ValueError(f"{name} and {scales} are no weight in {kind}")
        found[weight] = packed
    return found


def from_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """MXFP4 (OCP Microscaling Formats 1.0): 32 numbers of four bits share a power of two.

    Blocks [E, R, G, 16] uint8, the lower half of a byte first, and exponents plus 127 [E, R, G] uint8 -> weights
    [E, 32 G, R] bfloat16, which holds every such number exactly; the input dimension comes first, as in gpt-oss.
    """
    table = torch.tensor([*MAGNITUDES, *(-value for value in MAGNITUDES)], dtype=torch.bfloat16)
    rows = torch.empty(*blocks.shape[:2], 32 * blocks.shape[2], dtype=torch.bfloat16)
    for packed, exponent, row in zip(blocks, scales, rows, strict=True):  # one expert's indices at a time
        halves = torch.stack((packed & 15, packed >> 4), -1).flatten(-2)
        row.copy_(torch.ldexp(table[halves.int()], exponent.int()[..., None] - 127).flatten(-2))
    return rows.transpose(1, 2)


def from_fp8(values: Tensor, scales: Tensor, block: tuple[int, int] = BLOCK) -> Tensor:
    """Values [R, C] float8 and one scale per block -> [R, C] bfloat16 (arXiv:2412.19437, section 3.3)."""
    grid = scales.repeat_interleave(block[0], 0)[: len(values)].repeat_interleave(block[1], 1)[:, : values.shape[1]]
    return (values.float() * grid).bfloat16()
