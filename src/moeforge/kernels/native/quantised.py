"""Weights of 8 or 4 bits for decoding, symmetric, one scale per group; rows in bf16 or, with a loss, in int8.

The format, for a weight [..., out, in]. ``in`` is padded with zeros to blocks of 128. A group is 32, 64 or 128
consecutive inputs of one row, and its float16 scale is the largest magnitude in it divided by 127 or 7; a code is
round(w / scale), between -127 and 127 or between -7 and 7.

- ``scales`` [..., out, in / group] float16.
- Codes lie in an order that gives each quarter of a block its own lanes of a vector: the 128 codes of a block, taken as
  [quarter 4][step 4][half 2][4], are stored as [half][step][quarter][4].
- 8 bits: ``packed`` [..., out, in] int8.
- 4 bits: ``packed`` [..., out, in / 2] uint8, each code plus 8. Of the 64 bytes of a block the low four bits are its
  first half as stored, the high four bits its second.
"""

import ctypes
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from moeforge.config import Activation
from moeforge.errors import UserError
from moeforge.kernels.activation import activate, is_gated
from moeforge.kernels.edges import Edges, segments
from moeforge.kernels.native import engine

BLOCK = 128
LARGEST = {8: 127, 4: 7}
GROUPS = (32, 64, 128)
ORDER = torch.arange(BLOCK).view(4, 4, 2, 4).permute(2, 1, 0, 3).flatten()
"""The input of a block whose code lies at each place."""

RowType = Literal["bf16", "int8"]
"""What rows are multiplied as. ``int8`` rounds each group of a row, as wide as the weights', to codes of -127 to 127
with a float32 scale. That skips widening the weights, for an error of 0.8 % (a trained model) to 1.2 % (random numbers)
of a layer's output beside what the weights' own rounding costs (docs/kernels.md)."""


class _Matrix(ctypes.Structure):
    """``struct Quantised`` of ``quantised.h``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("packed", "scales")),
        *((name, ctypes.c_int64) for name in ("packed_stride", "scales_stride")),
        *((name, ctypes.c_int32) for name in ("bits", "group", "rows", "blocks")),
    )


@dataclass(frozen=True)
class QuantisedWeight:
    """A weight [..., out, in] in the format that the module describes.

    In a stack [E, out, in] each expert's own bytes are contiguous; the experts may lie apart, as in a mapped file.
    """

    packed: Tensor
    scales: Tensor
    bits: int
    group: int
    shape: tuple[int, ...]
    """Of the weight that it stands for."""

    @classmethod
    def of_codes(cls, codes: Tensor, scales: Tensor, bits: int, group: int, width: int) -> "QuantisedWeight":
        """Of codes [..., out, multiple of 128] int8 in the order of inputs, of which the first ``width`` count."""
        stored = to_order(codes)
        packed = stored if bits == 8 else _nibbles_of(stored)
        return cls(packed.contiguous(), scales.contiguous(), bits, group, (*codes.shape[:-1], width))

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.packed.nbytes + self.scales.nbytes

    @cached_property
    def matrix(self) -> _Matrix:
        """What the C++ reads: made once, since one token's experts take little longer than making it."""
        blocks = -(-self.shape[-1] // BLOCK)
        addresses = (_pointer(part) for part in (self.packed, self.scales))
        strides = (part.stride(-3) if part.dim() > 2 else 0 for part in (self.packed, self.scales))
        return _Matrix(*addresses, *strides, self.bits, self.group, self.shape[-2], blocks)

    def __getstate__(self) -> dict[str, object]:
        """A copy has addresses of its own."""
        return {name: value for name, value in self.__dict__.items() if name != "matrix"}

    def dequantise(self) -> Tensor:
        """[..., out, in] float32: what the numbers stand for."""
        stored = self.packed if self.bits == 8 else _bytes_of(self.packed)
        codes = in_order(stored)
        grouped = codes.float().unflatten(-1, (-1, self.group)) * self.scales.float()[..., None]
        return grouped.flatten(-2)[..., : self.shape[-1]]


def quantise(weight: Tensor, bits: int, group: int) -> QuantisedWeight:
    """[..., out, in] to ``bits`` (8 or 4), a scale for each ``group`` (32, 64 or 128) of inputs.

    Raises UserError for other bits or groups, and for weights that are not finite or too large for a scale.
    """
    if bits not in LARGEST or group not in GROUPS:
        raise UserError(f"weights go to 8 or 4 bits in groups of 32, 64 or 128, not to {bits} in groups of {group}")
    packed, scales = _pack(weight, bits, group) or _pack_in_torch(weight, bits, group)
    return QuantisedWeight(packed, scales, bits, group, tuple(weight.shape))


def _pack(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor] | None:
    """In one pass and with torch's bits; None where that cannot be, or where torch says what is wrong."""
    if weight.device.type != "cpu" or weight.dtype not in engine.TYPES or engine.missing() is not None:
        return None
    weight, wide = weight.detach().contiguous(), weight.shape[-1] + -weight.shape[-1] % BLOCK
    packed = torch.empty(*weight.shape[:-1], wide * bits // 8, dtype=torch.int8 if bits == 8 else torch.uint8)
    scales = torch.empty(*weight.shape[:-1], wide // group, dtype=torch.float16)
    rows = ctypes.c_int64(weight.shape[:-1].numel())
    sizes = int(weight.dtype == torch.bfloat16), rows, weight.shape[-1], bits, group, torch.get_num_threads()
    outputs = engine.address(packed), engine.address(scales)
    status = engine.open_library().moeforge_pack(engine.address(weight), *sizes, *outputs)
    return None if status else (packed, scales)


def _pack_in_torch(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    if not bool(weight.isfinite().all()):
        raise UserError("a weight that is not finite cannot be quantised")
    padded = F.pad(weight.float(), (0, -weight.shape[-1] % BLOCK)).unflatten(-1, (-1, group))
    scales = (padded.abs().amax(-1) / LARGEST[bits]).to(torch.float16)
    if not bool(scales.isfinite().all()):
        raise UserError("a weight is too large for a float16 scale")
    steps = scales.float()[..., None]
    codes = torch.where(steps > 0, padded / steps, 0).round().clamp(-LARGEST[bits], LARGEST[bits]).to(torch.int8)
    made = QuantisedWeight.of_codes(codes.flatten(-2), scales, bits, group, weight.shape[-1])
    return made.packed, made.scales


def to_order(codes: Tensor) -> Tensor:
    """Codes [..., multiple of 128] in the order of inputs -> as they lie."""
    return codes.unflatten(-1, (-1, BLOCK))[..., ORDER].flatten(-2)


def in_order(stored: Tensor) -> Tensor:
    """What ``to_order`` was given."""
    return stored.unflatten(-1, (-1, BLOCK))[..., ORDER.argsort()].flatten(-2)


def _pointer(stack: Tensor) -> int:
    """To the first value; what lies between two experts is not looked at."""
    return engine.pointer(stack[0]) if stack.dim() > 2 and len(stack) else engine.pointer(stack)


def _nibbles_of(codes: Tensor) -> Tensor:
    low, high = (codes + 8).to(torch.uint8).unflatten(-1, (-1, 2, BLOCK // 2)).unbind(-2)
    return (low | high << 4).flatten(-2)


def _bytes_of(packed: Tensor) -> Tensor:
    blocks = packed.unflatten(-1, (-1, BLOCK // 2))
    return torch.stack([blocks & 15, blocks >> 4], -2).to(torch.int8).flatten(-3) - 8


def expert_mlp_quantised(
    x_TD: Tensor,
    edges: Edges,
    up: QuantisedWeight,
    down: QuantisedWeight,
    activation: Activation,
    rows: RowType = "bf16",
) -> Tensor:
    """``expert_mlp`` without gradients over quantised weights, up [E, H or 2H, D] and down [E, D, H]: bf16 [T, D].

    ``rows`` is what x and the hidden values are multiplied as. A row's bits do not depend on the other rows. Made for
    few tokens per expert; where the native engine does not run, torch computes with dequantised weights and rows.
    """
    num_experts, d_model, d_expert = down.shape
    if up.shape != (num_experts, d_expert * (1 + is_gated(activation)), d_model):
        raise UserError(f"up {up.shape} and down {down.shape} do not fit each other for {activation}")
    if x_TD.shape != (edges.num_tokens, d_model) or x_TD.device != up.packed.device:
        where = f"on {x_TD.device} do not fit weights for {d_model} on {up.packed.device}, {edges.num_tokens} tokens"
        raise UserError(f"rows {tuple(x_TD.shape)} {where}")
    as_bytes = _as_bytes(rows)
    x_TD = x_TD.detach().to(torch.bfloat16)
    if x_TD.device.type != "cpu" or engine.missing() is not None:
        return _experts_in_torch(x_TD, edges, up, down, activation, rows)
    lib = engine.open_library()
    layer, held = engine.layer_of(_padded(x_TD), edges, down.shape, activation)
    layer.up, layer.down = ctypes.addressof(up.matrix), ctypes.addressof(down.matrix)
    y_TD = torch.empty_like(x_TD, memory_format=torch.contiguous_format)
    status = lib.moeforge_quantised(ctypes.byref(layer), as_bytes, engine.address(y_TD))
    del held
    engine.check(status)
    return y_TD


def linear_quantised(x_TD: Tensor, weight: QuantisedWeight, rows: RowType = "bf16") -> Tensor:
    """[..., in] times one quantised matrix [out, in], without gradients; returns bf16 [..., out]."""
    if len(weight.shape) != 2 or x_TD.shape[-1] != weight.shape[1] or x_TD.device != weight.packed.device:
        raise UserError(f"rows of {x_TD.shape[-1]} values do not fit a quantised matrix {weight.shape}")
    as_bytes = _as_bytes(rows)
    x_TD = x_TD.detach().to(torch.bfloat16)
    if x_TD.device.type != "cpu" or engine.missing() is not None:
        return F.linear(_rounded(x_TD, weight.group, rows), weight.dequantise()).to(torch.bfloat16)
    x_NK = _padded(x_TD.flatten(0, -2))
    y_TD = x_NK.new_empty(len(x_NK), weight.shape[0])
    sizes = ctypes.c_int64(len(x_NK)), as_bytes, torch.get_num_threads()
    lib = engine.open_library()
    engine.check(
        lib.moeforge_quantised_linear(ctypes.byref(weight.matrix), engine.address(x_NK), *sizes, engine.address(y_TD))
    )
    return y_TD.view(*x_TD.shape[:-1], weight.shape[0])


def _as_bytes(rows: RowType) -> int:
    if rows not in get_args(RowType):
        raise UserError(f"rows are multiplied as one of {', '.join(get_args(RowType))}, not as {rows}")
    return int(rows == "int8")


def _experts_in_torch(
    x_TD: Tensor, edges: Edges, up: QuantisedWeight, down: QuantisedWeight, activation: Activation, rows: RowType
) -> Tensor:
    """What the C++ computes, in float32: the hidden values too go through bf16 before they are rounded."""
    y_TD, up_EHD, down_EDH = torch.zeros_like(x_TD, dtype=torch.float32), up.dequantise(), down.dequantise()
    x_TD = _rounded(x_TD, up.group, rows)
    for expert, low, high in segments(edges.ends):
        token = edges.token[low:high]
        hidden_NH = activate(F.linear(x_TD[token], up_EHD[expert]), activation).to(torch.bfloat16)
        rows_ND = F.linear(_rounded(hidden_NH, down.group, rows), down_EDH[expert])
        y_TD.index_add_(0, token, rows_ND * edges.weight.detach()[low:high, None].float())
    return y_TD.to(torch.bfloat16)


def _rounded(x_TD: Tensor, group: int, rows: RowType) -> Tensor:
    """Float32 [..., in]: what the rows stand for once they are ``rows``."""
    if rows == "bf16":
        return x_TD.float()
    groups = F.pad(x_TD.float(), (0, -x_TD.shape[-1] % group)).unflatten(-1, (-1, group))
    scales = groups.abs().amax(-1, keepdim=True) / 127
    codes = torch.where(scales > 0, groups / scales, 0).clamp(-127, 127).round()
    return (codes * scales).flatten(-2)[..., : x_TD.shape[-1]]


def _padded(x_TD: Tensor) -> Tensor:
    padding = -x_TD.shape[-1] % BLOCK
    return (F.pad(x_TD, (0, padding)) if padding else x_TD).contiguous()
