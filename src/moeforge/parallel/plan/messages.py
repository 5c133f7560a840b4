"""What a layer's processes send one another on its way forward and back: rows to experts, or experts to rows; slices.

Of a team of Q processes, P tensor groups of t neighbours. Sizes are bytes; between two processes [D or 1, Q, Q] from
and to, nothing to oneself, else [D or 1, Q] that each sends.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from moeforge.models import LayerConfig
from moeforge.models.heads import AllHeads, LatentHeads
from moeforge.parallel.placement import Placement
from moeforge.parallel.plan.job import Arrangement, Job, Weights, experts_of, nbytes
from moeforge.parallel.slices import SLICED

FLOAT64 = 8
"""Bytes of a number in counts, loads, and sums of losses."""


@dataclass(frozen=True)
class Message:
    """A collective in every group along an axis."""

    kind: str
    axis: str
    sent: Tensor
    """Bytes: of all_to_all [D or 1, Q, Q] from and to, nothing to oneself; of others what each process sends, [] or
    [D or 1, Q]."""
    calls: int = 1
    """Collectives that it stands for."""


@dataclass(frozen=True)
class Legs:
    """Messages of a layer's dealt banks; those but ``told`` go in as many parts as there are chunks."""

    told: tuple[Message, ...]
    """Before anything: who has how much for whom."""
    there: tuple[Message, ...]
    home: tuple[Message, ...]
    home_back: tuple[Message, ...]
    """Gradients of what came home, and whatever else is needed before those of experts."""
    there_back: tuple[Message, ...]


@dataclass(frozen=True)
class Sliced:
    """Messages of a part that tensor groups have cut. In the way back there are as many, and as large, but for
    ``weights``."""

    told: tuple[Message, ...]
    """Counts, then places and weights of edges; nothing where there are none."""
    gather: Message
    scatter: Message
    weights: Message | None = None
    """Gradients of the edges' weights, scattered on the way back."""


def legs(job: Job, arrangement: Arrangement, weights: Weights, depth: int) -> Legs | None:
    """None where no bank is dealt out."""
    index, layer = depth % job.model.num_layers, job.model.applied_layers[depth]
    banks = weights.places[index]
    if not banks or layer.moe is None:
        return None
    edges_DQE, spans = job.edges(depth, arrangement), experts_of(layer)
    sizes = [
        (sum(placement.sizes[place] for placement in banks.values())) for place in range(arrangement.expert)
    ]  # places of each process
    count = torch.tensor(sizes, dtype=torch.float64)
    everyone_DQQ = _apart(count.expand(1, arrangement.team, -1), arrangement)
    if arrangement.way == "fetch":
        told = {depth for depth, load in job.loads.items() if load.ndim == 2}
        needs = [
            _needed(edges_DQE[..., spans[n]], placement, nbytes(weights.banks[index][n]), arrangement, depth in told)
            for n, placement in banks.items()
        ]
        fetched = Message("all_to_all", "expert", sum(needs, start=torch.zeros(1, 1, 1)), len(needs))
        given = Message("all_to_all", "expert", fetched.sent.mT, len(needs))
        return Legs((Message("all_to_all", "expert", everyone_DQQ, len(banks)),), (fetched,), (), (fetched,), (given,))
    away_DQQ = sum(
        (_apart(edges_DQE[..., spans[n]] @ _holders(placement), arrangement) for n, placement in banks.items()),
        start=torch.zeros(1, 1, 1),
    )
    told = _levels(FLOAT64 * everyone_DQQ, arrangement, len(banks))
    row, calls = layer.moe.row_width(job.model.d_model) * job.row, len(banks)
    if arrangement.way == "exchange":
        out = _levels(away_DQQ * (row + job.value), arrangement, 2 * calls)
        home = _levels(away_DQQ * row, arrangement, calls)
        return Legs(told, out, home[::-1], home, out[::-1])
    tokens_DQ = job.tokens(arrangement)
    others, rows_DQ = arrangement.expert - 1, tokens_DQ * job.model.d_model * job.row * calls
    had_DQ = arrangement.total(tokens_DQ, "expert") * job.model.d_model * job.row * calls - rows_DQ
    gather = Message("all_gather", "expert", others * rows_DQ, calls)
    scatter = Message("reduce_scatter", "expert", had_DQ, calls)
    met = Message("all_gather", "expert", torch.full((1, arrangement.team), float(others * FLOAT64 * calls)), calls)
    edges = Message("all_to_all", "expert", away_DQQ * (FLOAT64 + job.value), 2 * calls)
    back = Message("all_to_all", "expert", away_DQQ * job.value, calls)
    return Legs((*told, met), (edges, gather), (scatter,), (gather,), (scatter, back))


@lru_cache
def _holders(placement: Placement) -> Tensor:
    """[E, P]: the part of an expert's rows that goes to each process."""
    at_EP = torch.zeros(len(placement.copies), len(placement.held), dtype=torch.float64)
    for place, experts in enumerate(placement.held):
        at_EP[list(experts), place] = 1
    return at_EP / placement.copies[:, None]


def _apart(sent_DQP: Tensor, arrangement: Arrangement) -> Tensor:
    """[D, Q, P] from each process to those of its expert group -> [D, Q, Q], nothing to oneself."""
    apart = sent_DQP.unflatten(1, (-1, arrangement.tensor)).double()
    slices = torch.eye(arrangement.tensor, dtype=torch.float64)
    sent_DQQ = torch.einsum("dptr,tu->dptru", apart, slices).flatten(3).flatten(1, 2)
    return sent_DQQ * (1 - torch.eye(arrangement.team, dtype=torch.float64))


def _levels(sent_DQQ: Tensor, arrangement: Arrangement, calls: int) -> tuple[Message, ...]:
    """One message, or two: to the neighbour who has the owner's place inside its machine, then across."""
    if arrangement.node is None:
        return (Message("all_to_all", "expert", sent_DQQ, calls),)
    machines, inside = arrangement.expert // arrangement.inside, arrangement.inside * arrangement.tensor
    # From machine m, place g, to machine n, place h.
    apart = sent_DQQ.unflatten(2, (machines, inside)).unflatten(1, (machines, inside))
    near = torch.einsum("dmgnh,mk->dmgkh", apart, torch.eye(machines, dtype=torch.float64))
    far = torch.einsum("dmgnh,hk->dmhnk", apart, torch.eye(inside, dtype=torch.float64))
    off = 1 - torch.eye(arrangement.team, dtype=torch.float64)
    return (
        Message("all_to_all", "inside", near.flatten(3).flatten(1, 2) * off, calls),
        Message("all_to_all", "across", far.flatten(3).flatten(1, 2) * off, calls),
    )


def _needed(edges_DQE: Tensor, placement: Placement, size: int, arrangement: Arrangement, exact: bool) -> Tensor:
    """[D, Q, Q] bytes from owners: experts that a process, with its tensor group, has rows for.

    Where edges are means and not ``exact``, an expert has none as often as a Poisson number of that mean is none.
    """
    rows_DQE = arrangement.mean(edges_DQE) * arrangement.tensor / placement.copies
    need_DQE = (rows_DQE > 0).double() if exact else 1 - torch.exp(-rows_DQE)
    held_EP = (_holders(placement) > 0).double()
    return _apart(need_DQE @ held_EP, arrangement).mT * (size / len(placement.copies))


def arrived(edges_DQE: Tensor, placement: Placement, arrangement: Arrangement) -> Tensor:
    """[D or 1, Q, E] rows that each process has for experts -> that its own experts get, from all its expert group."""
    all_DTE = edges_DQE.unflatten(1, (-1, arrangement.tensor)).sum(1)
    at_DPTE = all_DTE[:, None] * _holders(placement).T[None, :, None]
    return at_DPTE.flatten(1, 2)


def sliced_banks(layer: LayerConfig) -> list[int]:
    """Numbers of a layer's banks that the tensor axis cuts."""
    return [n for n, bank in enumerate(layer.moe.experts) if isinstance(bank, SLICED)] if layer.moe else []


def slices(job: Job, arrangement: Arrangement, weights: Weights, depth: int) -> dict[str, Sliced]:
    """By part: attention, beside, experts."""
    layer, others, found = job.model.applied_layers[depth], arrangement.tensor - 1, {}
    if not others:
        return {}

    def rows(rows_DQ: Tensor, calls: int = 1) -> tuple[Message, Message]:
        """Each gives the others its own, and keeps of the sums its own."""
        size_DQ = rows_DQ * job.row
        had_DQ = arrangement.total(size_DQ, "tensor") - size_DQ
        return Message("all_gather", "tensor", others * size_DQ, calls), Message(
            "reduce_scatter", "tensor", had_DQ, calls
        )

    dense_DQ = job.tokens(arrangement) * job.model.d_model
    if layer.attends and isinstance(layer.attention, AllHeads | LatentHeads):
        found["attention"] = Sliced((), *rows(dense_DQ))
    if layer.moe is None or layer.moe.shared is not None:
        found["beside"] = Sliced((), *rows(dense_DQ))
    if layer.moe is None or not sliced_banks(layer):
        return found
    edges_DQE, width, places = job.edges(depth, arrangement), layer.moe.row_width(job.model.d_model), experts_of(layer)
    values_DQ, edges_DQ = torch.zeros(2, 1, arrangement.team, dtype=torch.float64)
    numbers, index = torch.zeros(1, arrangement.team, dtype=torch.float64), depth % job.model.num_layers
    for number in sliced_banks(layer):
        placement, held_DQE = weights.places[index].get(number), edges_DQE[..., places[number]]
        experts = [layer.moe.experts[number].num_experts] * arrangement.team
        values, own = dense_DQ, held_DQE.sum(-1)
        if placement is not None and arrangement.way != "fetch":
            experts = [size for size in placement.sizes for _ in range(arrangement.tensor)]
            own = arrived(held_DQE, placement, arrangement).sum(-1)
            values = own * width if arrangement.way == "exchange" else arrangement.total(dense_DQ, "expert")
        numbers = numbers + FLOAT64 * (1 + torch.tensor(experts, dtype=torch.float64))
        values_DQ, edges_DQ = values_DQ + values, edges_DQ + own
    calls = len(sliced_banks(layer))
    gather, scatter = rows(values_DQ, calls)
    counts = Message("all_gather", "tensor", others * numbers, calls)
    edges = Message("all_gather", "tensor", others * (FLOAT64 + job.value) * edges_DQ, 2 * calls)
    had = (arrangement.total(edges_DQ, "tensor") - edges_DQ) * job.value
    found["experts"] = Sliced((counts, edges), gather, scatter, Message("reduce_scatter", "tensor", had, calls))
    return found
