"""A training step as a list of operations: what processes compute, and what they send to whom.

The one source of bytes, times and timelines. It does what ``train.step`` and ``parallel`` do, in their order.
"""

from dataclasses import dataclass, replace

import torch
from torch import nn

from moeforge.parallel.gradients import buckets
from moeforge.parallel.plan.amounts import FLOAT64, KERNELS, NOTHING, Amounts, Message, Work
from moeforge.parallel.plan.job import Arrangement, Job, nbytes


@dataclass(frozen=True)
class Operation:
    """One thing that all processes do, each when what it needs is there."""

    name: str
    does: Work | Message
    after: tuple[int, ...]
    """Places in the list of what must have ended before."""


@dataclass(frozen=True)
class Part:
    """Operations in the order in which they start; the next part begins when all have ended."""

    name: str
    operations: list[Operation]
    times: int
    """How often in one step."""


def step_of(job: Job, arrangement: Arrangement) -> list[Part]:
    """One optimizer step. Raises UserError for experts that cannot be dealt out so, and loads that do not fit."""
    return _Writer(job, arrangement).parts()


def bytes_sent(parts: list[Part], arrangement: Arrangement) -> dict[str, int]:
    """In one step, by kind, all processes together: what ``metrics.jsonl`` has as ``sent/...``."""
    total = dict.fromkeys(("all_to_all", "all_reduce", "all_gather", "reduce_scatter"), 0.0)
    for part in parts:
        for message in (operation.does for operation in part.operations if isinstance(operation.does, Message)):
            sent = message.sent.sum() * (
                arrangement.data / len(message.sent) if message.sent.ndim else arrangement.size
            )
            total[message.kind] += part.times * float(sent)
    return {kind: round(count) for kind, count in total.items()}


class _Writer:
    """Writes the list down."""

    def __init__(self, job: Job, arrangement: Arrangement) -> None:
        self.job, self.arrangement, self.amounts = job, arrangement, Amounts(job, arrangement)
        self.weights = self.amounts.weights
        self.operations: list[Operation] = []

    def parts(self) -> list[Part]:
        """The passes that only count, the micro-batches, the update."""
        job = self.job
        routers = job.decoder.routers.values()
        counted = sum(r.num_experts for r in routers for loss in r.config.losses if getattr(loss, "over", 0) == "batch")
        parts, depths = [], range(len(job.model.applied_layers))
        if counted and job.accumulate > 1:
            for depth in depths:
                self._forward(depth)
            parts.append(self._part("counting", job.accumulate))
            self._reduce("counts of all", FLOAT64 * counted)
            parts.append(self._part("counts", 1))
        if self.arrangement.shard:
            self._cut("gather root", "all_gather", "world", self.weights.root)
        self._add("embedding", self.amounts.head(0, 1), self.last)
        for depth in depths:
            self._forward(depth)
        self._add("output", self.amounts.head(1, 1), self.last)
        if counted and job.accumulate == 1:
            self._reduce("counts of all", FLOAT64 * counted)
        self._reduce("is the loss finite", 4)
        self._add("output back", self.amounts.head(2, 1.5), self.last)
        for depth in reversed(depths):
            self._backward(depth)
        self._add("embedding back", self.amounts.head(0, 1), self.last)
        if self.arrangement.shard:
            self._cut("scatter root", "reduce_scatter", "world", self.weights.root)
        parts.append(self._part("micro-batch", job.accumulate))
        self._update()
        return [*parts, self._part("update", 1)]

    def _part(self, name: str, times: int) -> Part:
        part = Part(name, self.operations, times)
        self.operations = []
        return part

    def _add(self, name: str, does: Work | Message, *after: int) -> int:
        """Returns its place."""
        self.operations.append(Operation(name, does, tuple(place for place in after if place >= 0)))
        return len(self.operations) - 1

    @property
    def last(self) -> int:
        """Place of what was added last; -1 at the beginning."""
        return len(self.operations) - 1

    def _reduce(self, name: str, size: int, axis: str = "world") -> None:
        """Sums ``size`` bytes, in a ring."""
        count = self.arrangement.group(axis)
        if count > 1:
            each = 2 * (count - 1) * -(-size // count)
            self._add(name, Message("all_reduce", axis, torch.tensor(each, dtype=torch.float64)), self.last)

    def _cut(self, name: str, kind: str, axis: str, parameters: list[nn.Parameter], *after: int) -> int:
        """Gathers parameters that are cut along an axis, or sums and cuts their gradients."""
        count = self.arrangement.group(axis)
        sent = torch.tensor((count - 1) * nbytes(parameters, count), dtype=torch.float64)
        return self._add(name, Message(kind, axis, sent), *(after or (self.last,)))

    def _gathered(self, depth: int, passing: str) -> int:
        """Brings a cut block together; returns the place of the last gather, -1 where nothing is cut."""
        weights, arrangement, index, place = self.weights, self.arrangement, depth % self.job.model.num_layers, -1
        if arrangement.shard:
            place = self._cut(f"gather layer {depth}{passing}", "all_gather", "world", weights.blocks[index])
            for bank in weights.banks[index].values() if arrangement.data > 1 else ():
                place = self._cut(f"gather experts {depth}{passing}", "all_gather", "data", bank, place)
        return place

    def _forward(self, depth: int) -> None:
        before = self.last
        self._layer(depth, "", True, before, self._gathered(depth, ""))

    def _layer(self, depth: int, passing: str, attends: bool, *before: int) -> None:
        """Forward: attention (or not again), router, exchange, experts and what stands beside them."""
        layer, works = self.job.model.applied_layers[depth], self.amounts.works(depth)
        early, stream, entry = bool(layer.moe and layer.moe.shortcut), before, before
        if attends and not early:
            entry = stream = (self._add(f"attention {depth}{passing}", works["attention"], *before),)
        if layer.moe is None:
            self._add(f"mlp {depth}{passing}", works["beside"], *stream)
            return
        routed = self._add(f"router {depth}{passing}", works["routing"], *entry)
        sends, chunks, gone = self.amounts.sends(depth), self.arrangement.chunks, []
        if sends is not None:
            counted = [self._add(f"counts {depth}{passing}", sends[0], routed) for _ in range(chunks)]
            gone = [self._add(f"dispatch {depth}{passing}", _slice(sends[1], chunks), place) for place in counted]
        if attends and early:  # what rows on their way through a shortcut need nothing of
            stream = (self._add(f"attention {depth}{passing}", works["attention"], *before),)
        self._add(f"shared {depth}{passing}", works["beside"], *stream)
        if sends is None:
            self._add(f"experts {depth}{passing}", works["experts"], routed, self.last)
            return
        piece = works["experts"].times(1 / chunks, 1)
        done = [self._add(f"experts {depth}{passing}", piece, place) for place in gone]
        home = [self._add(f"combine {depth}{passing}", _slice(sends[2], chunks), place) for place in done]
        self._join(depth, *home)

    def _join(self, depth: int, *after: int) -> None:
        """What comes next needs all of what stood side by side."""
        self._add(f"add {depth}", Work(NOTHING, NOTHING, NOTHING, 0), *after, self.last)

    def _backward(self, depth: int) -> None:
        before, layer = self.last, self.job.model.applied_layers[depth]
        gathered, index = self._gathered(depth, " back"), depth % self.job.model.num_layers
        if self.arrangement.recompute:
            self._layer(depth, " again", False, before, gathered)
            before = self.last
        back = {name: work.times(2) for name, work in self.amounts.works(depth).items()}
        if layer.moe is None:
            self._add(f"mlp {depth} back", back["beside"], before, gathered)
        else:
            self._experts_back(depth, back, before, gathered)
        if not (layer.moe and layer.moe.shortcut):
            self._attention_back(depth, back["attention"], self.last)
        if self.arrangement.shard and depth < self.job.model.num_layers:  # a layer passed again and again: at the last
            self._cut(f"scatter layer {depth}", "reduce_scatter", "world", self.weights.blocks[index])
            for bank in self.weights.banks[index].values() if self.arrangement.data > 1 else ():
                self._cut(f"scatter experts {depth}", "reduce_scatter", "data", bank)

    def _experts_back(self, depth: int, back: dict[str, Work], *before: int) -> None:
        sends, chunks = self.amounts.sends(depth), self.arrangement.chunks
        gone = []
        if sends is not None:
            gone = [self._add(f"combine {depth} back", _slice(sends[2], chunks), *before) for _ in range(chunks)]
        self._add(f"shared {depth} back", back["beside"], *before)
        moe = self.job.model.applied_layers[depth].moe
        if moe is not None and moe.shortcut:
            self._attention_back(depth, back["attention"], self.last)
        if sends is None:
            self._add(f"experts {depth} back", back["experts"], *before)
        else:
            piece = back["experts"].times(1 / chunks, 1)
            done = [self._add(f"experts {depth} back", piece, place) for place in gone]
            came = [self._add(f"dispatch {depth} back", _slice(sends[1], chunks), place) for place in done]
            self._join(depth, *came)
        self._add(f"router {depth} back", back["routing"], self.last)

    def _attention_back(self, depth: int, back: Work, *before: int) -> None:
        if self.arrangement.recompute:
            again = self._add(f"attention {depth} again", back.times(0.5), *before)
            before = (again,)
        self._add(f"attention {depth} back", back, *before)

    def _update(self) -> None:
        """Gradients summed, their norm, the optimizer, and what the step measured."""
        job, arrangement, weights = self.job, self.arrangement, self.weights
        everywhere, dealt = weights.everywhere, weights.shared_out
        if not arrangement.shard:
            for axis, parameters in (("world", everywhere), ("data", dealt)):
                for bucket in buckets(parameters):
                    self._reduce("sum gradients", nbytes(bucket) + len(bucket) * job.value, axis)
        cut = arrangement.size if arrangement.shard else 1
        own = nbytes(everywhere, cut) + nbytes(dealt, arrangement.data if arrangement.shard else 1)
        passes = torch.full((1, 1), float(own), dtype=torch.float64)
        kernels = KERNELS["update"] * (len(everywhere) + len(dealt))
        self._add("norm", Work(NOTHING, NOTHING, passes, 2 * kernels), self.last)
        self._reduce("sum of squares", FLOAT64)
        # Gradients are scaled (read, written); weights and two moments are read and written, gradients read.
        self._add("optimizer", Work(NOTHING, NOTHING, 9 * passes, 2 * kernels), self.last)
        routers = job.decoder.routers.values()
        names = {loss.type for router in routers for loss in router.config.losses}
        numbers = 1 + len(names) + sum(1 + bool(r.config.capacity) + r.num_experts for r in routers)
        self._reduce("losses and loads", FLOAT64 * numbers)


def _slice(message: Message, parts: int) -> Message:
    return replace(message, sent=message.sent / parts)
