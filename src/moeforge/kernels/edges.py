"""What a kernel needs to know of a route: which rows go to which expert, and with what weight.

Shapes: T tokens, D d_model, H d_expert, E experts, K top_k, N edges.
"""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor


class Edges(Protocol):
    """N weighted edges from tokens to experts, sorted by expert. ``moe.Route`` is the one implementation."""

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


def sum_by_token(values_ND: Tensor, edges: Edges) -> Tensor:
    """[T, D] sum of each token's edge rows, in float32 (float64 stays), in an order that no other token changes.

    With ``top_k`` set it is a permutation and a sum over K; autograd keeps only indices either way, never the rows.
    """
    accumulate = torch.promote_types(values_ND.dtype, torch.float32)
    if edges.slot is not None and edges.top_k is not None:
        order_N = torch.empty_like(edges.slot)
        order_N[edges.slot] = torch.arange(len(order_N), device=order_N.device)
        slots = values_ND.index_select(0, order_N).view(edges.num_tokens, edges.top_k, -1)
        return slots[:, 0].to(accumulate) if edges.top_k == 1 else slots.sum(1, dtype=accumulate)
    total_TD = values_ND.new_zeros(edges.num_tokens, values_ND.shape[1], dtype=accumulate)
    # scatter_add saves only its index for backward; index_add would keep all N rows alive.
    return total_TD.scatter_add(0, edges.token[:, None].expand_as(values_ND), values_ND.to(accumulate))
