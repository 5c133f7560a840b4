"""A training step as a list of operations: what processes compute, and what they send to whom.

The one source of bytes, times and timelines. It does what ``train.step`` and ``parallel`` do, in their order.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest

import torch
from torch import Tensor, nn

from moeforge.parallel.gradients import buckets
from moeforge.parallel.plan.amounts import KERNELS, NOTHING, Amounts, Work
from moeforge.parallel.plan.job import Arrangement, Job, nbytes
from moeforge.parallel.plan.messages import FLOAT64, Message


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
        self.aside = arrangement.way == "exchange" and not arrangement.cuts_banks
        """Whether what stands beside experts is computed while rows are on their way."""

    def parts(self) -> list[Part]:
        """The passes that only count, the micro-batches, the update."""
        job = self.job
        routers = job.decoder.routers.values()
        counted = sum(r.num_experts for r in routers for loss in r.config.losses if getattr(loss, "over", 0) == "batch")
        parts, depths = [], range(len(job.model.applied_layers))
        if counted and job.accumulate > 1:
            self._meet()
            for depth in depths:
                self._forward(depth)
            parts.append(self._part("counting", job.accumulate))
            self._reduce("counts of all", FLOAT64 * counted)
            parts.append(self._part("counts", 1))
        if self.arrangement.shard:
            self._cut("gather root", "all_gather", "slice", self.weights.root)
        self._meet()
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
            self._cut("scatter root", "reduce_scatter", "slice", self.weights.root)
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

    def _meet(self) -> None:
        """Tensor groups say how many rows they have, and where those are in their texts."""
        others, tokens_DQ = self.arrangement.tensor - 1, self.amounts.tokens_DQ
        if others:
            self._add("meet", Message("all_gather", "tensor", others * (8 + 16 * tokens_DQ), 2), self.last)

    def _reduce(self, name: str, size: int | Tensor, axis: str = "world") -> None:
        """Sums ``size`` bytes, or [D or 1, Q] of each process, in a ring."""
        count = self.arrangement.group(axis)
        if count > 1:
            each = 2 * (count - 1) * (torch.as_tensor(size, dtype=torch.float64) / count).ceil()
            self._add(name, Message("all_reduce", axis, each), self.last)

    def _cut(self, name: str, kind: str, axis: str, parameters: list[nn.Parameter]) -> int:
        """Gathers parameters that are cut along an axis, or sums and cuts their gradients."""
        shard = nbytes(parameters, self.arrangement.group(axis))
        return self._move_shards(name, kind, axis, torch.tensor(shard, dtype=torch.float64))

    def _move_shards(self, name: str, kind: str, axis: str, shard: Tensor) -> int:
        """Of so many bytes, of all or of each process, [1, Q]; offloaded, from the host before or to it after."""
        hosted = Work(NOTHING, NOTHING, NOTHING, 1, shard)
        message = Message(kind, axis, (self.arrangement.group(axis) - 1) * shard)
        offload = self.arrangement.offload
        if offload and kind == "all_gather":
            self._add(f"{name} from host", hosted, self.last)
        self._add(name, message, self.last)
        if offload and kind == "reduce_scatter":
            self._add(f"{name} to host", hosted, self.last)
        return self.last

    def _cut_layer(self, depth: int, name: str, kind: str) -> int:
        """The same of a layer; of experts that are dealt out, each process may have another number."""
        index, place = depth % self.job.model.num_layers, -1
        if self.arrangement.shard:
            place = self._cut(f"{name[:7]} layer {depth}{name[7:]}", kind, "slice", self.weights.blocks[index])
            for number in self.weights.banks[index] if self.arrangement.cuts_banks else ():
                shard = self.arrangement.of_positions(self.weights.of_each(partial(self._shard, index, number)))
                place = self._move_shards(f"{name[:7]} experts {depth}{name[7:]}", kind, "data", shard)
        return place

    def _shard(self, index: int, number: int, place: int) -> int:
        """Bytes of a process' share of a bank that all teams have cut."""
        return nbytes(self.weights.held(index, number, place), self.arrangement.data)

    def _forward(self, depth: int) -> None:
        before = self.last
        self._layer(depth, "", True, before, self._cut_layer(depth, "gather ", "all_gather"))

    def _layer(self, depth: int, passing: str, attends: bool, *before: int) -> None:
        """Forward: attention (or not again), router, exchange, experts and what stands beside them."""
        layer, works = self.job.model.applied_layers[depth], self.amounts.works(depth)
        early, stream, entry = bool(layer.moe and layer.moe.shortcut), before, before
        if attends and not early:
            entry = stream = (self._part_of(depth, "attention", passing, works["attention"], *before),)
        if layer.moe is None:
            self._part_of(depth, "mlp", passing, works["beside"], *stream)
            return
        routed = self._add(f"router {depth}{passing}", works["routing"], *entry)
        legs, chunks = self.amounts.legs(depth), self.arrangement.chunks
        told = [self._send(f"counts {depth}{passing}", legs.told, 1, routed) for _ in range(chunks)] if legs else []
        gone = [self._send(f"dispatch {depth}{passing}", legs.there, chunks, place) for place in told] if legs else []
        if attends and early:  # what rows on their way through a shortcut need nothing of
            stream = (self._part_of(depth, "attention", passing, works["attention"], *before),)
        if self.aside:
            self._part_of(depth, "shared", passing, works["beside"], *stream)
        if legs is None:
            self._part_of(depth, "experts", passing, works["experts"], routed, self.last)
        else:
            piece = works["experts"].times(1 / chunks, 1)
            done = [self._part_of(depth, "experts", passing, piece, place, parts=chunks) for place in gone]
            self._join(depth, *(self._send(f"combine {depth}{passing}", legs.home, chunks, place) for place in done))
        if not self.aside:
            self._part_of(depth, "shared", passing, works["beside"], self.last)

    def _part_of(self, depth: int, name: str, passing: str, work: Work, *after: int, parts: int = 1) -> int:
        """Work that a tensor group may have cut: its rows are gathered, and sums go back to whose rows they are; but
        not where they come last of what is made again. Returns the place of what comes last."""
        kind = {"mlp": "beside", "shared": "beside"}.get(name, name)
        cut, place = self.amounts.slices(depth).get(kind), max((-1, *after))
        if cut is None:
            return self._add(f"{name} {depth}{passing}", work, *after)
        for count, message in enumerate(cut.told if passing != " back" else ()):
            after = (self._send(f"gather {name} {depth}{passing}", (message,), parts if count else 1, *after),)
        after = (self._send(f"gather {name} {depth}{passing}", (cut.gather,), parts, *after),)
        place = self._add(f"{name} {depth}{passing}", work, *after)
        last = name in ("attention", "mlp") or (name == "shared" and not (self.aside and self.amounts.legs(depth)))
        if passing == " again" and last:
            return place
        back = (cut.weights,) if cut.weights and passing == " back" else ()
        return self._send(f"scatter {name} {depth}{passing}", (cut.scatter, *back), parts, place)

    def _send(self, name: str, messages: Iterable[Message], parts: int, *after: int) -> int:
        """One after the other, so much of each; returns the place of the last."""
        place = max(after)
        for message in messages:
            piece = message if parts == 1 else replace(message, sent=message.sent / parts)
            place = self._add(name, piece, *after)
            after = (place,)
        return place

    def _join(self, depth: int, *after: int) -> None:
        """What comes next needs all of what stood side by side."""
        self._add(f"add {depth}", Work(NOTHING, NOTHING, NOTHING, 0), *after, self.last)

    def _backward(self, depth: int) -> None:
        before, layer = self.last, self.job.model.applied_layers[depth]
        gathered = self._cut_layer(depth, "gather  back", "all_gather")
        if self.arrangement.recompute:
            self._layer(depth, " again", False, before, gathered)
            before = self.last
        back = {name: work.times(2) for name, work in self.amounts.works(depth).items()}
        if layer.moe is None:
            self._part_of(depth, "mlp", " back", back["beside"], before, gathered)
        else:
            self._experts_back(depth, back, before, gathered)
        if not (layer.moe and layer.moe.shortcut):
            self._attention_back(depth, back["attention"], self.last)
        if depth < self.job.model.num_layers:  # a layer passed again and again: at the last
            self._cut_layer(depth, "scatter", "reduce_scatter")

    def _experts_back(self, depth: int, back: dict[str, Work], *before: int) -> None:
        legs, chunks, gone = self.amounts.legs(depth), self.arrangement.chunks, []
        if not self.aside:
            before = (self._part_of(depth, "shared", " back", back["beside"], *before),)
        if legs is not None:
            gone = [self._send(f"combine {depth} back", legs.home_back, chunks, *before) for _ in range(chunks)]
        if self.aside:
            self._part_of(depth, "shared", " back", back["beside"], *before)
        moe = self.job.model.applied_layers[depth].moe
        if moe is not None and moe.shortcut:
            self._attention_back(depth, back["attention"], self.last)
        if legs is None:
            self._part_of(depth, "experts", " back", back["experts"], *before)
        else:
            piece = back["experts"].times(1 / chunks, 1)
            done = [self._part_of(depth, "experts", " back", piece, place, parts=chunks) for place in gone]
            came = [self._send(f"dispatch {depth} back", legs.there_back, chunks, place) for place in done]
            self._join(depth, *came)
        self._add(f"router {depth} back", back["routing"], self.last)

    def _attention_back(self, depth: int, back: Work, *before: int) -> None:
        if self.arrangement.recompute:
            before = (self._part_of(depth, "attention", " again", back.times(0.5), *before),)
        self._part_of(depth, "attention", " back", back, *before)

    def _update(self) -> None:
        """Gradients summed, their norm, the optimizer, and what the step measured."""
        job, arrangement, weights = self.job, self.arrangement, self.weights
        self._sum_gradients()
        own = weights.size(arrangement)
        passes, hosted = torch.full((1, 1), float(own), dtype=torch.float64), NOTHING
        if arrangement.offload:
            passes, hosted = NOTHING, passes
        kernels = KERNELS["update"] * (len(weights.everywhere) + len(weights.dealt(0)))
        self._add("norm", Work(NOTHING, NOTHING, passes, 2 * kernels, hosted), self.last)
        self._reduce("sum of squares", FLOAT64)
        # Gradients are scaled (read, written); weights and two moments are read and written, gradients read.
        self._add("optimizer", Work(NOTHING, NOTHING, 9 * passes, 2 * kernels, 9 * hosted), self.last)
        routers = job.decoder.routers.values()
        names = {loss.type for router in routers for loss in router.config.losses}
        numbers = 1 + len(names) + sum(1 + bool(r.config.capacity) + r.num_experts for r in routers)
        self._reduce("losses and loads", FLOAT64 * numbers)

    def _sum_gradients(self) -> None:
        """Over those who hold the same; FSDP has summed what it cuts, but not over those with other slices."""
        weights, arrangement = self.weights, self.arrangement
        whole = not arrangement.cuts_banks
        if arrangement.shard and arrangement.tensor > 1:
            self._sum_shards()
        if not arrangement.shard:
            for axis, cut in (("world", False), ("slice", True)):
                for bucket in buckets(weights.sliced(weights.everywhere, cut)):
                    self._reduce("sum gradients", self._sum_of(bucket), axis)
        for axis, cut in (("same", False), ("data", True)) if whole else ():
            each = weights.of_each(partial(self._buckets, cut))
            for some in zip_longest(*each, fillvalue=0):
                self._reduce("sum gradients", arrangement.of_positions([*some]), axis)
        for depth, banks in enumerate(weights.places):
            for number, placement in banks.items():
                for stack in weights.banks[depth][number] if placement.replicated else ():
                    values = 1 + len(placement.replicated) * stack[0].numel()
                    self._reduce("sum replicas", values * self.job.value, "expert" if whole else "slice")

    def _sum_shards(self) -> None:
        """Over tensor groups, of what these do not cut and FSDP does."""
        weights, arrangement = self.weights, self.arrangement
        alike = weights.sliced(weights.everywhere, False)
        held_DP = torch.tensor(
            [self._pieces(alike, arrangement.group("slice"), r) for r in range(arrangement.group("slice"))]
        )
        if arrangement.cuts_banks:
            each = weights.of_each(
                lambda place: [
                    self._pieces(weights.dealt(place, False), arrangement.data, d) for d in range(arrangement.data)
                ]
            )
            held_DP = held_DP.view(arrangement.data, -1) + torch.tensor(each).T
        size_DQ = held_DP.view(arrangement.data, -1).double()
        self._reduce("sum gradients", size_DQ.repeat_interleave(arrangement.tensor, 1) * self.job.value, "tensor")

    def _buckets(self, cut: bool, place: int) -> list[int]:
        """Bytes of each, of what is dealt out."""
        return [self._sum_of(bucket) for bucket in buckets(self.weights.dealt(place, cut))]

    def _sum_of(self, bucket: list[nn.Parameter]) -> int:
        """Bytes; with each gradient a number goes along."""
        return nbytes(bucket) + len(bucket) * self.job.value

    def _pieces(self, parameters: list[nn.Parameter], parts: int, number: int) -> int:
        """Values that one of so many holds, and one more for each gradient."""
        most = [-(-len(p) // parts) for p in parameters]
        rows = [max(0, min(size, len(p) - number * size)) for p, size in zip(parameters, most, strict=True)]
        return sum(1 + row * p[0].numel() for p, row in zip(parameters, rows, strict=True))
