"""What the process that needs most has to hold, by class."""

from dataclasses import asdict, dataclass

from moeforge.models.memory import activation_bytes
from moeforge.parallel.gradients import buckets
from moeforge.parallel.plan.job import Arrangement, Job, Weights, experts_of, nbytes
from moeforge.parallel.plan.messages import arrived, legs, slices


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
    host: int = 0
    """In the node's memory, for this process: parameters, gradients and moments that are offloaded."""

    @property
    def total(self) -> int:
        """All that is on the device."""
        return sum(asdict(self).values()) - self.host


def memory_of(job: Job, arrangement: Arrangement) -> Memory:
    """Raises UserError for experts that cannot be dealt out so."""
    weights = Weights.of(job, arrangement)
    size, offload = weights.size(arrangement), arrangement.offload
    own = size * (not offload)
    edges, came = _edges(job, arrangement, weights)
    tokens = int(job.tokens(arrangement).max())
    # An owner keeps the rows that came to it besides what its experts make of them.
    kept = activation_bytes(job.model, job.row, tokens, arrangement.recompute, edges)
    kept += (max if arrangement.recompute else sum)([0.0, *came.values()])
    buffers = _buffers(job, arrangement, weights) + 2 * max([0.0, *came.values()])
    return Memory(own, own, 2 * own, round(kept), round(buffers), 4 * size * offload)


def _edges(job: Job, arrangement: Arrangement, weights: Weights) -> tuple[dict[int, float], dict[int, float]]:
    """By depth: rows through the busiest process' experts, and bytes of those that came to it from others.

    A slice of the rows of all counts as its part of them; what they are gathered into comes on top.
    """
    edges, came = {}, {}
    for depth, layer in enumerate(job.model.applied_layers):
        if layer.moe is None:
            continue
        edges_DQE, rows, width = job.edges(depth, arrangement), 0.0, layer.moe.row_width(job.model.d_model)
        for number, span in enumerate(experts_of(layer)):
            held_DQE, placement = edges_DQE[..., span], weights.places[depth % job.model.num_layers].get(number)
            if placement is not None and arrangement.way != "fetch":
                held_DQE = arrived(held_DQE, placement, arrangement)
                moved = held_DQE.sum(-1)
                if arrangement.way == "by_index":
                    moved = arrangement.total(job.tokens(arrangement), "expert") * job.model.d_model / width
                came[depth] = came.get(depth, 0.0) + float(moved.max()) * width * job.row
            rows += float(held_DQE.sum(-1).max())
        edges[depth] = rows
        for part in slices(job, arrangement, weights, depth).values():
            gathered = float(arrangement.total(part.gather.sent, "tensor").max()) / (arrangement.tensor - 1)
            came[depth] = came.get(depth, 0.0) + gathered
    return edges, came


def _buffers(job: Job, arrangement: Arrangement, weights: Weights) -> float:
    """Sharded: the root, two blocks with their experts (one at work, one on its way), and one's whole gradients.

    And the experts that are fetched for a layer, with their gradients.
    """
    fetched = 0.0
    if arrangement.way == "fetch":
        each = (legs(job, arrangement, weights, depth) for depth in range(len(job.model.applied_layers)))
        fetched = 2 * max((float(leg.there[0].sent.sum(1).max()) for leg in each if leg), default=0.0)
    if not arrangement.shard:
        everything = [*weights.everywhere] * (arrangement.size > 1)
        everything += weights.dealt(0) * (arrangement.data > 1)
        return fetched + max((nbytes(bucket) for bucket in buckets(everything)), default=0)
    banks = [sum(nbytes(weights.held(d, number, 0)) for number in some) for d, some in enumerate(weights.banks)]
    blocks = [nbytes(block) for block in weights.blocks]
    whole = [block + bank * arrangement.cuts_banks for block, bank in zip(blocks, banks, strict=True)]
    return fetched + nbytes(weights.root) + 3 * max(whole)
