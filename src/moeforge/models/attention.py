"""Causal self-attention: grouped or routed queries, rotary positions, optional norm on queries and keys, KV cache."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moeforge.models.config import ModelConfig
from moeforge.models.heads import AllHeads, RoutedHeads
from moeforge.moe import Route, Router
from moeforge.moe.bank import matrix


@dataclass(frozen=True)
class Positions:
    """What attention must know of the batch; made once per forward pass and shared by all layers."""

    cos: Tensor
    """[B, 1, L, head_dim]."""
    sin: Tensor
    """[B, 1, L, head_dim]."""
    mask: Tensor | None
    """[B, 1, L, past + L] bool, true where a query may look; None means plain causal."""


class LayerCache:
    """Keys and values of one layer, [B, heads, max_len, head_dim], filled from the left."""

    def __init__(self, batch_size: int, config: ModelConfig, max_len: int, like: Tensor) -> None:
        shape = (batch_size, config.num_key_heads, max_len, config.size_of_head)
        self.keys, self.values = like.new_zeros(shape), like.new_zeros(shape)
        self.length = 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Stores [B, heads, L, head_dim] and returns all that is stored so far."""
        end = self.length + keys.shape[2]
        self.keys[:, :, self.length : end], self.values[:, :, self.length : end] = keys, values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class PerExpert(nn.Module):
    """A matrix for each expert, over rows that are sorted by expert."""

    def __init__(self, num_experts: int, d_in: int, d_out: int) -> None:
        super().__init__()
        self.weight = matrix(num_experts, d_out, d_in)

    def forward(self, rows_ND: Tensor, ends_E: Tensor) -> Tensor:
        """[N, d_in] -> [N, d_out]."""
        parts = rows_ND.tensor_split(ends_E[:-1].cpu().long())
        return torch.cat([F.linear(part, weight) for part, weight in zip(parts, self.weight.unbind(), strict=True)])


class Attention(nn.Module):
    """[B, L, D] -> [B, L, D]. With a ``router``, its route says which experts' queries a token has."""

    def __init__(self, config: ModelConfig, heads: AllHeads | RoutedHeads | None = None) -> None:
        super().__init__()
        self.head_dim, d_model = config.size_of_head, config.d_model
        self.heads = heads or AllHeads()
        routed, keys = isinstance(self.heads, RoutedHeads), config.num_key_heads * self.head_dim
        if isinstance(self.heads, RoutedHeads):
            experts, width = self.heads.num_experts, self.heads.per_expert(config) * self.head_dim
            self.router = Router(self.heads.router, d_model, experts)
        else:
            self.router, experts, width = None, 0, config.num_heads * self.head_dim
        self.q_proj = PerExpert(experts, d_model, width) if routed else nn.Linear(d_model, width, bias=False)
        self.k_proj = nn.Linear(d_model, keys, bias=False)
        self.v_proj = nn.Linear(d_model, keys, bias=False)
        self.o_proj = PerExpert(experts, width, d_model) if routed else nn.Linear(width, d_model, bias=False)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(
        self, x: Tensor, positions: Positions, cache: LayerCache | None = None, route: Route | None = None
    ) -> Tensor:
        """One pass; with a cache, x is what follows what the cache holds."""
        queries, keys = self._queries_and_keys(x, positions, route)
        values = self._heads(self.v_proj(x))
        if cache is not None:
            keys, values = cache.append(keys, values)
        causal = positions.mask is None and queries.shape[2] > 1
        grouped = queries.shape[1] != keys.shape[1]
        mixed = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=positions.mask, is_causal=causal, enable_gqa=grouped
        )
        return self._output(mixed.transpose(1, 2).flatten(2), x, route)

    def _queries(self, x: Tensor, route: Route | None) -> Tensor:
        """[B, L, heads * head_dim]; heads that share a key head stand side by side."""
        if route is None:
            return self.q_proj(x)
        rows_NQ = self.q_proj(route.gather(x.flatten(0, 1)), route.ends)
        place_N, width = self._places(route)
        spread = rows_NQ.new_zeros(route.num_tokens * width, rows_NQ.shape[1]).index_copy(0, place_N, rows_NQ)
        return spread.view(*x.shape[:2], width, -1, self.head_dim).transpose(2, 3).flatten(2)

    def _output(self, mixed: Tensor, x: Tensor, route: Route | None) -> Tensor:
        """[B, L, heads * head_dim] -> [B, L, D]."""
        if route is None:
            return self.o_proj(mixed)
        place_N, width = self._places(route)
        by_place = mixed.unflatten(2, (-1, width, self.head_dim)).transpose(2, 3).flatten(3).flatten(0, 2)
        return route.combine(self.o_proj(by_place[place_N], route.ends), x.flatten(0, 1)).view_as(x)

    def _places(self, route: Route) -> tuple[Tensor, int]:
        """(place [N], W): where among T * W an edge's query stands. With own keys that is its expert's place."""
        if isinstance(self.heads, RoutedHeads) and self.heads.keys == "own":
            return route.token * route.num_experts + route.expert, route.num_experts
        return places(route)

    @torch.no_grad()
    def received(self, x: Tensor, positions: Positions, route: Route | None = None) -> Tensor:
        """[B, L, D] -> [B, L] float32: attention to each token, mean over heads and the queries that may look at it.

        Among these tokens alone, not what a cache holds.
        """
        queries, keys = self._queries_and_keys(x, positions, route)
        keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
        scores = queries.float() @ keys.float().transpose(2, 3) / self.head_dim**0.5
        plain = torch.ones(scores.shape[2:], dtype=torch.bool, device=x.device).tril()
        looks = plain if positions.mask is None else positions.mask[..., -scores.shape[3] :]
        attention = scores.masked_fill(~looks, -torch.inf).softmax(-1).mean(1, keepdim=True)
        return (attention.sum(2) / looks.sum(-2)).squeeze(1)

    def _queries_and_keys(self, x: Tensor, positions: Positions, route: Route | None) -> tuple[Tensor, Tensor]:
        queries, keys = self._heads(self._queries(x, route)), self._heads(self.k_proj(x))
        dtype = keys.dtype
        queries = rotate(self.q_norm(queries), positions.cos, positions.sin).to(dtype)
        return queries, rotate(self.k_norm(keys), positions.cos, positions.sin).to(dtype)

    def _heads(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


def places(route: Route) -> tuple[Tensor, int]:
    """(place [N], W) of each edge when every token has room for as many edges as the busiest token has."""
    if route.slot is not None and route.top_k is not None:
        return route.slot, route.top_k
    count_T = torch.bincount(route.token, minlength=route.num_tokens)
    order_N, width = route.token.argsort(stable=True), max(1, int(count_T.max()))
    rank_N = torch.arange(len(order_N), device=order_N.device) - (count_T.cumsum(0) - count_T)[route.token[order_N]]
    return torch.empty_like(order_N).scatter(0, order_N, route.token[order_N] * width + rank_N), width


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in the half-split layout of Llama's Hugging Face port: pairs are (i, i + head_dim / 2)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def locate(config: ModelConfig, position: Tensor, document: Tensor | None, past: int) -> Positions:
    """Rotations and mask for [B, L] positions. ``document`` [B, L] keeps packed documents from seeing each other."""
    half = torch.arange(0, config.size_of_head, 2, device=position.device, dtype=torch.float32)
    frequency = config.rope_theta ** (-half / config.size_of_head)
    angle = (position[:, None, :, None].float() * frequency).repeat(1, 1, 1, 2)
    length = position.shape[1]
    mask = None
    if past and length > 1:
        mask = torch.ones(length, past + length, dtype=torch.bool, device=position.device).tril(past)
    if document is not None and bool((document != document[:, :1]).any()):
        if past:
            raise ValueError("packed documents cannot follow what a cache holds: give each document its own cache")
        causal = torch.ones(length, length, dtype=torch.bool, device=position.device).tril()
        mask = (document[:, None, :, None] == document[:, None, None, :]) & causal
    return Positions(angle.cos(), angle.sin(), mask)
