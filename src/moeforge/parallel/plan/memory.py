"""What the process that needs most has to hold, by class."""

from dataclasses import asdict, dataclass

from moeforge.models.memory import activation_bytes
from moeforge.parallel.gradients import buckets
from moeforge.parallel.plan.job import Arrangement, Job, Weights, experts_of, nbytes


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


def memory_of(job: Job, arrangement: Arrangement) -> Memory:
    """Raises UserError for experts that cannot be dealt out so."""
    weights = Weights.of(job, arrangement)
    everywhere, dealt = weights.everywhere, weights.shared_out
    cut = (arrangement.size, arrangement.data) if arrangement.shard else (1, 1)
    own = nbytes(everywhere, cut[0]) + nbytes(dealt, cut[1])
    edges, came = _edges(job, arrangement, weights)
    tokens = int(job.tokens(arrangement).max())
    # An owner keeps the rows that came to it besides what its experts make of them.
    kept = activation_bytes(job.model, job.row, tokens, arrangement.recompute, edges)
    kept += (max if arrangement.recompute else sum)([0.0, *came.values()])
    return Memory(
        own, own, 2 * own, round(kept), round(_buffers(job, arrangement, weights) + 2 * max([0.0, *came.values()]))
    )


def _edges(job: Job, arrangement: Arrangement, weights: Weights) -> tuple[dict[int, float], dict[int, float]]:
    """By depth: rows through the busiest process' experts, and bytes of those that came to it over the exchange."""
    edges, came = {}, {}
    for depth, layer in enumerate(job.model.applied_layers):
        if layer.moe is None:
            continue
        edges_DPE, rows, width = job.edges(depth, arrangement), 0.0, layer.moe.row_width(job.model.d_model)
        for number, place in enumerate(experts_of(layer)):
            held_DPE = edges_DPE[..., place]
            if number in weights.banks[depth % job.model.num_layers]:
                held_DPE = held_DPE.sum(1).unflatten(-1, (arrangement.expert, -1))
                came[depth] = came.get(depth, 0.0) + float(held_DPE.sum(-1).max()) * width * job.row
            rows += float(held_DPE.sum(-1).max())
        edges[depth] = rows
    return edges, came


def _buffers(job: Job, arrangement: Arrangement, weights: Weights) -> int:
    """Sharded: the root, two blocks with their experts (one at work, one on its way), and one's whole gradients."""
    if not arrangement.shard:
        groups = (parameters for parameters, size in _summed(arrangement, weights) if size > 1)
        return max((nbytes(bucket) for parameters in groups for bucket in buckets(parameters)), default=0)
    banks = [sum(nbytes(bank) for bank in some.values()) for some in weights.banks] if arrangement.data > 1 else []
    blocks = [nbytes(block) for block in weights.blocks]
    whole = [block + bank for block, bank in zip(blocks, banks or [0] * len(blocks), strict=True)]
    return nbytes(weights.root) + 3 * max(whole)


def _summed(arrangement: Arrangement, weights: Weights) -> list[tuple[list, int]]:
    return [(weights.everywhere, arrangement.size), (weights.shared_out, arrangement.data)]
