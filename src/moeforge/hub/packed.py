"""Weights that lie on disk in fewer bits, their scales in a second tensor: read as the bfloat16 they stand for, and
for the experts written so (``pack-quantized`` of compressed-tensors, which transformers and vLLM open)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moeforge.errors import UserError
from moeforge.hub.layout import Names, Piece, plan

METHODS = ("mxfp4", "fp8", "compressed-tensors")
"""What ``quantization_config`` may name."""
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Of the lower three of four bits; the fourth is the sign."""
BLOCK = (128, 128)
GROUPS = (128, 64, 32)
"""Inputs that share a scale, as kernels for 4 bits know them."""


class Packed(NamedTuple):
    """One weight in two tensors."""

    values: str
    scales: str
    shape: torch.Size
    """Of the weight."""
    unpack: Callable[[Tensor, Tensor], Tensor]
    beside: tuple[str, ...] = ()
    """Tensors that say what the shapes of these two say already."""


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
        elif name.endswith(".weight_packed"):
            weight, scales = name.removesuffix("_packed"), f"{name.removesuffix('_packed')}_scale"
            bits, group = _whole_numbers(settings)
            width = shape[-1] * 32 // bits
            fits = len(shape) == 2 and shapes.get(scales) == (shape[0], width // group if group else 1)
            types, kind = {torch.int32}, f"{bits} bits, packed"
            unpack, beside = partial(from_int32, bits=bits), (f"{weight}_shape",) * (f"{weight}_shape" in shapes)
            packed = Packed(name, scales, torch.Size((shape[0], width)), unpack, beside)
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


def _whole_numbers(settings: Any) -> tuple[int, int | None]:
    """(bits, inputs that share a scale, or None for a whole row) of a ``quantization_config`` of compressed-tensors.
    Raises ValueError for weights in another form than ``to_int32`` writes."""
    groups = [*(settings or {}).get("config_groups", {}).values()]
    weights = groups[0]["weights"] if len(groups) == 1 else {}
    form = tuple(weights.get(name) for name in ("num_bits", "type", "symmetric", "strategy"))
    if form not in {(bits, "int", True, strategy) for bits in (4, 8) for strategy in ("group", "channel")}:
        raise ValueError("of compressed-tensors, one group of symmetric whole numbers of 4 or 8 bits is read")
    return weights["num_bits"], weights["group_size"] if weights["strategy"] == "group" else None


def from_int32(values: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Codes plus half their range, 32 / bits to a word [R, words] int32, lowest bits first, and one scale [R, groups]
    for each group of a row -> [R, C] bfloat16, to which transformers rounds the products too."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    codes = ((values[..., None] >> shifts) & (1 << bits) - 1).flatten(-2) - (1 << bits - 1)
    return (codes.unflatten(-1, (scales.shape[-1], -1)) * scales.float()[..., None]).flatten(-2).bfloat16()


def to_int32(weight: Tensor, bits: int, group: int | None) -> tuple[Tensor, Tensor]:
    """[R, C] -> what ``from_int32`` reads, rounded to nearest, the scale of a group (None: of a row) its largest
    magnitude by the largest code, in bfloat16. Raises ValueError where groups do not fit."""
    if weight.shape[-1] % (group or 32 // bits):
        raise ValueError(f"rows of {weight.shape[-1]} values cannot be cut into groups of {group or 32 // bits}")
    largest = (1 << bits - 1) - 1
    grouped = weight.float().unflatten(-1, (-1, group or weight.shape[-1]))
    scales = (grouped.abs().amax(-1) / largest).bfloat16()
    codes = (grouped / scales.float()[..., None]).nan_to_num(0).round().clamp(-largest, largest).flatten(-2)
    return words_of(codes, bits), scales


def words_of(codes: Tensor, bits: int) -> Tensor:
    """Whole numbers [R, C] -> [R, words] int32."""
    words = (codes.to(torch.int64) + (1 << bits - 1)).unflatten(-1, (-1, 32 // bits)) << torch.arange(0, 32, bits)
    return words.sum(-1).to(torch.int32)


@dataclass(frozen=True)
class PackedExperts:
    """The matrices of a model's experts as they lie in a folder, and what its config.json says of them."""

    settings: dict[str, Any]
    """The ``quantization_config``."""
    tensors: dict[str, Tensor]
    of: set[str]
    """Names of the weights that they stand for."""


def matrices_of(model: nn.Module, names: Names) -> list[Piece]:
    """The experts' matrices as a family's files have them. Raises UserError where there are none, or where they lie in
    one tensor, which the format does not know."""
    own = model.state_dict()
    found = [piece for piece in plan(model, names) if piece.expert is not None and own[piece.parameter].dim() == 3]
    if not found:
        raise UserError("there are no experts with files' tensors of their own: compressed-tensors packs only those")
    return found


@torch.no_grad()
def pack_experts(model: nn.Module, names: Names, bits: int) -> PackedExperts:
    """Rounds the experts of a model in place, to 4 bits in groups of 128, 64 or 32, the first that fits all, or to 8 in
    whole rows: W4A16 and W8A16.

    ``names`` are its family's. Raises UserError, before anything is rounded, where that would round nothing or a matrix
    does not fit, and for families that store their experts in one tensor.
    """
    own, matrices = model.state_dict(), matrices_of(model, names)
    widths = {piece.as_theirs(own[piece.parameter]).shape[-1] for piece in matrices}
    fitting = [group for group in GROUPS if not any(width % group for width in widths)]
    group = (fitting or GROUPS)[0] if bits == 4 else None
    try:
        words = {piece.name: to_int32(piece.as_theirs(own[piece.parameter]), bits, group) for piece in matrices}
    except ValueError as error:
        raise UserError(f"the experts do not go into {bits} bits: {error}") from error
    return packed_experts(model, names, words, bits, group)


@torch.no_grad()
def packed_experts(
    model: nn.Module, names: Names, words: Mapping[str, tuple[Tensor, Tensor]], bits: int, group: int | None
) -> PackedExperts:
    """``words`` and scales of every expert's matrix, by its name, as a folder has them; the model gets what they stand
    for."""
    own, tensors = model.state_dict(), dict[str, Tensor]()
    for piece in matrices_of(model, names):
        values, scales = words[piece.name]
        rounded = from_int32(values, scales, bits)
        tensors |= {f"{piece.name}_packed": values, f"{piece.name}_scale": scales}
        tensors[f"{piece.name}_shape"] = torch.tensor(rounded.shape)
        piece.of_ours(own[piece.parameter]).copy_(piece.as_ours(rounded))
    linear = [piece.name for piece in plan(model, names) if own[piece.parameter].dim() == 2]
    linear += names["output.weight"][0].parts  # a module of its own in transformers where it is tied as well
    whole = {name.removesuffix(".weight") for name in linear}
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group" if group else "channel"}
    weights |= {"group_size": group, "dynamic": False}
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    settings = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme},
        "ignore": sorted(whole),
    }
    return PackedExperts(settings, tensors, {*words})
