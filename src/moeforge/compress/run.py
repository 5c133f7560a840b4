"""The whole of it: text, profile, plan, folder, measurement."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from moeforge.analyze.report import environment
from moeforge.compress import export
from moeforge.compress.dense import How, shares, to_dense
from moeforge.compress.export import Export
from moeforge.compress.measure import Quality, Reference, tokens_per_second
from moeforge.compress.merge import join
from moeforge.compress.page import page
from moeforge.compress.plan import Plan, Rounding, Row, Skip, groups, packable
from moeforge.compress.profile import FORMATS, Profile, profile
from moeforge.compress.prune import drop, since, skip
from moeforge.compress.solve import CODEBOOK, WHOLE, Granularity, solve
from moeforge.compress.source import open_source, ours
from moeforge.compress.stream import Streamed, Tell, silent
from moeforge.compress.write import Job
from moeforge.config import Tree
from moeforge.data.corpora import split
from moeforge.data.packing import Batch, evaluation_batches, pack
from moeforge.errors import UserError
from moeforge.hub import load, save
from moeforge.hub.folder import open_model, open_tokenizer
from moeforge.hub.store import Format, record
from moeforge.hub.whole import write_text
from moeforge.models.weights import EXPERTS

SEARCHED = 6
"""Budgets that are tried, written and measured, for a largest loss."""


Progress = Callable[[str, int], None]
"""What is under way, and how many of the model's layers it has behind it."""


@dataclass(frozen=True)
class Wish:
    """What a user asked for; exactly one of the first four, or ``drop``, ``merge`` or ``skip`` alone."""

    fit: int | None = None
    """Bytes of the weight files."""
    bits_per_weight: float | None = None
    max_loss: float | None = None
    plan: Path | None = None
    drop: float | None = None
    drop_by: str = "output_error"
    base: Path | None = None
    """The model before its tuning, since which ``router_norm`` counts."""
    merge: float | None = None
    skip: float | None = None
    granularity: Granularity = "expert"
    codebooks: bool = False
    """Whether experts may become vectors of a codebook."""


class Task:
    """One model and the texts that it is calibrated and judged by."""

    def __init__(
        self,
        folder: Path,
        tokens: int,
        held_out: int,
        kept_profile: Path | None = None,
        tell: Progress | None = None,
        rounding: Rounding | None = None,
        to_hf: bool = False,
    ) -> None:
        """``rounding`` None: as an own plan says, else gptq. ``to_hf``: a folder for transformers is written."""
        self.rounding, self.to_hf = rounding, to_hf
        self.skip: dict[int, Skip] = {}
        self.formats: tuple[Format, ...] = export.FORMATS if to_hf else FORMATS
        self.streamed, self.tell = open_source(folder), tell
        self.tokens, self.held_out, self.kept_profile = tokens, held_out, kept_profile

    def read_text(self, settings: Any) -> None:
        """Calibration text from the training part of a corpus, held-out text from its validation part.

        ``settings`` are a run's ``data``, ``batch_size`` and ``seq_len``.
        """
        tokenizer = open_tokenizer(self.streamed.folder)
        train, validation = split(settings.data)

        def batches(documents: Any, most: int) -> list[Batch]:
            packed = pack(documents, tokenizer, self.streamed.config.domains)
            return list(evaluation_batches(packed, settings.batch_size, settings.seq_len, most))

        self.calibration, self.validation = batches(train, self.tokens), batches(validation, self.held_out)

    def _pass(self, what: str) -> Tell:
        """Counts the steps of one pass over the model."""
        tell, numbers = self.tell, count(1)
        return silent if tell is None else lambda _: tell(what, next(numbers))

    @cached_property
    def profile(self) -> Profile:
        """Made, or read where there is one."""
        kept = self.kept_profile
        if kept is not None and kept.exists():
            found = Profile.load(kept)
            found.check(self.streamed)
            return found
        found = profile(self.streamed, self.calibration, self._pass("profile"))
        if kept is not None:
            found.save(kept)
        return found

    @cached_property
    def reference(self) -> Reference:
        """The original on the held-out text."""
        return Reference(self.streamed, self.validation, self._pass("original on held-out text"))

    def plan(self, wish: Wish) -> Job | Export:
        """The job that is wished for. Raises UserError, with the smallest size, where a budget is too small."""
        for asked, wanted in {"--to hf": self.to_hf, "--skip": wish.skip, "--base": wish.base}.items():
            if wanted:
                ours(self.streamed, asked)  # before the work
        if wish.plan is not None:
            plan = Plan.load(wish.plan)
            return self._job(plan.replace(rounding=self.rounding) if self.rounding else plan)
        rows = [Row(layer=layer, expert=expert) for layer, expert in packable(self.streamed.config)]
        if not rows:
            raise UserError(
                f"{self.streamed.folder} has no experts that could be packed: MLPs without biases or limits"
            )
        if wish.codebooks and self.to_hf:
            raise UserError("compressed-tensors has no vectors of a codebook: leave --codebooks out, or --to hf")
        if wish.codebooks:
            self.formats = (*self.formats, CODEBOOK)
        self.skip = skip(self.profile, wish.skip, self.streamed.config) if wish.skip else {}
        if wish.drop is not None:
            found = since(self.profile, Streamed(wish.base)) if wish.base else self.profile
            rows = drop(found, rows, wish.drop, wish.drop_by, groups(self.streamed.config))
        if wish.merge is not None:
            rows = join(self.profile, rows, wish.merge, self.streamed.config)
        if wish.fit is not None:
            return self._within(rows, wish)
        if wish.bits_per_weight is not None:
            return self.solved(rows, int(wish.bits_per_weight / 8 * self.num_weights), wish.granularity)
        if wish.max_loss is not None:
            return self._smallest(rows, wish)
        return self.job(rows)

    def _within(self, rows: list[Row], wish: Wish) -> Job | Export:
        """The best plan whose weight files have ``wish.fit`` bytes at most."""
        assert wish.fit is not None
        cheapest = self.solved(rows, self._smallest_bytes(rows), wish.granularity)
        sizes = cheapest.bytes_by_class()
        if sum(sizes.values()) > wish.fit:
            raise UserError(f"{wish.fit:,} bytes are too few: the smallest plan makes {sum(sizes.values()):,}")
        room = wish.fit - sum(sizes.values()) + sizes["experts"]
        job = self.solved(rows, room, wish.granularity)
        over = sum(job.bytes_by_class().values()) - wish.fit  # several formats in a layer have a longer header
        return self.solved(rows, room - over, wish.granularity) if over > 0 else job

    def _smallest(self, rows: list[Row], wish: Wish) -> Job | Export:
        """The smallest of several plans, each written and measured, that loses no more than ``wish.max_loss``."""
        assert wish.max_loss is not None
        low, high = self._smallest_bytes(rows), sum(self.record_bytes(*row.place, WHOLE) for row in rows)
        best: Job | Export | None = None
        with TemporaryDirectory() as folder:
            for number in range(SEARCHED):
                middle = int((low * high) ** 0.5)
                job = self.solved(rows, middle, wish.granularity)
                tried = Path(folder) / f"{number}"
                job.run(tried, self._pass(f"plan {number + 1} of {SEARCHED}"))
                lost = self.reference.compare(self.streamed.open(tried)).loss
                shutil.rmtree(tried)
                if lost <= wish.max_loss:
                    best, high = job, middle
                else:
                    low = middle
        if best is None:
            raise UserError(
                f"no plan that was tried loses at most {wish.max_loss:.2%} of bits per byte: ask for a size"
            )
        return best

    def _smallest_bytes(self, rows: list[Row]) -> int:
        kept = [row.place for row in rows if row.action == "keep"]
        return sum(min(self.record_bytes(*where, format) for format in self.formats) for where in kept)

    def job(self, rows: list[Row]) -> Job | Export:
        """For rows."""
        rounding, dense = self.rounding or "gptq", self.streamed.dense
        return self._job(Plan(rows=tuple(rows), rounding=rounding, skip=self.skip, dense=dense))

    def _job(self, plan: Plan) -> Job | Export:
        job = Job(self.streamed, plan, self.profile, self.calibration if plan.rounding == "gptq" else ())
        return Export(job) if self.to_hf else job

    def solved(self, rows: list[Row], budget: int, granularity: Granularity) -> Job | Export:
        """For rows with formats that fit into a budget for the experts' records."""
        formats = (*self.formats, WHOLE)
        return self.job(solve(self.profile, rows, budget, self.record_bytes, granularity, formats=formats))

    def record_bytes(self, layer: int, expert: int, format: Format) -> int:
        """Of one expert."""
        shapes = self._shapes[layer, expert]
        return export.record_bytes(format, shapes) if self.to_hf else record(format, shapes)[1]

    @cached_property
    def _shapes(self) -> dict[tuple[int, int], tuple[tuple[int, int], ...]]:
        found = {}
        for layer, expert in packable(self.streamed.config):
            moe = self.streamed.config.all_layers[layer].moe
            (index,) = (number for number, span in enumerate(moe.spans if moe else ()) if expert in span)
            bank = self.streamed.bank(layer, index)
            stacks = (self.streamed.stored[f"{bank}.{name}"][1] for name in EXPERTS)
            found[layer, expert] = tuple((stack[1], stack[2]) for stack in stacks)
        return found

    @property
    def num_weights(self) -> int:
        """Of all experts that can be packed."""
        return sum(rows * columns for shapes in self._shapes.values() for rows, columns in shapes)

    def table(self, job: Job | Export) -> Iterator[str]:
        """A line for each layer: what becomes of how many experts, and what cannot be packed."""
        for layer in (index for index, layer in enumerate(self.streamed.config.all_layers) if layer.moe):
            rows = job.plan.of_layer(layer).values()
            names = [row.format.name if row.action == "keep" else row.action for row in rows]
            counts = ", ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(sorted(names)))
            yield f"layer {layer:>3}  {counts or 'experts stay as stored: no plain MLPs'}"

    def write(self, job: Job | Export, target: Path) -> Tree:
        """Writes the folder, reloads it, measures, and leaves a report in it as JSON and HTML. Raises UserError."""
        environment()  # a package that the page needs is asked for before the work
        predicted, reference = job.bytes_by_class(), self.reference
        opened = job.run(target, self._pass("pack"))
        found = self.streamed.bytes_on_disk(target)
        exact = {name: size for name, size in found.items() if not (self.to_hf and name == "other")}
        if exact != {name: predicted[name] for name in exact}:
            raise UserError(f"{target} has {found} bytes on disk, {predicted} were planned: please report this")
        model = self.streamed.open(target)
        quality: Quality = reference.compare(model)
        report: Tree = {
            "source": str(self.streamed.folder),
            "bytes": found,
            "bytes_before": self.streamed.bytes_on_disk(self.streamed.folder),
            "bits_per_weight": 8 * found["experts"] / self.num_weights,
            "quality": asdict(quality),
            "tokens_per_second": tokens_per_second(model, open_tokenizer(target)),
            "rounding": job.plan.rounding,
            "calibration_tokens": self.profile.about["tokens"],
            "scarce_experts": self.profile.scarce,
            "opened": opened,
        }
        write_text(target / "report.json", json.dumps(report, indent=2) + "\n")
        write_text(target / "report.html", page(report, job.plan, target.name))
        return report

    def write_dense(self, how: How, target: Path) -> Tree:
        """Writes the model without experts, to be tuned with itself as a teacher, and measures it. Raises UserError."""
        model, tokenizer = load(ours(self.streamed, "--to-dense").folder)
        save(to_dense(model, how, shares(model, self.calibration)), tokenizer, target)
        return asdict(self.reference.compare(open_model(target)))
