"""Causal self-attention: grouped queries, rotary positions, optional norm on queries and keys, KV cache."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moeforge.models.config import ModelConfig


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


class Attention(nn.Module):
    """[B, L, D] -> [B, L, D]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.size_of_head
        self.q_proj = nn.Linear(config.d_model, config.num_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.d_model, config.num_key_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.d_model, config.num_key_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_heads * self.head_dim, config.d_model, bias=False)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, positions: Positions, cache: LayerCache | None = None) -> Tensor:
        """One pass; with a cache, x is what follows what the cache holds."""
        queries, keys = self._queries_and_keys(x, positions)
        values = self._heads(self.v_proj(x))
        if cache is not None:
            keys, values = cache.append(keys, values)
        causal = positions.mask is None and queries.shape[2] > 1
        grouped = queries.shape[1] != keys.shape[1]
        mixed = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=positions.mask, is_causal=causal, enable_gqa=grouped
        )
        return self.o_proj(mixed.transpose(1, 2).flatten(2))

    @torch.no_grad()
    def received(self, x: Tensor, positions: Positions) -> Tensor:
        """[B, L, D] -> [B, L] float32: attention to each token, mean over heads and the queries that may look at it.

        Among these tokens alone, not what a cache holds.
        """
        queries, keys = self._queries_and_keys(x, positions)
        keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
        scores = queries.float() @ keys.float().transpose(2, 3) / self.head_dim**0.5
        plain = torch.ones(scores.shape[2:], dtype=torch.bool, device=x.device).tril()
        looks = plain if positions.mask is None else positions.mask[..., -scores.shape[3] :]
        attention = scores.masked_fill(~looks, -torch.inf).softmax(-1).mean(1, keepdim=True)
        return (attention.sum(2) / looks.sum(-2)).squeeze(1)

    def _queries_and_keys(self, x: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        queries, keys = self._heads(self.q_proj(x)), self._heads(self.k_proj(x))
        dtype = keys.dtype
        queries = rotate(self.q_norm(queries), positions.cos, positions.sin).to(dtype)
        return queries, rotate(self.k_norm(keys), positions.cos, positions.sin).to(dtype)

    def _heads(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


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
