"""A plan carried out: layer by layer into a folder that opens like any other. An interrupted run goes on."""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from moeforge.compress.merge import merge
from moeforge.compress.plan import Plan, Row, can_pack
from moeforge.compress.profile import Profile, Seen
from moeforge.compress.rounding import expert_to_format, to_format
from moeforge.compress.rows import Read, Reading, tokens_of
from moeforge.compress.source import Source
from moeforge.compress.stream import CLASSES, Tell, silent
from moeforge.config import Tree
from moeforge.data.packing import Batch
from moeforge.errors import UserError
from moeforge.hub.pretrained import carry_files
from moeforge.hub.shards import SAFE
from moeforge.hub.store import Format, Layout, header, record, to_record, write_file
from moeforge.hub.whole import replace_folder
from moeforge.kernels.mixed import Part
from moeforge.models.weights import EXPERTS


def parts_of(rows: Mapping[int, Row]) -> list[tuple[Format, list[list[int]]]]:
    """The formats of a bank's experts, each with its records: those kept, and who is merged into them.

    ``rows`` are by the expert's number in the bank; the numbers that come out leave no gap for dropped ones.
    """
    left = sorted(expert for expert, row in rows.items() if row.action != "drop")
    number = {expert: at for at, expert in enumerate(left)}
    found: dict[Format, list[list[int]]] = {}
    for expert in left:
        if rows[expert].action == "keep":
            joined = [other for other in left if rows[other].into == rows[expert].expert]
            found.setdefault(rows[expert].format, []).append([number[expert], *(number[other] for other in joined)])
    return list(found.items())


class Made(NamedTuple):
    """The experts of a bank that share a format."""

    format: Format
    records: list[list[int]]
    """Whom each serves, in numbers that leave no gap for dropped ones."""
    parts: Iterator[Sequence[Part]]
    """Up and down of each, [1, out, in], made one after the other."""


class Job:
    """One plan for one model."""

    def __init__(
        self, streamed: Source, plan: Plan, profile: Profile | None = None, text: Sequence[Batch] = ()
    ) -> None:
        """``text`` is what experts are rounded for. Raises UserError for a plan that is not one for this model."""
        streamed.check(plan)
        plan.check(streamed.config)
        if plan.rounding == "gptq" and not text:
            raise UserError("rounding: gptq rounds experts for a text, and there is none: nearest needs no text")
        self.streamed, self.plan, self.profile, self.text = streamed, plan, profile, text
        self.config, self.stored = plan.config(streamed.config), streamed.stored

    @property
    def reads(self) -> bool:
        """Whether some experts are rounded for the text."""
        return self.plan.rounding == "gptq" and any(row.bits not in (16, 8) for row in self.plan.rows)

    def file(self, layer: int | None) -> str:
        """Of a layer's tensors, or of those outside."""
        return f"model-layer-{layer:05}.safetensors" if layer is not None else "model-outside.safetensors"

    def dtype(self, name: str) -> torch.dtype:
        """What a tensor that is not packed is written as."""
        stored = self.stored[name][0]
        narrowed = self.plan.dense == "bf16" and stored == torch.float32 and self.streamed.narrows(name)
        return torch.bfloat16 if narrowed else stored

    def banks(self, layer: int) -> list[tuple[str, int, int, list[tuple[Format, list[list[int]]]]]]:
        """Of each bank that is packed: its name and number, that of its first expert, its formats and records."""
        config, rows, found = self.streamed.config.all_layers[layer], self.plan.of_layer(layer), []
        for index, span in enumerate(config.moe.spans if config.moe else ()):
            if config.moe and can_pack(config.moe.experts[index], config):
                own = {expert - span.start: rows[expert] for expert in span}
                found.append((self.streamed.bank(layer, index), index, span.start, parts_of(own)))
        return found

    def layout(self, layer: int | None) -> Layout:
        """The tensors of a file."""
        names = self.streamed.names(layer)
        found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        packed = self.banks(layer) if layer is not None else []
        for bank, _, _, parts in packed:
            shapes = self._shapes(bank)
            for format, records in parts:
                found[f"{bank}.packed.{format.name}"] = torch.uint8, (len(records), record(format, shapes)[1])
            names = [name for name in names if not name.startswith(f"{bank}.")]
        for name in names:
            shape, left = self.stored[name][1], self._left(name)
            found[name] = self.dtype(name), shape if left is None else (len(left), *shape[1:])
        return found

    def _left(self, name: str) -> list[int] | None:
        """Of a tensor that has a row for each expert of a layer, the rows that stay; None where all do."""
        shape, layer = self.stored[name][1], self.streamed.router_of(name)
        rows = self.plan.of_layer(layer) if shape and layer is not None else {}
        gone = {expert for expert, row in rows.items() if row.action == "drop"}
        return [expert for expert in range(shape[0]) if expert not in gone] if gone else None

    def _other(self, name: str, tensor: Tensor) -> Tensor:
        left = self._left(name)
        return (tensor if left is None else tensor[left]).to(self.dtype(name))

    def _shapes(self, bank: str) -> tuple[tuple[int, int], tuple[int, int]]:
        up, down = (self.stored[f"{bank}.{name}"][1] for name in EXPERTS)
        return (up[1], up[2]), (down[1], down[2])

    @property
    def parts(self) -> list[int | None]:
        """What is written one by one: what lies outside of layers, then each layer."""
        return [part for part in (None, *range(self.config.num_layers)) if self.streamed.names(part)]

    def bytes_by_class(self) -> dict[str, int]:
        """Of the weight files: experts, router, embeddings, dense and other; their headers are ``other``."""
        sums = dict.fromkeys(CLASSES, 0)
        for part in self.parts:
            layout = self.layout(part)
            sums["other"] += len(header(layout)[1])
            for name, (dtype, shape) in layout.items():
                sums[self.streamed.kind(name, shape)] += torch.Size(shape).numel() * dtype.itemsize
        return sums

    @property
    def fingerprint(self) -> str:
        """Of the model's files, the plan, the text and what calibration saw of it: what an interrupted run has to have
        in common."""
        files = sorted(self.streamed.folder.glob("*"))
        facts = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]
        seen = self.profile.fingerprint if self.profile else None
        text = [hashlib.sha256(batch.input_ids.numpy().tobytes()).hexdigest() for batch in self.text]
        return hashlib.sha256(json.dumps([facts, self.plan.model_dump(), seen, text]).encode()).hexdigest()

    def tensors(self, layer: int | None, reading: Reading | None = None) -> dict[str, Tensor]:
        """Of one file, made; ``reading`` is where experts are rounded for a text."""
        banks, others = self.made(layer, reading)
        packed = {
            f"{bank}.packed.{some.format.name}": torch.cat([to_record(some.format, parts) for parts in some.parts])
            for bank, formats in banks.items()
            for some in formats
        }
        return packed | others

    def made(
        self, layer: int | None, reading: Reading | None = None
    ) -> tuple[dict[str, list[Made]], dict[str, Tensor]]:
        """Of one file: the experts of each bank that is packed, and all other tensors."""
        own = self.streamed.read(layer)
        made = {} if layer is None else self._banks(layer, own, reading)
        return made, {name: self._other(name, tensor) for name, tensor in own.items()}

    def _banks(self, layer: int, own: dict[str, Tensor], reading: Reading | None) -> dict[str, list[Made]]:
        """The experts of a layer's banks, whose tensors leave ``own``."""
        seen = self.profile.layers.get(layer) if self.profile else None
        made: dict[str, list[Made]] = {}
        banks = self.banks(layer)
        read = reading.layer(layer, {bank: at for bank, at, _, _ in banks}) if reading and banks else {}
        for bank, _, first, parts in banks:
            matrices = [own.pop(f"{bank}.{name}") for name in EXPERTS]
            left = [row.expert - first for row in self._rows(layer, first, len(matrices[0])) if row.action != "drop"]
            made[bank] = []
            for format, records in parts:
                members = [[left[number] for number in numbers] for numbers in records]
                experts = self._experts(format, matrices, members, first, seen, read.get(bank))
                made[bank].append(Made(format, records, experts))
        return made

    def _rows(self, layer: int, first: int, count: int) -> list[Row]:
        rows = self.plan.of_layer(layer)
        return [rows[first + expert] for expert in range(count)]

    def _experts(
        self,
        format: Format,
        matrices: list[Tensor],
        members: list[list[int]],
        first: int,
        seen: Seen | None,
        read: Read | None,
    ) -> Iterator[Sequence[Part]]:
        """Up and down of one expert after the other."""
        for group in members:
            experts = [first + expert for expert in group]
            weights = [matrix[group] for matrix in matrices]
            if len(group) > 1:
                use = [1.0] * len(group) if seen is None else seen.count[experts].tolist()
                weights = [merged[None] for merged in merge(weights[0], weights[1], use)]
            if read is not None:
                token_N, weight_N = map(
                    torch.cat, zip(*(tokens_of(read.route, expert) for expert in group), strict=True)
                )
                own = read.rows[token_N]
                yield expert_to_format(weights[0][0], weights[1][0], format, own, weight_N, read.activation)
                continue
            moments: list[Tensor | None] = [None, None]
            if seen is not None:
                width = weights[1].shape[-1]
                # The hidden units of merged experts are in the first one's order.
                moments = [seen.input_moment[experts].mean(0, True), seen.hidden_moment[experts[:1], :width]]
            yield [to_format(w, format, m) for w, m in zip(weights, moments, strict=True)]

    def run(self, folder: Path, tell: Tell = silent) -> str:
        """Writes ``folder``, whole or not at all; what an interrupted run has done of the same job is kept. Says what
        kind of folder it is.

        Raises UserError when it cannot be written.
        """
        fresh = folder.with_name(f".{folder.name}.unfinished")
        try:
            _start(fresh, self.fingerprint)
            reading = Reading(self.streamed, self.text) if self.reads else None
            for part in self.parts:
                path = fresh / self.file(part)
                if not path.exists():
                    half = path.with_suffix(".part")
                    write_file(half, self.tensors(part, reading))
                    half.replace(path)
                tell(part)
            said = self._finish(fresh)
            try:
                self.streamed.check_opens(fresh)
            except UserError:
                shutil.rmtree(fresh)  # the same command would end here again
                raise
            (fresh / "job").unlink()
            replace_folder(fresh, folder)
            return said
        except (OSError, SafetensorError) as error:
            again = f"what is done lies in {fresh.name}: the same command goes on from there"
            raise UserError(f"cannot write {folder}: {error}. The model is untouched; {again}") from error

    def _finish(self, fresh: Path) -> str:
        carry_files(self.streamed.folder, fresh)
        said = self.streamed.write_config(fresh, self.config, self.dtype, self._packed())
        weight_map = {name: self.file(part) for part in self.parts for name in self.layout(part)}
        total = {"total_size": sum(self.bytes_by_class().values())}
        tree = {"metadata": total, "weight_map": dict(sorted(weight_map.items()))}
        (fresh / f"{SAFE}.index.json").write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
        self.plan.save(fresh / "plan.json")
        return said

    def _packed(self) -> Tree:
        found: Tree = {}
        for layer in range(self.config.num_layers):
            for bank, _, _, parts in self.banks(layer):
                found[bank] = [{"bits": f.bits, "group": f.group, "rows": records} for f, records in parts]
        return found


def _start(fresh: Path, fingerprint: str) -> None:
    mark = fresh / "job"
    if not mark.exists() or mark.read_text(encoding="utf-8") != fingerprint:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        mark.write_text(fingerprint, encoding="utf-8")
