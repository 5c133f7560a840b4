"""A plan as a folder of the model's family, which transformers opens and computes the same with: experts dropped,
merged ones written out for each that they serve, and all of them in 16 bits or in one format of compressed-tensors."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from moeforge.compress.rows import Reading
from moeforge.compress.source import ours
from moeforge.compress.stream import CLASSES, Tell, kind_of, silent
from moeforge.compress.write import Job, Made
from moeforge.errors import UserError
from moeforge.hub.folder import open_tokenizer
from moeforge.hub.layout import Piece
from moeforge.hub.layout import plan as pieces_of
from moeforge.hub.packed import PackedExperts, matrices_of, packed_experts, words_of
from moeforge.hub.pretrained import Pretrained, contents, family_that_fits
from moeforge.hub.store import Format
from moeforge.hub.verify import check_opens_packed, verify
from moeforge.hub.whole import write_whole
from moeforge.kernels.mixed import Part
from moeforge.kernels.native.formats import unpack
from moeforge.kernels.native.quantised import QuantisedWeight
from moeforge.models import Decoder
from moeforge.models.init import without_memory
from moeforge.models.weights import EXPERTS

FORMATS = (Format(8, 128), Format(4, 128), Format(4, 32))
"""What experts are packed in for others: words of whole numbers, a bfloat16 scale for each group."""


def record_bytes(format: Format, shapes: Sequence[tuple[int, int]]) -> int:
    """Of an expert whose matrices have these shapes, as other folders hold it."""
    if format.bits == 16:
        return sum(2 * rows * width for rows, width in shapes)
    assert isinstance(format.bits, int) and format.group is not None
    return sum(rows * width * format.bits // 8 + 2 * rows * (width // format.group) + 16 for rows, width in shapes)


class Export:
    """One plan for one model; what ``Job`` is to our own folders."""

    def __init__(self, job: Job) -> None:
        """Raises UserError where transformers is missing, or would not open such a folder."""
        check_opens_packed()
        self.job, self.plan, model = job, job.plan, ours(job.streamed, "--to hf").model
        self.origin = model.origin if isinstance(model, Pretrained) else None
        self.format = _one_format(job)
        family = self.origin.family if self.origin else family_that_fits(job.config)
        if family is None or not family.in_transformers:
            raise UserError("transformers has no class for this model as the plan leaves it: leave --to hf out")
        family.write(job.config, self.origin.config_json if self.origin else None)
        self.family = family
        with without_memory():
            self.model = Decoder(job.config).eval()
        if self.packs:
            self._check_groups()

    @property
    def packs(self) -> bool:
        """Whether experts are in fewer than 16 bits."""
        return self.format.bits != 16

    def _check_groups(self) -> None:
        meta = self.model.state_dict()
        for piece in matrices_of(self.model, self.family.names):
            width = piece.of_ours(meta[piece.parameter]).shape[-1]
            if width % (self.format.group or 1):
                raise UserError(
                    f"{piece.name}: rows of {width} values cannot be cut into groups of {self.format.group}"
                )

    def bytes_by_class(self) -> dict[str, int]:
        """Of the weight files, as ``Job.bytes_by_class``; their headers to a few bytes."""
        meta, header = self.model.state_dict(), dict[str, object]()
        sums = dict.fromkeys(CLASSES, 0)
        for piece in pieces_of(self.model, self.family.names):
            shape = piece.as_theirs(meta[piece.parameter]).shape
            kind = kind_of(piece.parameter, tuple(shape))
            dtype = torch.bfloat16 if self._is_expert(piece) else self.job.dtype(piece.parameter)
            size = shape.numel() * dtype.itemsize
            names = [piece.name]
            if self.packs and self._is_expert(piece):
                size = record_bytes(self.format, [(shape[0], shape[1])])
                names = [f"{piece.name}_{part}" for part in ("packed", "scale", "shape")]
            sums[kind] += size
            header |= {name: {"dtype": "BF16", "shape": [*shape], "data_offsets": [10**9, 10**9]} for name in names}
        for name in self.origin.unused if self.origin and self.origin.shards else ():
            assert self.origin is not None and self.origin.shards is not None
            sums[kind_of(name, tuple(self.origin.shards.shapes[name]))] += self.origin.shards.nbytes(name)
        sums["other"] += len(json.dumps(header, separators=(",", ":")))
        return sums

    def _is_expert(self, piece: Piece) -> bool:
        return ".banks." in piece.parameter and piece.parameter.endswith(EXPERTS)

    def run(self, folder: Path, tell: Tell = silent) -> str:
        """Writes ``folder``, whole or not at all, and says how it was found to open.

        The whole model is in memory. Raises UserError when it cannot be written, or opens as another model.
        """
        packed = self._fill(tell)
        source = self.job.streamed.folder
        tokenizer = open_tokenizer(source) if (source / "tokenizer.json").exists() else None
        fill, said = contents(self.model, folder.name, self.family, self.origin, tokenizer, experts=packed), ""

        def whole(fresh: Path) -> None:
            nonlocal said
            fill(fresh)
            said = verify(fresh, self.model)
            self.plan.save(fresh / "plan.json")

        write_whole(folder, whole)
        return f"{self.family.model_type}, {said}"

    def _fill(self, tell: Tell) -> PackedExperts | None:
        """Gives the model its weights, part by part; those of experts in words where they are packed."""
        job, meta, bits = self.job, self.model.state_dict(), self.format.bits
        reading = Reading(job.streamed, job.text) if job.reads else None
        state, words, scales = dict[str, Tensor](), dict[str, Tensor](), dict[str, Tensor]()
        for part in job.parts:
            banks, others = job.made(part, reading)
            state |= others
            for name, experts, matrix in _matrices(banks):
                count, (rows, width) = len(meta[name]), matrix.shape[1:]
                state.setdefault(name, torch.empty(count, rows, width, dtype=torch.bfloat16))
                if isinstance(matrix, QuantisedWeight) and isinstance(bits, int):
                    codes = unpack(matrix.packed, matrix.bits)[..., :width]
                    sizes = width * bits // 32, width // matrix.group
                    words.setdefault(name, torch.empty(count, rows, sizes[0], dtype=torch.int32))
                    scales.setdefault(name, torch.empty(count, rows, sizes[1], dtype=torch.bfloat16))
                    words[name][experts] = words_of(codes, bits)
                    scales[name][experts] = matrix.scales[..., : sizes[1]].bfloat16()
                elif isinstance(matrix, Tensor):
                    state[name][experts] = matrix
            tell(part)
        self.model.load_state_dict(state, assign=True)
        if not words:
            return None
        assert isinstance(bits, int)
        found = {
            piece.name: (piece.of_ours(words[piece.parameter]), piece.of_ours(scales[piece.parameter]))
            for piece in matrices_of(self.model, self.family.names)
        }
        return packed_experts(self.model, self.family.names, found, bits, self.format.group)


def _matrices(banks: Mapping[str, Sequence[Made]]) -> Iterator[tuple[str, list[int], Part]]:
    """Every matrix as it is made: its parameter, and the experts that have it."""
    for bank, formats in banks.items():
        for made in formats:
            for experts, matrices in zip(made.records, made.parts, strict=True):
                yield from ((f"{bank}.{name}", experts, matrix) for name, matrix in zip(EXPERTS, matrices, strict=True))


def _one_format(job: Job) -> Format:
    """Of all experts. Raises UserError where there are several, or one that other folders do not know."""
    found = {row.format for row in job.plan.rows if row.action == "keep"}
    names = ", ".join(sorted(format.name for format in found))
    if len(found) > 1:
        raise UserError(
            f"transformers reads the experts of all layers by one scheme, the plan has {names}: leave --to hf out"
        )
    (format,) = found
    if format.bits not in (16, 8, 4):
        raise UserError(f"compressed-tensors packs experts in 8 or 4 bits, not as {names}: leave --to hf out")
    return format
