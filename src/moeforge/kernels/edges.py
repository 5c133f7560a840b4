"""What a kernel needs to know of a route: which rows go to which expert, and with what weight.

Shapes: T tokens, D d_model, H d_expert, E experts, K top_k, N edges.
"""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Edges(Protocol):
    """N weighted edges from tokens to experts, sorted by expert: what a router hands over is a ``moe.Route``."""

    @property
    def token(self) -> Tensor:
        """[N] int64: the source row of each edge."""

    @property
    def weight(self) -> Tensor:
        """[N] float32: the combine weight of each edge."""

    @property
    def ends(self) -> Tensor:
        """[E] int32: inclusive end of each expert's segment."""

    @property
    def num_tokens(self) -> int:
        """T, the number of rows that edges may name."""

    @property
    def top_k(self) -> int | None:
        """K when every token has exactly K edges."""

    @property
    def slot(self) -> Tensor | None:
        """[N] int64: t*K+k of each edge, set with ``top_k``."""


def segments(ends_E: Tensor) -> Iterator[tuple[int, int, int]]:
    """(expert, first edge, end edge) of every expert that has any."""
    low = 0
    for expert, high in enumerate(ends_E.tolist()):
        if high > low:
            yield expert, low, high
        low = high


class EdgeTensors(NamedTuple):
    """Edges as tensors alone: what autograd can save, and what padding makes."""

    token: Tensor
    weight: Tensor
    ends: Tensor
    num_tokens: int
    top_k: int | None = None
    slot: Tensor | None = None

    def cut(self, live: int) -> "EdgeTensors":
        """The first ``live`` edges, where that is not all of them."""
        if live == len(self.token):
            return self
        return self._replace(token=self.token[:live], weight=self.weight[:live])


def pad_segments(edges: Edges) -> EdgeTensors:
    """Lengthens each segment to one of eight lengths per power of two: by at most an eighth, up to 16 rows not at all.

    oneDNN compiles a kernel for each number of rows that it meets, which costs far more than the few rows added here.
    An added edge repeats its segment's last one, so an expert meets no row that was not sent to it anyway. While
    ``torch.compile`` traces, the edges are as many as there could be, and those past ``ends[-1]`` belong to nobody.
    """
    end_E, num_edges = edges.ends.long(), len(edges.token)
    count_E = end_E.diff(prepend=end_E.new_zeros(1))
    step_E = 1 << (torch.frexp(count_E.double()).exponent - 4).clamp_min(0).long()
    padded_end_E = ((count_E + step_E - 1) // step_E * step_E).cumsum(0)
    # One entry more than experts: what a tail of padding is moved by, and where it ends.
    added_F = torch.cat([end_E.new_zeros(1), padded_end_E - end_E])
    end_F = torch.cat([end_E, end_E.new_full((1,), num_edges)])
    room = num_edges // 8 if torch.compiler.is_compiling() else int(added_F[-1])
    row_P = torch.arange(num_edges + room, device=end_E.device)
    segment_P = torch.searchsorted(padded_end_E, row_P, right=True)
    source_P = torch.minimum(row_P - added_F[segment_P], end_F[segment_P] - 1)
    row_N = row_P[:num_edges]
    place_N = row_N + added_F[torch.searchsorted(end_E, row_N, right=True)]
    weight_P = edges.weight.new_zeros(len(row_P)).index_copy(0, place_N, edges.weight)
    return EdgeTensors(edges.token[source_P], weight_P, padded_end_E.to(torch.int32), edges.num_tokens)


def sum_by_token(values_ND: Tensor, edges: Edges) -> Tensor:
    """[T, D] sum of each token's edge rows, in float32 (float64 stays), in an order that no other token changes.

    With ``top_k`` set it is a permutation and a sum over K; autograd keeps only indices either way, never the rows.
    """
    accumulate = torch.promote_types(values_ND.dtype, torch.float32)
    if edges.slot is not None and edges.top_k is not None:
        order_N = torch.empty_like(edges.slot)
        order_N[edges.slot] = torch.arange(len(order_N), device=order_N.device)
        slots = values_ND.index_select(0, order_N).view(edges.num_tokens, edges.top_k, values_ND.shape[1])
        return slots[:, 0].to(accumulate) if edges.top_k == 1 else slots.sum(1, dtype=accumulate)
    total_TD = values_ND.new_zeros(edges.num_tokens, values_ND.shape[1], dtype=accumulate)
    # scatter_add saves only its index for backward; index_add would keep all N rows alive.
    return total_TD.scatter_add(0, edges.token[:, None].expand_as(values_ND), values_ND.to(accumulate))
