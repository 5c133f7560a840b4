"""Attention heads as experts: matrices of their own, and where a token's own heads stand among all."""

import torch
from torch import Tensor, nn

from moeforge.moe import Route
from moeforge.moe.bank import by_expert, matrix


class PerExpert(nn.Module):
    """A matrix for each expert, those of the first ones frozen."""

    def __init__(self, num_experts: int, d_in: int, d_out: int, frozen: int = 0) -> None:
        super().__init__()
        self.prior = matrix(frozen, d_out, d_in).requires_grad_(False) if frozen else None
        self.weight = matrix(num_experts - frozen, d_out, d_in)

    @property
    def stack(self) -> Tensor:
        """[E, d_out, d_in]."""
        return self.weight if self.prior is None else torch.cat([self.prior, self.weight])

    def forward(self, rows_ND: Tensor, ends_E: Tensor | None = None) -> Tensor:
        """[N, d_in] rows sorted by expert -> [N, d_out]; without ``ends``, any rows -> [..., E * d_out] of all."""
        if ends_E is None:
            return nn.functional.linear(rows_ND, self.stack.flatten(0, 1))
        return by_expert(rows_ND, ends_E, self.stack)


def places(route: Route) -> tuple[Tensor, int]:
    """(place [N], W) of each edge when every token has room for as many edges as the busiest token has."""
    if route.slot is not None and route.top_k is not None:
        return route.slot, route.top_k
    count_T = torch.bincount(route.token, minlength=route.num_tokens)
    order_N, width = route.token.argsort(stable=True), max(1, int(count_T.max()))
    rank_N = torch.arange(len(order_N), device=order_N.device) - (count_T.cumsum(0) - count_T)[route.token[order_N]]
    return torch.empty_like(order_N).scatter(0, order_N, route.token[order_N] * width + rank_N), width
