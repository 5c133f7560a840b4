"""What the process that needs most has to hold, by class."""

from dataclasses import asdict, dataclass

from moeforge.models.memory import activation_bytes
from moeforge.parallel.gradients import buckets
from moeforge.parallel.plan.job import Job, Layout, Weights, experts_of, nbytes


@dataclass(frozen=True)
class Memory:
    """Bytes."""

    parameters: int
    gradients: int
    optimizer: int
    """Two moments of AdamW."""
    activations: int
    """Kept from the way forward for the way back; an estimate."""
    buffers: int
    """Gradients on their way, gathered blocks, rows on their way; an estimate."""

    @property
    def total(self) -> int:
        """All."""
        return sum(asdict(self).values())


def memory_of(job: Job, layout: Layout) -> Memory:
    """Raises UserError for experts that cannot be dealt out so."""
    weights = Weights.of(job, layout)
    everywhere, dealt = weights.everywhere, weights.shared_out
    cut = (layout.size, layout.data) if layout.shard else (1, 1)
    own = nbytes(everywhere, cut[0]) + nbytes(dealt, cut[1])
    edges, came = _edges(job, layout, weights)
    tokens = int(job.tokens(layout).max())
    # An owner keeps the rows that came to it besides what its experts make of them.
    kept = activation_bytes(job.model, job.row, tokens, layout.recompute, edges)
    kept += (max if layout.recompute else sum)([0.0, *came.values()])
    return Memory(
        own, own, 2 * own, round(kept), round(_buffers(job, layout, weights) + 2 * max([0.0, *came.values()]))
    )


def _edges(job: Job, layout: Layout, weights: Weights) -> tuple[dict[int, float], dict[int, float]]:
    """By depth: rows through the busiest process' experts, and bytes of those that came to it over the exchange."""
    edges, came = {}, {}
    for depth, layer in enumerate(job.model.applied_layers):
        if layer.moe is None:
            continue
        edges_DPE, rows, width = job.edges(depth, layout), 0.0, layer.moe.row_width(job.model.d_model)
        for number, place in enumerate(experts_of(layer)):
            held_DPE = edges_DPE[..., place]
            if number in weights.banks[depth % job.model.num_layers]:
                held_DPE = held_DPE.sum(1).unflatten(-1, (layout.expert, -1))
                came[depth] = came.get(depth, 0.0) + float(held_DPE.sum(-1).max()) * width * job.row
            rows += float(held_DPE.sum(-1).max())
        edges[depth] = rows
    return edges, came


def _buffers(job: Job, layout: Layout, weights: Weights) -> int:
    """Sharded: the root, two blocks with their experts (one at work, one on its way), and one's whole gradients."""
    if not layout.shard:
        groups = (parameters for parameters, size in _summed(layout, weights) if size > 1)
        return max((nbytes(bucket) for parameters in groups for bucket in buckets(parameters)), default=0)
    banks = [sum(nbytes(bank) for bank in some.values()) for some in weights.banks] if layout.data > 1 else []
    blocks = [nbytes(block) for block in weights.blocks]
    whole = [block + bank for block, bank in zip(blocks, banks or [0] * len(blocks), strict=True)]
    return nbytes(weights.root) + 3 * max(whole)


def _summed(layout: Layout, weights: Weights) -> list[tuple[list, int]]:
    return [(weights.everywhere, layout.size), (weights.shared_out, layout.data)]
