"""Attention with keys and values of its own: grouped or routed queries, optional biases, norms, limits and sinks."""

import torch
from torch import Tensor, nn

from moeforge.models.attention.cache import BlockLayer, LayerCache
from moeforge.models.attention.mix import attend, received
from moeforge.models.attention.positions import Positions, rotate
from moeforge.models.attention.routed import PerExpert, places
from moeforge.models.config import ModelConfig
from moeforge.models.heads import AllHeads, RoutedHeads
from moeforge.moe import Route, Router


class Attention(nn.Module):
    """[B, L, D] -> [B, L, D]. With a ``router``, its route says which experts' queries a token has."""

    def __init__(
        self, config: ModelConfig, heads: AllHeads | RoutedHeads | None = None, window: int | None = None
    ) -> None:
        super().__init__()
        self.head_dim, d_model, self.window = config.size_of_head, config.d_model, window
        self.heads, self.interleaved, self.qk_norm = heads or AllHeads(), config.rope_interleaved, config.qk_norm
        routed, keys = isinstance(self.heads, RoutedHeads), config.num_key_heads * self.head_dim
        qkv_bias, o_bias = self.heads.qkv_bias, self.heads.o_bias
        if isinstance(self.heads, RoutedHeads):
            experts, width = self.heads.num_experts, self.heads.per_expert(config) * self.head_dim
            self.router, frozen = Router(self.heads.router, d_model, experts), self.heads.frozen_experts
        else:
            self.router, experts, width, frozen = None, 0, config.num_heads * self.head_dim, 0
        self.q_proj = PerExpert(experts, d_model, width, frozen) if routed else nn.Linear(d_model, width, bias=qkv_bias)
        self.k_proj, self.v_proj = (
            PerExpert(experts, d_model, width, frozen) if frozen else nn.Linear(d_model, keys, bias=qkv_bias)
            for _ in range(2)
        )
        self.o_proj = PerExpert(experts, width, d_model, frozen) if routed else nn.Linear(width, d_model, bias=o_bias)
        sizes = (width, keys) if self.qk_norm == "whole" else (self.head_dim, self.head_dim)
        self.q_norm, self.k_norm = (
            nn.RMSNorm(size, eps=config.norm_eps) if self.qk_norm else nn.Identity() for size in sizes
        )
        self.sinks = nn.Parameter(torch.zeros(config.num_heads)) if self.heads.sinks else None

    def forward(
        self, x: Tensor, positions: Positions, cache: LayerCache | BlockLayer | None = None, route: Route | None = None
    ) -> Tensor:
        """One pass; with a cache, x is what follows what the cache holds."""
        queries, keys = self._queries_and_keys(x, positions, route)
        values = self._clipped(self._heads(self.v_proj(x)))
        if isinstance(cache, BlockLayer):
            mixed = cache.attend(queries, (keys, values), self.heads.scale, self.sinks)
        else:
            if cache is not None:
                keys, values = cache.append(keys, values)
            mixed = attend(queries, keys, values, positions.masks[self.window], self.heads.scale, self.sinks)
        return self._output(mixed.transpose(1, 2).flatten(2), x, route)

    def _queries(self, x: Tensor, route: Route | None) -> Tensor:
        """[B, L, heads * head_dim]; heads that share a key head stand side by side; own keys have their order."""
        if route is None:
            return self.q_proj(x)
        rows_NQ = self.q_proj(route.gather(x.flatten(0, 1)), route.ends)
        place_N, width = self._places(route)
        spread = rows_NQ.new_zeros(route.num_tokens * width, rows_NQ.shape[1]).index_copy(0, place_N, rows_NQ)
        by_place = spread.view(*x.shape[:2], width, -1, self.head_dim)
        return (by_place if self._own_keys else by_place.transpose(2, 3)).flatten(2)

    def _output(self, mixed: Tensor, x: Tensor, route: Route | None) -> Tensor:
        """[B, L, heads * head_dim] -> [B, L, D]."""
        if route is None:
            return self.o_proj(mixed)
        place_N, width = self._places(route)
        if self._own_keys:
            by_place = mixed.unflatten(2, (width, -1))
        else:
            by_place = mixed.unflatten(2, (-1, width, self.head_dim)).transpose(2, 3).flatten(3)
        rows_NV = self.o_proj(by_place.flatten(0, 2)[place_N], route.ends)
        return route.combine(rows_NV, x.flatten(0, 1)).view_as(x)

    @property
    def _own_keys(self) -> bool:
        return isinstance(self.heads, RoutedHeads) and self.heads.keys == "own"

    def _places(self, route: Route) -> tuple[Tensor, int]:
        """(place [N], W): where among T * W an edge's query stands. With own keys that is its expert's place."""
        if self._own_keys:
            return route.token * route.num_experts + route.expert, route.num_experts
        return places(route)

    @torch.no_grad()
    def received(self, x: Tensor, positions: Positions, route: Route | None = None) -> Tensor:
        """[B, L, D] -> [B, L] float32: attention to each token, mean over heads and the queries that may look at it.

        Among these tokens alone, not what a cache holds.
        """
        queries, keys = self._queries_and_keys(x, positions, route)
        return received(queries, keys, positions.masks[self.window], self.heads.scale, self.sinks)

    def _queries_and_keys(self, x: Tensor, positions: Positions, route: Route | None) -> tuple[Tensor, Tensor]:
        """[B, heads, L, head_dim] each, rotated."""
        projected = (self.q_norm, self._queries(x, route)), (self.k_norm, self.k_proj(x))
        queries, keys = (self._turned(norm, heads, positions) for norm, heads in projected)
        return queries, keys

    def _turned(self, norm: nn.Module, projected: Tensor, positions: Positions) -> Tensor:
        whole = self.qk_norm == "whole"
        heads = self._clipped(self._heads(norm(projected)) if whole else norm(self._heads(projected)))
        return rotate(heads, positions.cos, positions.sin, self.interleaved).to(projected.dtype)

    def _clipped(self, heads: Tensor) -> Tensor:
        limit = self.heads.clip
        return heads if limit is None else heads.clamp(-limit, limit)

    def _heads(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
