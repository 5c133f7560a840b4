"""Packed experts on disk: expert after expert, each from the start of a page, read by mapping the file.

``packed_experts`` in config.json lists the formats of every bank (``Part``). Each is one uint8 tensor of the bank,
``<bank>.packed.<format>`` [records, bytes]. A record holds what gate and up are made of, then down, every tensor from a
multiple of 64 bytes on. Records of 64 KiB and more are whole pages from the start of one, so that an expert is read by
touching its own pages alone. Nothing is copied on opening but what stays in 16 bits.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from moeforge.errors import UserError
from moeforge.hub.shards import DTYPES, Shards
from moeforge.kernels.activation import is_gated
from moeforge.kernels.mixed import MixedWeight, Part
from moeforge.kernels.native.coded import ZEROS, CodedWeight, capacity
from moeforge.kernels.native.formats import BLOCK, FORMATS
from moeforge.kernels.native.quantised import PackedWeight, QuantisedWeight
from moeforge.kernels.native.vectors import LENGTH, VECTORS, VectorWeight
from moeforge.models import Decoder, ModelConfig
from moeforge.models.weights import EXPERTS
from moeforge.moe.bank.mlp import MLPBank, MLPExperts

PACKED = "packed_experts"
"""The field of config.json, and of its ``quantization_config`` in folders for transformers."""
METHOD = "moeforge"
"""What ``quantization_config`` calls it there."""
PAGE, LINE = 4096, 64
LARGE = 64 << 10
"""Bytes of a record from which on it is padded to whole pages."""
Bits = Literal[16, 8, 4, 3, 2, "vector", "ternary", "coded"]
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Format(NamedTuple):
    """How experts are kept; 16 bits are bfloat16, without groups; ``vector`` are vectors of a codebook
    (``VectorWeight``), ``coded`` is less than a bit (``CodedWeight``), in records for as many words as the most that a
    matrix may have."""

    bits: Bits
    group: int | None

    @property
    def name(self) -> str:
        """``4x32``: of a tensor in a file."""
        return f"{self.bits}x{self.group}" if self.group else f"{self.bits}"

    def tensors(self, rows: int, width: int) -> list[tuple[torch.dtype, tuple[int, int]]]:
        """What one matrix [rows, width] is kept in."""
        if self.bits == "coded":
            return [(torch.int16, (1, capacity(rows, width))), (torch.int32, (1, rows)), (torch.float16, (1, rows))]
        if self.bits == 16 or self.group is None:
            return [(torch.bfloat16, (rows, width))]
        blocks = -(-width // BLOCK)
        scales = torch.float16, (rows, blocks * BLOCK // self.group)
        if self.bits == "vector":
            return [(torch.uint8, (rows, blocks * BLOCK // LENGTH)), scales, (torch.int16, (1, VECTORS))]
        codes = torch.int8 if self.bits == 8 else torch.uint8
        return [(codes, (rows, blocks * FORMATS[self.bits].block)), scales]


class Section(NamedTuple):
    """A tensor inside a record."""

    start: int
    end: int
    dtype: torch.dtype
    shape: tuple[int, int]


def record(format: Format, shapes: Sequence[tuple[int, int]]) -> tuple[list[Section], int]:
    """Where the tensors of matrices of these shapes lie in an expert's record, and its bytes."""
    sections, end = [], 0
    for dtype, shape in (tensor for matrix in shapes for tensor in format.tensors(*matrix)):
        start = end + -end % LINE
        end = start + shape[0] * shape[1] * dtype.itemsize
        sections.append(Section(start, end, dtype, shape))
    return sections, end + -end % (PAGE if end >= LARGE else LINE)


def shapes_of(bank: MLPExperts, d_model: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Of an expert's two matrices."""
    return (bank.d_expert * (1 + is_gated(bank.activation)), d_model), (d_model, bank.d_expert)


def packed_bytes(config: ModelConfig, packed: Mapping[str, Any]) -> Iterator[tuple[int, int, int, int]]:
    """Of each bank that lies packed: its layer, the weights of its experts, the bytes of their records, and the bytes
    if those that several share were counted for each."""
    for name, parts in packed.items():
        _, layer, _, _, index = name.split(".")
        moe = config.all_layers[int(layer)].moe
        bank = moe.experts[int(index)] if moe else None
        assert isinstance(bank, MLPExperts)
        shapes, own, served = shapes_of(bank, config.d_model), 0, 0
        for format, rows in formats(parts):
            size = record(format, shapes)[1]
            own, served = own + size * len(rows), served + size * sum(map(len, rows))
        yield int(layer), bank.num_experts * sum(a * b for a, b in shapes), own, served


def to_record(format: Format, matrices: Sequence[Part]) -> Tensor:
    """Stacks [n, out, in] of the same n experts -> [n, bytes] uint8. Raises UserError for coded ones of more words than
    a record has."""
    sections, size = record(format, [(part.shape[1], part.shape[2]) for part in matrices])
    made = torch.zeros(matrices[0].shape[0], size, dtype=torch.uint8)
    tensors = [tensor for part in matrices for tensor in _tensors(part)]
    for section, tensor in zip(sections, tensors, strict=True):
        raw = tensor.to(section.dtype).contiguous().flatten(1).view(torch.uint8)
        if raw.shape[1] > section.end - section.start:
            raise UserError(
                f"an expert takes {raw.shape[1]} bytes of words, its record has {section.end - section.start}"
            )
        made[:, section.start : section.start + raw.shape[1]] = raw
    return made


def _tensors(part: Part) -> list[Tensor]:
    if isinstance(part, CodedWeight):
        if part.zeros != ZEROS:
            raise UserError(f"coded experts are kept in words of the dictionary for {ZEROS}, not for {part.zeros}")
        return [part.words, part.ends, part.scales]
    if isinstance(part, VectorWeight):
        return [part.packed, part.scales, part.codebook]
    return [part] if isinstance(part, Tensor) else [part.packed, part.scales]


def from_record(format: Format, raw: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Part]:
    """[n, bytes] uint8 -> the stacks, views of it but for 16 bits. Raises ValueError for another number of bytes."""
    sections, size = record(format, shapes)
    if raw.dtype != torch.uint8 or raw.shape[1:] != (size,):
        raise ValueError(f"records of {list(raw.shape[1:])} {raw.dtype} where {format.name} has {size} bytes")
    tensors = [raw[:, s.start : s.end].view(s.dtype).unflatten(1, s.shape) for s in sections]
    count = len(raw)
    if format.bits == "coded":
        found = [tensor.flatten(1) for tensor in tensors]
        matrices = zip(found[::3], found[1::3], found[2::3], shapes, strict=True)
        return [_checked(CodedWeight(w, e, s, ZEROS, (count, *shape))) for w, e, s, shape in matrices]
    if format.bits == 16 or format.group is None:
        return [tensor.contiguous() for tensor in tensors]
    bits, group = format.bits, format.group
    if bits == "vector":
        triples = zip(tensors[::3], tensors[1::3], tensors[2::3], shapes, strict=True)
        return [VectorWeight(p, s, book.flatten(1), group, (count, *shape)) for p, s, book, shape in triples]
    pairs = zip(tensors[::2], tensors[1::2], shapes, strict=True)
    return [QuantisedWeight(packed, scales, bits, group, (count, *shape)) for packed, scales, shape in pairs]


def _checked(part: CodedWeight) -> CodedWeight:
    """Raises ValueError where rows would end outside of their words, which the kernel does not ask."""
    if bool((part.ends.diff(dim=-1, prepend=torch.zeros_like(part.ends[..., :1])) < 0).any()) or (
        int(part.ends.max()) > part.words.shape[-1]
    ):
        raise ValueError("rows of coded experts end outside of their words")
    return part


Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Type and shape of tensors by name."""


def header(layout: Layout) -> tuple[list[str], bytes]:
    """The tensors in the order in which they lie, and what comes before them: a safetensors header of whole pages."""
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (dtype, shape) in layout.items()}
    order = sorted(layout, key=lambda name: (".packed." not in name, sizes[name] % PAGE > 0, -layout[name][0].itemsize))
    tree: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        offsets = [end, end := end + sizes[name]]
        tree[name] = {"dtype": NAMES[layout[name][0]], "shape": [*layout[name][1]], "data_offsets": offsets}
    text = json.dumps(tree, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % PAGE)
    return order, len(text).to_bytes(8, "little") + text


def write_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """One safetensors file, packed experts first."""
    order, start = header({name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()})
    with path.open("wb") as file:
        file.write(start)
        for name in order:
            file.write(tensors[name].detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())


def hold_packed(model: Decoder, packed: Mapping[str, Any], shards: Shards) -> set[str]:
    """Gives banks of a model without weights the experts that lie packed; returns the tensors that were taken.

    Raises UserError where they do not fit the model.
    """
    taken: set[str] = set()
    for name, parts in packed.items():
        try:
            bank = model.get_submodule(name)
            assert isinstance(bank, MLPBank), "no bank of MLPs"
            if bank.config.num_experts != sum(len(row) for _, rows in formats(parts) for row in rows):
                raise ValueError(f"the model has {bank.config.num_experts}")
            taken |= tensors_of(name, parts)
            shapes = shapes_of(bank.config, bank.down_proj.shape[1])
            for parameter, weight in zip(EXPERTS, read_packed(name, parts, shards, shapes), strict=True):
                delattr(bank, parameter)
                setattr(bank, parameter, weight)
        except (AttributeError, AssertionError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{shards.folder}: the packed experts of {name} do not fit: {error!r}") from error
    return taken


def formats(parts: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Format, list[list[int]]]]:
    """Each format of a bank as config.json has it, with the experts that each record serves."""
    return ((Format(part["bits"], part["group"]), part["rows"]) for part in parts)


def tensors_of(name: str, parts: Sequence[Mapping[str, Any]]) -> set[str]:
    """What a bank's experts lie in."""
    return {f"{name}.packed.{format.name}" for format, _ in formats(parts)}


def read_packed(
    name: str, parts: Sequence[Mapping[str, Any]], shards: Shards, shapes: tuple[tuple[int, int], tuple[int, int]]
) -> Iterator[PackedWeight]:
    """Up and down of a bank's experts, mapped. Raises KeyError, TypeError or ValueError where they do not fit."""
    found, kept = [], list(formats(parts))
    place = {expert: (p, r) for p, (_, rows) in enumerate(kept) for r, row in enumerate(rows) for expert in row}
    if sorted(place) != list(range(len(place))):
        raise ValueError(f"they are experts {sorted(place)}")
    for format, rows in kept:
        raw = shards.get(f"{name}.packed.{format.name}")
        if len(raw) != len(rows):
            raise ValueError(f"{len(raw)} records for {len(rows)} rows")
        found.append(from_record(format, raw, shapes))
    where = tuple(place[expert] for expert in range(len(place)))
    whole = len(found) == 1 and not isinstance(found[0][0], Tensor) and where == tuple((0, e) for e in place)
    for stacks in zip(*found, strict=True):
        yield stacks[0] if whole else MixedWeight(stacks, where)
