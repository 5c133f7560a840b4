"""How much a step's operations are: FLOPs, bytes of memory, bytes to others. ``step`` says in which order they come."""

from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from moeforge.models.count import LayerWork, layer_work
from moeforge.models.memory import kept_by_block
from moeforge.parallel.plan.job import Arrangement, Job, Weights, experts_of, nbytes
from moeforge.parallel.plan.messages import Legs, Sliced, arrived, legs, sliced_banks, slices

KERNELS = {"attention": 30, "routing": 40, "beside": 10, "experts": 15, "update": 1}
"""About how many a part starts on its way forward; its way back starts twice as many."""
NOTHING = torch.zeros(1, 1, dtype=torch.float64)


@dataclass(frozen=True)
class Work:
    """What each process computes; [D or 1, Q or 1]."""

    flops: Tensor
    strips: Tensor
    """FLOPs over the width of what is multiplied: what narrow matrices cost besides."""
    traffic: Tensor
    """Bytes read and written."""
    kernels: int
    hosted: Tensor = NOTHING
    """Bytes between device and host, or read and written there."""

    def times(self, factor: float, kernels: float | None = None) -> "Work":
        """More of it, as the way back is; or a piece, which starts as many kernels."""
        started = self.kernels * (factor if kernels is None else kernels)
        return Work(
            self.flops * factor, self.strips * factor, self.traffic * factor, round(started), self.hosted * factor
        )


class Amounts:
    """Of a job on a mesh. What layers that are the same come to is found once."""

    def __init__(self, job: Job, arrangement: Arrangement) -> None:
        """Raises UserError for experts that cannot be dealt out so."""
        self.job, self.arrangement, self.weights = job, arrangement, Weights.of(job, arrangement)
        self.tokens_DQ, self.work = job.tokens(arrangement), layer_work(job.decoder, job.seq_len)
        self.first: dict[str, int] = {}
        self._works_once = cache(self._works)
        self._legs_once = cache(partial(legs, job, arrangement, self.weights))
        self._slices_once = cache(partial(slices, job, arrangement, self.weights))

    def legs(self, depth: int) -> Legs | None:
        """How rows of the layer and experts that are dealt out come together; None where none is."""
        return self._legs_once(self._like(depth))

    def slices(self, depth: int) -> dict[str, Sliced]:
        """What tensor groups tell one another in a layer: for attention, beside, experts, where those are cut."""
        return self._slices_once(self._like(depth))

    def works(self, depth: int) -> dict[str, Work]:
        """What a layer computes on its way forward: attention, routing, beside, experts."""
        return self._works_once(self._like(depth))

    def head(self, flops: float, traffic: float) -> Work:
        """The output matrix with the loss, so many times; without FLOPs the embedding."""
        job = self.job
        width, vocabulary = job.model.d_model, job.model.vocab_size or 0
        each = 2.0 * vocabulary * width
        moved = (job.row + 8) * vocabulary if flops else 0
        table = float(job.value * vocabulary * width * (flops > 0))
        done = self.tokens_DQ * each * flops
        return Work(done, done / width, (self.tokens_DQ * (moved + 12 * width) + table) * traffic, 10)

    def _like(self, depth: int) -> int:
        """The first layer that is the same, so that what all such come to is found once."""
        if depth in self.job.loads:
            return depth
        return self.first.setdefault(self.job.model.applied_layers[depth].model_dump_json(), depth)

    def _works(self, depth: int) -> dict[str, Work]:
        job, index = self.job, depth % self.job.model.num_layers
        layer, work, block = job.model.applied_layers[depth], self.work[depth], job.decoder.blocks[index]
        kept = kept_by_block(job.model, layer, job.row, 1)
        size = {name: nbytes(list(part.parameters())) for name, part in block.named_children()}
        of_experts = nbytes([p for p in block.moe.banks.parameters()]) if layer.moe else 0  # type: ignore[union-attr]
        routing = nbytes(list(block.moe.router.parameters())) if layer.moe else 0  # type: ignore[union-attr]
        beside = size.get("mlp", 0) + size.get("moe", 0) - of_experts - routing
        attention = size.get("attention", 0)
        small = 12 * layer.moe.num_experts * layer.moe.heads if layer.moe else 0

        cut = {name: self.arrangement.tensor if name in self.slices(depth) else 1 for name in KERNELS}

        def part(name: str, flops: float, width: float, weights: int, moved: float, scores: float = 0.0) -> Work:
            strips, tokens = flops / width + scores / job.model.size_of_head, self.tokens_DQ
            if cut[name] > 1:  # a slice of the rows of all
                tokens = self.arrangement.mean(tokens)
            kernels = KERNELS[name] if flops or moved else 0
            return Work(tokens * (flops + scores), tokens * strips, weights / cut[name] + 2 * tokens * moved, kernels)

        width = job.model.d_model
        narrow = min(width, layer.moe.num_experts if layer.moe else width)
        return {
            "attention": part("attention", work.projections, width, attention, kept[0], work.scores),
            "routing": part("routing", work.routing, narrow, routing, small),
            "beside": part("beside", work.beside, width, beside, kept[1] - small),
            "experts": self._experts(depth, work, of_experts),
        }

    def _experts(self, depth: int, work: LayerWork, weights: int) -> Work:
        """Rows for the experts that a process holds, wherever they come from."""
        job, layer, index = self.job, self.job.model.applied_layers[depth], depth % self.job.model.num_layers
        if layer.moe is None:
            return Work(NOTHING, NOTHING, NOTHING, 0)
        edges_DQE, arrangement = job.edges(depth, self.arrangement), self.arrangement
        width = layer.moe.row_width(job.model.d_model)
        cost_E = 2.0 * torch.tensor(layer.moe.costs(width), dtype=torch.float64)
        mean = job.model.d_model / width * layer.moe.router.select.mean_experts(layer.moe.num_experts)
        fixed = max(0.0, work.experts - mean * float(cost_E.mean()))
        flops_DQ, rows_DQ = self.tokens_DQ * fixed, NOTHING
        banks, places = self.weights.banks[index], self.weights.places[index]
        for number, span in enumerate(experts_of(layer)):
            held_DQE = edges_DQE[..., span]
            if number in banks and arrangement.way != "fetch":
                held_DQE = arrived(held_DQE, places[number], arrangement)
            if arrangement.tensor > 1 and number in sliced_banks(layer):
                held_DQE = arrangement.mean(held_DQE)
            flops_DQ = flops_DQ + (held_DQE * cost_E[span]).sum(-1)
            rows_DQ = rows_DQ + held_DQE.sum(-1)
        if banks:
            weights = sum(nbytes(self.weights.held(index, number, 0)) for number in banks)
        kept = kept_by_block(job.model, layer, job.row, 1, edges=1.0)[2]
        narrow = min([width, *(bank.d_expert for bank in layer.moe.experts if hasattr(bank, "d_expert"))])
        return Work(
            flops_DQ, flops_DQ / narrow, weights + rows_DQ * (2 * kept + 4 * width * job.row), KERNELS["experts"]
        )
