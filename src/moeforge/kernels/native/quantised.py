"""Weights of 8 or 4 bits for decoding: rows in bf16, weights alone quantised, symmetric, one scale per group.

The format, for a weight [..., out, in]. ``in`` is padded with zeros to blocks of 128. A group is 32, 64 or 128
consecutive inputs of one row, and its float16 scale is the largest magnitude in it divided by 127 or 7; a weight is
round(w / scale), between -127 and 127 or between -7 and 7.

- ``scales`` [..., out, in / group] float16.
- 8 bits: ``packed`` [..., out, in] int8, in order.
- 4 bits: ``packed`` [..., out, in / 2] uint8. Each block of 128 inputs is 32 little-endian words of 16 bits; word i
  holds inputs i, 32 + i, 64 + i and 96 + i of the block, the first in its lowest four bits, each plus 8. So a shift and
  one table look-up widen 32 weights, in order.
"""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from moeforge.config import Activation
from moeforge.errors import UserError
from moeforge.kernels.activation import is_gated
from moeforge.kernels.edges import Edges
from moeforge.kernels.native import engine
from moeforge.kernels.reference import reference

BLOCK = 128
LARGEST = {8: 127, 4: 7}
GROUPS = (32, 64, 128)


@dataclass(frozen=True)
class QuantisedWeight:
    """A weight [..., out, in] in the format that the module describes."""

    packed: Tensor
    scales: Tensor
    bits: int
    group: int
    shape: tuple[int, ...]
    """Of the weight that it stands for."""

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.packed.nbytes + self.scales.nbytes

    def dequantise(self) -> Tensor:
        """[..., out, in] float32: what the numbers stand for."""
        codes = self.packed if self.bits == 8 else _unpack(self.packed)
        grouped = codes.float().unflatten(-1, (-1, self.group)) * self.scales.float()[..., None]
        return grouped.flatten(-2)[..., : self.shape[-1]]


def quantise(weight: Tensor, bits: int, group: int) -> QuantisedWeight:
    """[..., out, in] to ``bits`` (8 or 4), a scale for each ``group`` (32, 64 or 128) of inputs."""
    if bits not in LARGEST or group not in GROUPS:
        raise UserError(f"weights go to 8 or 4 bits in groups of 32, 64 or 128, not to {bits} in groups of {group}")
    if not bool(weight.isfinite().all()):
        raise UserError("a weight that is not finite cannot be quantised")
    padded = F.pad(weight.float(), (0, -weight.shape[-1] % BLOCK)).unflatten(-1, (-1, group))
    scales = (padded.abs().amax(-1) / LARGEST[bits]).to(torch.float16)
    if not bool(scales.isfinite().all()):
        raise UserError("a weight is too large for a float16 scale")
    steps = scales.float()[..., None]
    codes = torch.where(steps > 0, padded / steps, 0).round().clamp(-LARGEST[bits], LARGEST[bits]).to(torch.int8)
    codes = codes.flatten(-2)
    packed = codes if bits == 8 else _pack(codes)
    return QuantisedWeight(packed.contiguous(), scales.contiguous(), bits, group, tuple(weight.shape))


def _pack(codes: Tensor) -> Tensor:
    nibbles = (codes.to(torch.int32) + 8).unflatten(-1, (-1, 4, 32))
    shifts = torch.arange(0, 16, 4, dtype=torch.int32)[:, None]
    words = (nibbles << shifts).sum(-2)
    low, high = words & 255, words >> 8
    return torch.stack([low, high], -1).to(torch.uint8).flatten(-3)


def _unpack(packed: Tensor) -> Tensor:
    halves = packed.to(torch.int32).unflatten(-1, (-1, 32, 2))
    words = halves[..., 0] | halves[..., 1] << 8
    return torch.stack([(words >> (4 * j) & 15) - 8 for j in range(4)], -2).flatten(-3)


def expert_mlp_quantised(
    x_TD: Tensor, edges: Edges, up: QuantisedWeight, down: QuantisedWeight, activation: Activation
) -> Tensor:
    """``expert_mlp`` without gradients over quantised weights, up [E, H or 2H, D] and down [E, D, H]: bf16 [T, D].

    A row's bits do not depend on the other rows. Made for few tokens per expert; where the native engine does not run,
    torch computes with dequantised weights.
    """
    num_experts, d_model, d_expert = down.shape
    if up.shape != (num_experts, d_expert * (1 + is_gated(activation)), d_model):
        raise UserError(f"up {up.shape} and down {down.shape} do not fit each other for {activation}")
    if x_TD.shape != (edges.num_tokens, d_model) or x_TD.device != up.packed.device:
        where = f"on {x_TD.device} do not fit weights for {d_model} on {up.packed.device}, {edges.num_tokens} tokens"
        raise UserError(f"rows {tuple(x_TD.shape)} {where}")
    x_TD = x_TD.detach().to(torch.bfloat16)
    if x_TD.device.type != "cpu" or engine.missing() is not None:
        up_EHD, down_EDH = (weight.dequantise().to(torch.bfloat16) for weight in (up, down))
        return reference(x_TD, edges, up_EHD, down_EDH, activation).detach()
    lib = engine.open_library()
    matrices = _Matrix.of(up), _Matrix.of(down)
    layer, held = engine.layer_of(_padded(x_TD), edges, down.shape, activation)
    layer.up, layer.down = (ctypes.addressof(matrix) for matrix in matrices)
    y_TD = x_TD.new_empty(x_TD.shape)
    hidden_NH = x_TD.new_zeros(len(edges.token), matrices[1].blocks * BLOCK)
    status = lib.moeforge_quantised(ctypes.byref(layer), engine.address(y_TD), engine.address(hidden_NH))
    del held
    engine.check(status)
    return y_TD


def linear_quantised(x_TD: Tensor, weight: QuantisedWeight) -> Tensor:
    """[..., in] times one quantised matrix [out, in], without gradients; returns bf16 [..., out]."""
    if len(weight.shape) != 2 or x_TD.shape[-1] != weight.shape[1] or x_TD.device != weight.packed.device:
        raise UserError(f"rows of {x_TD.shape[-1]} values do not fit a quantised matrix {weight.shape}")
    x_TD = x_TD.detach().to(torch.bfloat16)
    if x_TD.device.type != "cpu" or engine.missing() is not None:
        return F.linear(x_TD, weight.dequantise().to(torch.bfloat16))
    rows, matrix = _padded(x_TD.flatten(0, -2)), _Matrix.of(weight)
    y_TD = rows.new_empty(len(rows), weight.shape[0])
    sizes = ctypes.c_int64(len(rows)), ctypes.c_int32(torch.get_num_threads())
    lib = engine.open_library()
    lib.moeforge_quantised_linear(ctypes.byref(matrix), engine.address(rows), *sizes, engine.address(y_TD))
    return y_TD.view(*x_TD.shape[:-1], weight.shape[0])


class _Matrix(ctypes.Structure):
    """``struct Quantised`` of ``quantised.cpp``; lives shorter than the weight."""

    _fields_ = (
        ("packed", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("bits", "group", "rows", "blocks")),
    )

    @classmethod
    def of(cls, weight: QuantisedWeight) -> "_Matrix":
        blocks = -(-weight.shape[-1] // BLOCK)
        addresses = engine.pointer(weight.packed), engine.pointer(weight.scales)
        return cls(*addresses, weight.bits, weight.group, weight.shape[-2], blocks)


def _padded(x_TD: Tensor) -> Tensor:
    return F.pad(x_TD, (0, -x_TD.shape[-1] % BLOCK)).contiguous()
