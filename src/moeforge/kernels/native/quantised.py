"""Weights of 8, 4, 3, 2 bits or of three values, a scale for each group; rows in bf16 or, with a loss, in int8.

A weight [..., out, in] is ``packed`` [..., out, bytes], its codes as ``formats.py`` says, ``in`` padded to blocks of
128, and ``scales`` [..., out, in / group] float16: a group is 32, 64 or 128 consecutive inputs of one row,
and a weight its code times the scale of its group. ``quantise`` makes the scale the largest magnitude in the group
divided by the largest code, and rounds to the nearest code.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from moeforge.config import Activation
from moeforge.errors import UserError
from moeforge.kernels.activation import activate, is_gated
from moeforge.kernels.edges import Edges, EdgeTensors, segments
from moeforge.kernels.native import engine
from moeforge.kernels.native.formats import BLOCK, FORMATS, Bits, pack, unpack

GROUPS = (32, 64, 128)

RowType = Literal["bf16", "int8"]
"""What rows are multiplied as. ``int8`` rounds each group of a row, as wide as the weights', to codes of -127 to 127
with a float32 scale. That skips widening the weights (1.2 to 1.5 times as fast with AMX's machine of docs/kernels.md),
for an error of 0.8 % (a trained model) to 1.2 % (random numbers) of a layer's output, and in bits per byte of a trained
model for 0.01 % at most."""
ROWS: RowType = "int8"
"""What is taken where nobody says."""


class Matrix(ctypes.Structure):
    """``struct Quantised`` of ``quantised.h``: the matrix of one expert."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("packed", "scales", "ends", "entries")),
        *((name, ctypes.c_int32) for name in ("bits", "group", "rows", "blocks")),
    )


class PackedWeight(Protocol):
    """A weight [..., out, in] in few bits, in any format that the C++ reads."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight that it stands for."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        ...

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        ...

    @property
    def group(self) -> int:
        """Inputs that share a scale, in rows that go to int8 as well."""
        ...

    @property
    def matrices(self) -> ctypes.Array[Matrix]:
        """What the C++ reads, an expert each, or one: made once, since one token's experts take little longer."""
        ...

    def dequantise(self) -> Tensor:
        """[..., out, in] float32: what the numbers stand for."""
        ...


def array(matrices: Sequence[Matrix]) -> ctypes.Array[Matrix]:
    """One after the other, as the C++ reads them."""
    return (Matrix * len(matrices))(*matrices)


class Copied:
    """A copy has addresses of its own."""

    def __getstate__(self) -> dict[str, object]:
        """All but the addresses."""
        return {name: value for name, value in self.__dict__.items() if name != "matrices"}


@dataclass(frozen=True)
class QuantisedWeight(Copied):
    """A weight [..., out, in] in the format that the module describes.

    In a stack [E, out, in] each expert's own bytes are contiguous; the experts may lie apart, as in a mapped file.
    """

    packed: Tensor
    scales: Tensor
    bits: Bits
    group: int
    shape: tuple[int, ...]
    """Of the weight that it stands for."""

    @classmethod
    def of_codes(cls, codes: Tensor, scales: Tensor, bits: Bits, group: int, width: int) -> "QuantisedWeight":
        """Of codes [..., out, multiple of 128] int8 in the order of inputs, of which the first ``width`` count."""
        return cls(pack(codes, bits), scales.contiguous(), bits, group, (*codes.shape[:-1], width))

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.packed.nbytes + self.scales.nbytes

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.packed.device

    @cached_property
    def matrices(self) -> ctypes.Array[Matrix]:
        """What the C++ reads."""
        each = zip(self.packed, self.scales, strict=True) if len(self.shape) > 2 else [(self.packed, self.scales)]
        sizes = FORMATS[self.bits].number, self.group, self.shape[-2], -(-self.shape[-1] // BLOCK)
        return array([Matrix(*map(engine.pointer, addresses), None, None, *sizes) for addresses in each])

    def dequantise(self) -> Tensor:
        """[..., out, in] float32: what the numbers stand for."""
        grouped = (
            unpack(self.packed, self.bits).float().unflatten(-1, (-1, self.group)) * self.scales.float()[..., None]
        )
        return grouped.flatten(-2)[..., : self.shape[-1]]


def quantise(weight: Tensor, bits: Bits, group: int) -> QuantisedWeight:
    """[..., out, in] to ``bits`` (8, 4, 3, 2 or "ternary"), a scale for each ``group`` (32, 64 or 128) of inputs.

    Of a weight on the meta device only the sizes. Raises UserError for other bits or groups, and for weights that are
    not finite or too large for a scale.
    """
    if bits not in FORMATS or group not in GROUPS:
        names = ", ".join(map(str, FORMATS))
        raise UserError(f"weights go to {names} bits in groups of 32, 64 or 128, not to {bits} in groups of {group}")
    made = _room(weight, bits, group) if weight.is_meta else _pack(weight, bits, group)
    packed, scales = made or _pack_in_torch(weight, bits, group)
    return QuantisedWeight(packed, scales, bits, group, tuple(weight.shape))


def _pack(weight: Tensor, bits: Bits, group: int) -> tuple[Tensor, Tensor] | None:
    """In one pass and with torch's bits; None where that cannot be, or where torch says what is wrong."""
    runs = weight.device.type == "cpu" and weight.dtype in engine.TYPES and engine.missing() is None
    return _pack_with(engine.open_library(), weight, bits, group) if runs and bits in (8, 4) else None


def _room(weight: Tensor, bits: Bits, group: int) -> tuple[Tensor, Tensor]:
    """What codes and scales go to."""
    rows, blocks = weight.shape[:-1], -(-weight.shape[-1] // BLOCK)
    dtype = torch.int8 if bits == 8 else torch.uint8
    packed = torch.empty(*rows, blocks * FORMATS[bits].block, dtype=dtype, device=weight.device)
    return packed, torch.empty(*rows, blocks * BLOCK // group, dtype=torch.float16, device=weight.device)


def _pack_with(lib: ctypes.CDLL, weight: Tensor, bits: Bits, group: int) -> tuple[Tensor, Tensor] | None:
    weight, (packed, scales) = weight.detach().contiguous(), _room(weight, bits, group)
    rows = ctypes.c_int64(weight.shape[:-1].numel())
    sizes = int(weight.dtype == torch.bfloat16), rows, weight.shape[-1], bits, group, torch.get_num_threads()
    outputs = engine.address(packed), engine.address(scales)
    status = lib.moeforge_pack(engine.address(weight), *sizes, *outputs)
    return None if status else (packed, scales)


def _pack_in_torch(weight: Tensor, bits: Bits, group: int) -> tuple[Tensor, Tensor]:
    if not bool(weight.isfinite().all()):
        raise UserError("a weight that is not finite cannot be quantised")
    padded = F.pad(weight.float(), (0, -weight.shape[-1] % BLOCK)).unflatten(-1, (-1, group))
    scales = (padded.abs().amax(-1) / FORMATS[bits].largest).to(torch.float16)
    if not bool(scales.isfinite().all()):
        raise UserError("a weight is too large for a float16 scale")
    steps = scales.float()[..., None]
    codes = FORMATS[bits].nearest(torch.where(steps > 0, padded / steps, 0))
    return pack(codes.flatten(-2), bits), scales.contiguous()


def expert_mlp_quantised(
    x_TD: Tensor,
    edges: Edges,
    up: PackedWeight,
    down: PackedWeight,
    activation: Activation,
    rows: RowType = ROWS,
) -> Tensor:
    """``expert_mlp`` without gradients over quantised weights, up [E, H or 2H, D] and down [E, D, H]: bf16 [T, D].

    ``rows`` is what x and the hidden values are multiplied as. A row's bits do not depend on the other rows. Made for
    few tokens per expert; where the native engine does not run, torch computes with dequantised weights and rows.
    """
    num_experts, d_model, d_expert = down.shape
    if up.shape != (num_experts, d_expert * (1 + is_gated(activation)), d_model):
        raise UserError(f"up {up.shape} and down {down.shape} do not fit each other for {activation}")
    if x_TD.shape != (edges.num_tokens, d_model) or x_TD.device != up.device:
        where = f"on {x_TD.device} do not fit weights for {d_model} on {up.device}, {edges.num_tokens} tokens"
        raise UserError(f"rows {tuple(x_TD.shape)} {where}")
    as_bytes = _as_bytes(rows)
    x_TD = x_TD.detach().to(torch.bfloat16)
    if x_TD.device.type != "cpu" or engine.missing() is not None:
        matrices, groups = (up.dequantise(), down.dequantise()), (up.group, down.group)
        return _experts_in_torch(x_TD, edges, matrices, groups, activation, rows)
    matrices = up.matrices, down.matrices
    return _experts_with(engine.open_library(), x_TD, edges, matrices, down.shape, activation, as_bytes)


def _experts_with(
    lib: ctypes.CDLL,
    x_TD: Tensor,
    edges: Edges,
    matrices: tuple[ctypes.Array[Matrix], ctypes.Array[Matrix]],
    down_shape: tuple[int, ...],
    activation: Activation,
    as_bytes: int,
) -> Tensor:
    layer, held = engine.layer_of(_padded(x_TD), edges, down_shape, activation)
    layer.up, layer.down = map(ctypes.addressof, matrices)
    y_TD = torch.empty_like(x_TD, memory_format=torch.contiguous_format)
    status = lib.moeforge_quantised(ctypes.byref(layer), as_bytes, engine.address(y_TD))
    del held
    engine.check(status)
    return y_TD


def linear_quantised(x_TD: Tensor, weight: PackedWeight, rows: RowType = ROWS) -> Tensor:
    """[..., in] times one quantised matrix [out, in], without gradients; returns bf16 [..., out]."""
    if len(weight.shape) != 2 or x_TD.shape[-1] != weight.shape[1] or x_TD.device != weight.device:
        raise UserError(f"rows of {x_TD.shape[-1]} values do not fit a quantised matrix {weight.shape}")
    as_bytes = _as_bytes(rows)
    x_TD = x_TD.detach().to(torch.bfloat16)
    if x_TD.device.type != "cpu" or engine.missing() is not None:
        return F.linear(_rounded(x_TD, weight.group, rows), weight.dequantise()).to(torch.bfloat16)
    return _linear_with(engine.open_library(), x_TD, weight, as_bytes)


def _linear_with(lib: ctypes.CDLL, x_TD: Tensor, weight: PackedWeight, as_bytes: int) -> Tensor:
    x_NK = _padded(x_TD.flatten(0, -2))
    y_TD = x_NK.new_empty(len(x_NK), weight.shape[0])
    sizes = ctypes.c_int64(len(x_NK)), as_bytes, torch.get_num_threads()
    engine.check(
        lib.moeforge_quantised_linear(ctypes.byref(weight.matrices), engine.address(x_NK), *sizes, engine.address(y_TD))
    )
    return y_TD.view(*x_TD.shape[:-1], weight.shape[0])


def _as_bytes(rows: RowType) -> int:
    if rows not in get_args(RowType):
        raise UserError(f"rows are multiplied as one of {', '.join(get_args(RowType))}, not as {rows}")
    return int(rows == "int8")


def _experts_in_torch(
    x_TD: Tensor,
    edges: Edges,
    matrices: tuple[Tensor, Tensor],
    groups: tuple[int, int],
    activation: Activation,
    rows: RowType,
) -> Tensor:
    """What the C++ computes, in float32: the hidden values too go through bf16 before they are rounded."""
    y_TD, (up_EHD, down_EDH) = torch.zeros_like(x_TD, dtype=torch.float32), matrices
    x_TD = _rounded(x_TD, groups[0], rows)
    for expert, low, high in segments(edges.ends):
        token = edges.token[low:high]
        hidden_NH = activate(F.linear(x_TD[token], up_EHD[expert]), activation).to(torch.bfloat16)
        rows_ND = F.linear(_rounded(hidden_NH, groups[1], rows), down_EDH[expert])
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


def wrong(lib: ctypes.CDLL) -> str | None:
    """What a new library computes of weights in few bits that torch does not, or None: packing, a matrix of each
    format, and experts of all formats in one call, ragged sizes, with both types of rows."""
    generator = torch.Generator().manual_seed(0)
    shapes = (23, 200), (70,), (len(FORMATS), 42, 200), (len(FORMATS), 200, 21)
    x_TD, weight_N, *drawn = (torch.randn(shape, generator=generator, dtype=torch.float32) for shape in shapes)
    ends_E = torch.tensor([20, 40, 40, 55, 70], dtype=torch.int32)
    x_TD, edges = x_TD.bfloat16(), EdgeTensors(torch.arange(70) % 23, weight_N, ends_E, 23)
    for group in GROUPS:
        stacks = [
            [_packed_in_torch(own, bits, group) for own, bits in zip(wide, FORMATS, strict=True)] for wide in drawn
        ]
        for own, bits, made in zip(drawn[0], FORMATS, stacks[0], strict=True):
            if bits in (8, 4) and not _same(_pack_with(lib, own, bits, group), (made.packed, made.scales)):
                return f"packing to {bits} bits in groups of {group}"
        up, down = (array([w.matrices[0] for w in stack]) for stack in stacks)
        up_EHD, down_EDH = (torch.stack([w.dequantise() for w in stack]) for stack in stacks)
        for rows in get_args(RowType):
            where = f"in groups of {group} with rows in {rows}"
            for bits, made in zip(FORMATS, stacks[0], strict=True):
                exact = F.linear(_rounded(x_TD, group, rows), made.dequantise())
                if _far(_linear_with(lib, x_TD, made, _as_bytes(rows)), exact):
                    return f"a matrix of {bits} bits {where}"
            ours = _experts_with(lib, x_TD, edges, (up, down), tuple(drawn[1].shape), "swiglu", _as_bytes(rows))
            if _far(ours, _experts_in_torch(x_TD, edges, (up_EHD, down_EDH), (group, group), "swiglu", rows)):
                return f"experts in few bits {where}"
    return None


def _packed_in_torch(weight: Tensor, bits: Bits, group: int) -> QuantisedWeight:
    return QuantisedWeight(*_pack_in_torch(weight, bits, group), bits, group, tuple(weight.shape))


def _same(found: tuple[Tensor, ...] | None, expected: tuple[Tensor, ...]) -> bool:
    return found is not None and all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def _far(found: Tensor, exact: Tensor) -> bool:
    """NaN is far too."""
    return not bool((found.float() - exact.float()).norm() <= 0.02 * exact.float().norm())
