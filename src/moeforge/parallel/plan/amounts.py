"""How much a step's operations are: FLOPs, bytes of memory, bytes to others. ``step`` says in which order they come."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from moeforge.models.count import LayerWork, layer_work
from moeforge.models.memory import kept_by_block
from moeforge.parallel.plan.job import Arrangement, Job, Weights, experts_of, nbytes

KERNELS = {"attention": 30, "routing": 40, "beside": 10, "experts": 15, "update": 1}
"""About how many a part starts on its way forward; its way back starts twice as many."""
FLOAT64 = 8
"""Bytes of a number in counts, loads, and sums of losses."""
NOTHING = torch.zeros(1, 1, dtype=torch.float64)


@dataclass(frozen=True)
class Work:
    """What each process computes; [D or 1, P or 1]."""

    flops: Tensor
    strips: Tensor
    """FLOPs over the width of what is multiplied: what narrow matrices cost besides."""
    traffic: Tensor
    """Bytes read and written."""
    kernels: int

    def times(self, factor: float, kernels: float | None = None) -> "Work":
        """More of it, as the way back is; or a piece, which starts as many kernels."""
        started = self.kernels * (factor if kernels is None else kernels)
        return Work(self.flops * factor, self.strips * factor, self.traffic * factor, round(started))


@dataclass(frozen=True)
class Message:
    """A collective in every group along an axis."""

    kind: str
    axis: str
    sent: Tensor
    """Bytes: of all_to_all [D or 1, P, P] from and to, nothing to oneself; of others [] what each process sends."""
    calls: int = 1
    """Collectives that it stands for."""


class Amounts:
    """Of a job on a mesh. What layers that are the same come to is found once."""

    def __init__(self, job: Job, arrangement: Arrangement) -> None:
        """Raises UserError for experts that cannot be dealt out so."""
        self.job, self.arrangement, self.weights = job, arrangement, Weights.of(job, arrangement)
        self.tokens_DP, self.work = job.tokens(arrangement), layer_work(job.decoder, job.seq_len)
        self.first: dict[str, int] = {}
        self._sends_once, self._works_once = cache(self._sends), cache(self._works)

    def sends(self, depth: int) -> tuple[Message, Message, Message] | None:
        """(counts, rows out, rows back) of the layer's banks that are dealt out; None where none is."""
        return self._sends_once(self._like(depth))

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
        done = self.tokens_DP * each * flops
        return Work(done, done / width, (self.tokens_DP * (moved + 12 * width) + table) * traffic, 10)

    def _like(self, depth: int) -> int:
        """The first layer that is the same, so that what all such come to is found once."""
        if depth in self.job.loads:
            return depth
        return self.first.setdefault(self.job.model.applied_layers[depth].model_dump_json(), depth)

    def _sends(self, depth: int) -> tuple[Message, Message, Message] | None:
        job, size, index = self.job, self.arrangement.expert, depth % self.job.model.num_layers
        banks, layer = self.weights.banks[index], job.model.applied_layers[depth]
        if not banks or layer.moe is None:
            return None
        edges_DPE, places = job.edges(depth, self.arrangement), experts_of(layer)
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
        job, index = self.job, depth % self.job.model.num_layers
        layer, work, block = job.model.applied_layers[depth], self.work[depth], job.decoder.blocks[index]
        kept = kept_by_block(job.model, layer, job.row, 1)
        size = {name: nbytes(list(part.parameters())) for name, part in block.named_children()}
        of_experts = nbytes([p for p in block.moe.banks.parameters()]) if layer.moe else 0  # type: ignore[union-attr]
        routing = nbytes(list(block.moe.router.parameters())) if layer.moe else 0  # type: ignore[union-attr]
        beside = size.get("mlp", 0) + size.get("moe", 0) - of_experts - routing
        attention = size.get("attention", 0)
        small = 12 * layer.moe.num_experts * layer.moe.heads if layer.moe else 0

        def part(name: str, flops: float, width: float, weights: int, moved: float, scores: float = 0.0) -> Work:
            tokens, strips = self.tokens_DP, flops / width + scores / job.model.size_of_head
            kernels = KERNELS[name] if flops or moved else 0
            return Work(tokens * (flops + scores), tokens * strips, weights + 2 * tokens * moved, kernels)

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
        edges_DPE, size = job.edges(depth, self.arrangement), self.arrangement.expert
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
        narrow = min([width, *(bank.d_expert for bank in layer.moe.experts if hasattr(bank, "d_expert"))])
        return Work(
            flops_DP, flops_DP / narrow, weights + rows_DP * (2 * kept + 4 * width * job.row), KERNELS["experts"]
        )
