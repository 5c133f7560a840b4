"""A training step as a list of operations: what processes compute, and what they send to whom.

The one source of bytes, times and timelines. It does what ``train.step`` and ``parallel`` do, in their order.
"""

from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from moeforge.models.count import LayerWork, layer_work
from moeforge.models.memory import kept_by_block
from moeforge.parallel.gradients import buckets
from moeforge.parallel.plan.job import Job, Layout, Weights, experts_of, nbytes

KERNELS = {"attention": 30, "routing": 40, "beside": 10, "experts": 15, "update": 1}
"""About how many a part starts on its way forward; its way back starts twice as many."""
FLOAT64 = 8
"""Bytes of a number in counts, loads, and sums of losses."""


@dataclass(frozen=True)
class Work:
    """What each process computes; [D or 1, P or 1]."""

    flops: Tensor
    traffic: Tensor
    """Bytes read and written."""
    kernels: int

    def times(self, flops: float, traffic: float) -> "Work":
        """More of it, as the way back is."""
        return Work(self.flops * flops, self.traffic * traffic, round(self.kernels * flops))


@dataclass(frozen=True)
class Message:
    """A collective in every group along an axis."""

    kind: str
    axis: str
    sent: Tensor
    """Bytes: of all_to_all [D or 1, P, P] from and to, nothing to oneself; of others [] what each process sends."""
    calls: int = 1
    """Collectives that it stands for."""


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


def step_of(job: Job, layout: Layout) -> list[Part]:
    """One optimizer step. Raises UserError for experts that cannot be dealt out so, and loads that do not fit."""
    return _Writer(job, layout).parts()


def bytes_sent(parts: list[Part], layout: Layout) -> dict[str, int]:
    """In one step, by kind, all processes together: what ``metrics.jsonl`` has as ``sent/...``."""
    total = dict.fromkeys(("all_to_all", "all_reduce", "all_gather", "reduce_scatter"), 0.0)
    for part in parts:
        for message in (operation.does for operation in part.operations if isinstance(operation.does, Message)):
            sent = message.sent.sum() * (layout.data / len(message.sent) if message.sent.ndim else layout.size)
            total[message.kind] += part.times * float(sent)
    return {kind: round(count) for kind, count in total.items()}


class _Writer:
    """Writes the list down."""

    def __init__(self, job: Job, layout: Layout) -> None:
        self.job, self.layout, self.weights = job, layout, Weights.of(job, layout)
        self.tokens_DP, self.work = job.tokens(layout), layer_work(job.decoder, job.seq_len)
        self.operations: list[Operation] = []
        self.alike: dict[str, int] = {}
        self.layer_sends, self.layer_works = cache(self._sends), cache(self._works)

    def parts(self) -> list[Part]:
        """The passes that only count, the micro-batches, the update."""
        job = self.job
        routers = job.decoder.routers.values()
        counted = sum(r.num_experts for r in routers for loss in r.config.losses if getattr(loss, "over", 0) == "batch")
        parts, depths = [], range(len(self.work))
        if counted and job.accumulate > 1:
            for depth in depths:
                self._forward(depth)
            parts.append(self._part("counting", job.accumulate))
            self._reduce("counts of all", FLOAT64 * counted)
            parts.append(self._part("counts", 1))
        if self.layout.shard:
            self._cut("gather root", "all_gather", "world", self.weights.root)
        self._head("embedding", 0, 1)
        for depth in depths:
            self._forward(depth)
        self._head("output", 1, 1)
        if counted and job.accumulate == 1:
            self._reduce("counts of all", FLOAT64 * counted)
        self._reduce("is the loss finite", 4)
        self._head("output back", 2, 1.5)
        for depth in reversed(depths):
            self._backward(depth)
        self._head("embedding back", 0, 1)
        if self.layout.shard:
            self._cut("scatter root", "reduce_scatter", "world", self.weights.root)
        parts.append(self._part("micro-batch", job.accumulate))
        self._update()
        return [*parts, self._part("update", 1)]

    def _part(self, name: str, times: int) -> Part:
        part = Part(name, self.operations, times)
        self.operations = []
        return part

    def _add(self, name: str, does: Work | Message, *after: int) -> int:
        """Returns its place. Where nothing is done at once, it waits for what was added before."""
        if not self.layout.chunks:
            after = (len(self.operations) - 1,)
        self.operations.append(Operation(name, does, tuple(place for place in after if place >= 0)))
        return len(self.operations) - 1

    @property
    def last(self) -> int:
        """Place of what was added last; -1 at the beginning."""
        return len(self.operations) - 1

    def _reduce(self, name: str, size: int, axis: str = "world") -> None:
        """Sums ``size`` bytes, in a ring."""
        count = self.layout.group(axis)
        if count > 1:
            each = 2 * (count - 1) * -(-size // count)
            self._add(name, Message("all_reduce", axis, torch.tensor(float(each))), self.last)

    def _cut(self, name: str, kind: str, axis: str, parameters: list, *after: int) -> int:
        """Gathers parameters that are cut along an axis, or sums and cuts their gradients."""
        count = self.layout.group(axis)
        sent = torch.tensor(float((count - 1) * nbytes(parameters, count)))
        return self._add(name, Message(kind, axis, sent), *(after or (self.last,)))

    def _head(self, name: str, flops: float, traffic: float) -> None:
        """The embedding (no FLOPs), or the output matrix with the loss."""
        job = self.job
        width, vocabulary = job.model.d_model, job.model.vocab_size or 0
        each = 2.0 * vocabulary * width
        moved = (job.row + 8) * vocabulary if flops else 0
        table = float(job.value * vocabulary * width * (flops > 0))
        work = Work(self.tokens_DP * each * flops, (self.tokens_DP * (moved + 12 * width) + table) * traffic, 10)
        self._add(name, work, self.last)

    def _gathered(self, depth: int, passing: str) -> int:
        """Brings a cut block together; returns the place of the last gather, -1 where nothing is cut."""
        weights, layout, index, place = self.weights, self.layout, depth % self.job.model.num_layers, -1
        if layout.shard:
            place = self._cut(f"gather layer {depth}{passing}", "all_gather", "world", weights.blocks[index])
            for bank in weights.banks[index].values() if layout.data > 1 else ():
                place = self._cut(f"gather experts {depth}{passing}", "all_gather", "data", bank, place)
        return place

    def _forward(self, depth: int) -> None:
        before = self.last
        gathered = self._gathered(depth, "")
        works = self.layer_works(self._like(depth))
        attention = self._add(f"attention {depth}", works["attention"], before, gathered)
        self._mixed(depth, works, "", attention, before, gathered)

    def _mixed(self, depth: int, works: dict[str, Work], passing: str, attention: int, *before: int) -> None:
        """Router, exchange, experts and what stands beside them, on the way forward."""
        layer = self.job.model.applied_layers[depth]
        if layer.moe is None:
            self._add(f"mlp {depth}{passing}", works["beside"], attention, *before)
            return
        # Behind a shortcut nothing of this layer's attention is needed.
        entry = before if layer.moe.shortcut else (attention,)
        routing = self._add(f"router {depth}{passing}", works["routing"], *entry)
        sends, chunks = self.layer_sends(self._like(depth)), max(1, self.layout.chunks)
        if sends is None:
            beside = self._add(f"shared {depth}{passing}", works["beside"], attention)
            self._add(f"experts {depth}{passing}", works["experts"], routing, beside)
            return
        counts, out, back = sends
        counted = self._add(f"counts {depth}{passing}", counts, routing)
        gone = [self._add(f"dispatch {depth}{passing}", _slice(out, chunks), counted) for _ in range(chunks)]
        self._add(f"shared {depth}{passing}", works["beside"], attention)
        piece = _part_of(works["experts"], chunks)
        done = [self._add(f"experts {depth}{passing}", piece, place) for place in gone]
        home = [self._add(f"combine {depth}{passing}", _slice(back, chunks), place) for place in done]
        self._join(depth, *home)

    def _join(self, depth: int, *after: int) -> None:
        """What comes next needs all of what stood side by side."""
        if self.layout.chunks:
            zero = torch.zeros(1, 1)
            self._add(f"sum {depth}", Work(zero, zero, 1), *after, self.last)

    def _backward(self, depth: int) -> None:
        before, works = self.last, self.layer_works(self._like(depth))
        gathered, index = self._gathered(depth, " back"), depth % self.job.model.num_layers
        sends, chunks = self.layer_sends(self._like(depth)), max(1, self.layout.chunks)
        if self.layout.recompute:
            self._mixed(depth, works, " again", before, before, gathered)
        back = {name: work.times(2, 2) for name, work in works.items()}
        start = (self.last, gathered)
        if sends is None:
            self._add(f"experts {depth} back", back["experts"], *start)
            self._add(f"shared {depth} back", back["beside"], *start)
        else:
            _, out, home = sends
            gone = [self._add(f"combine {depth} back", _slice(home, chunks), *start) for _ in range(chunks)]
            self._add(f"shared {depth} back", back["beside"], *start)
            piece = _part_of(back["experts"], chunks)
            done = [self._add(f"experts {depth} back", piece, place) for place in gone]
            came = [self._add(f"dispatch {depth} back", _slice(out, chunks), place) for place in done]
            self._join(depth, *came)
        self._add(f"router {depth} back", back["routing"], self.last)
        if self.layout.recompute:
            self._add(f"attention {depth} again", works["attention"], self.last)
        self._add(f"attention {depth} back", back["attention"], self.last)
        if self.layout.shard and depth < self.job.model.num_layers:  # a layer passed again and again: at the last
            self._cut(f"scatter layer {depth}", "reduce_scatter", "world", self.weights.blocks[index])
            for bank in self.weights.banks[index].values() if self.layout.data > 1 else ():
                self._cut(f"scatter experts {depth}", "reduce_scatter", "data", bank)

    def _like(self, depth: int) -> int:
        """The first layer that is the same, so that what all such come to is found once."""
        if depth in self.job.loads:
            return depth
        return self.alike.setdefault(self.job.model.applied_layers[depth].model_dump_json(), depth)

    def _sends(self, depth: int) -> tuple[Message, Message, Message] | None:
        """(counts, rows out, rows back) of the banks that are dealt out; None where none is."""
        job, size, index = self.job, self.layout.expert, depth % self.job.model.num_layers
        banks, layer = self.weights.banks[index], job.model.applied_layers[depth]
        if not banks or layer.moe is None:
            return None
        edges_DPE, places = job.edges(depth, self.layout), experts_of(layer)
        away_DPP = sum(edges_DPE[..., places[bank]].unflatten(-1, (size, -1)).sum(-1) for bank in banks)
        away_DPP = away_DPP * (1 - torch.eye(size, dtype=torch.float64))  # type: ignore[operator]
        counted = FLOAT64 * sum(layer.moe.experts[bank].num_experts for bank in banks) / size
        everyone = (counted * (1 - torch.eye(size, dtype=torch.float64)))[None]
        row = layer.moe.row_width(job.model.d_model) * job.row
        calls = len(banks)
        return (
            Message("all_to_all", "expert", everyone, calls),
            Message("all_to_all", "expert", away_DPP * (row + job.value), 2 * calls),
            Message("all_to_all", "expert", away_DPP * row, calls),
        )

    def _works(self, depth: int) -> dict[str, Work]:
        """What a layer computes on its way forward, by part."""
        job, index = self.job, depth % self.job.model.num_layers
        layer, work, block = job.model.applied_layers[depth], self.work[depth], job.decoder.blocks[index]
        kept = kept_by_block(job.model, layer, job.row, 1)
        size = {name: nbytes(list(part.parameters())) for name, part in block.named_children()}
        of_experts = nbytes([p for p in block.moe.banks.parameters()]) if layer.moe else 0  # type: ignore[union-attr]
        routing = nbytes(list(block.moe.router.parameters())) if layer.moe else 0  # type: ignore[union-attr]
        beside = size.get("mlp", 0) + size.get("moe", 0) - of_experts - routing
        attention = size.get("attention", 0)
        small = 12 * layer.moe.num_experts * layer.moe.heads if layer.moe else 0

        def part(flops: float, weights: int, moved: float, name: str) -> Work:
            tokens = self.tokens_DP
            return Work(tokens * flops, weights + 2 * tokens * moved, KERNELS[name] if flops or moved else 0)

        return {
            "attention": part(work.attention, attention, kept[0], "attention"),
            "routing": part(work.routing, routing, small, "routing" if layer.moe else "beside"),
            "beside": part(work.beside, beside, kept[1] - small, "beside"),
            "experts": self._experts(depth, work, of_experts),
        }

    def _experts(self, depth: int, work: LayerWork, weights: int) -> Work:
        """Rows for the experts that a process holds, wherever they come from."""
        job, layer, index = self.job, self.job.model.applied_layers[depth], depth % self.job.model.num_layers
        if layer.moe is None:
            return Work(torch.zeros(1, 1), torch.zeros(1, 1), 0)
        edges_DPE, size = job.edges(depth, self.layout), self.layout.expert
        width = layer.moe.row_width(job.model.d_model)
        cost_E = 2.0 * torch.tensor(layer.moe.costs(width), dtype=torch.float64)
        mean = job.model.d_model / width * layer.moe.router.select.mean_experts(layer.moe.num_experts)
        fixed = max(0.0, work.experts - mean * float(cost_E.mean()))
        flops_DP, rows_DP = self.tokens_DP * fixed, torch.zeros(1, 1, dtype=torch.float64)
        for number, place in enumerate(experts_of(layer)):
            held_DPE, held_cost = edges_DPE[..., place], cost_E[place]
            if number in self.weights.banks[index]:
                held_DPE = held_DPE.sum(1, keepdim=True).unflatten(-1, (size, -1)).squeeze(1)
                held_cost = held_cost.view(size, -1)
            flops_DP = flops_DP + (held_DPE * held_cost).sum(-1)
            rows_DP = rows_DP + held_DPE.sum(-1)
        banks = self.weights.banks[index]
        if banks:
            weights = sum(nbytes(bank) for bank in banks.values())
        kept = kept_by_block(job.model, layer, job.row, 1, edges=1.0)[2]
        return Work(flops_DP, weights + rows_DP * (2 * kept + 4 * width * job.row), KERNELS["experts"])

    def _update(self) -> None:
        """Gradients summed, their norm, the optimizer, and what the step measured."""
        job, layout, weights = self.job, self.layout, self.weights
        everywhere, dealt = weights.everywhere, weights.shared_out
        if not layout.shard:
            for axis, parameters in (("world", everywhere), ("data", dealt)):
                for bucket in buckets(parameters):
                    self._reduce("sum gradients", nbytes(bucket) + len(bucket) * job.value, axis)
        cut = layout.size if layout.shard else 1
        own = nbytes(everywhere, cut) + nbytes(dealt, layout.data if layout.shard else 1)
        passes = torch.full((1, 1), float(own), dtype=torch.float64)
        kernels = KERNELS["update"] * (len(everywhere) + len(dealt))
        self._add("norm", Work(torch.zeros(1, 1), passes, 2 * kernels), self.last)
        self._reduce("sum of squares", FLOAT64)
        # Gradients are scaled (read, written); weights and two moments are read and written, gradients read.
        self._add("optimizer", Work(torch.zeros(1, 1), 9 * passes, 2 * kernels), self.last)
        routers = job.decoder.routers.values()
        names = {loss.type for router in routers for loss in router.config.losses}
        numbers = 1 + len(names) + sum(1 + bool(r.config.capacity) + r.num_experts for r in routers)
        self._reduce("losses and loads", FLOAT64 * numbers)


def _slice(message: Message, parts: int) -> Message:
    return replace(message, sent=message.sent / parts)


def _part_of(work: Work, parts: int) -> Work:
    return Work(work.flops / parts, work.traffic / parts, work.kernels)
