"""Latent attention: keys and values of all heads come out of one narrow row per token, which is all a cache keeps."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from moeforge.models.attention.cache import BlockLayer, LayerCache
from moeforge.models.attention.mix import attend
from moeforge.models.attention.positions import Positions, rotate
from moeforge.models.config import ModelConfig
from moeforge.models.heads import LatentHeads
from moeforge.moe import Route


class LatentAttention(nn.Module):
    """[B, L, D] -> [B, L, D] (DeepSeek-V2, arXiv:2405.04434, section 2.1).

    A token's row holds R = kv_lora_rank latent values, normed, and one key of qk_rope_head_dim rotated values that all
    heads share. New tokens are attended to by keys and values made of these rows; what a cache holds is never expanded:
    queries and outputs go through the same matrices instead, so that a step costs R per token and head.
    """

    router = None

    def __init__(self, config: ModelConfig, heads: LatentHeads, window: int | None = None) -> None:
        super().__init__()
        self.heads, self.num_heads, self.window = heads, config.num_heads, window
        self.interleaved, self.scale = config.rope_interleaved, heads.softmax_scale(config)
        d_model, rank, bias, eps = config.d_model, heads.kv_lora_rank, heads.bias, heads.norm_eps
        width, queries = sum(heads.widths(config)) - heads.qk_rope_head_dim, config.num_heads * heads.widths(config)[0]
        if heads.q_lora_rank is None:
            self.q_proj = nn.Linear(d_model, queries, bias=False)
        else:
            self.q_a_proj = nn.Linear(d_model, heads.q_lora_rank, bias=bias)
            self.q_a_norm = nn.RMSNorm(heads.q_lora_rank, eps=eps)
            self.q_b_proj = nn.Linear(heads.q_lora_rank, queries, bias=False)
        self.kv_a_proj = nn.Linear(d_model, rank + heads.qk_rope_head_dim, bias=bias)
        self.kv_a_norm = nn.RMSNorm(rank, eps=eps)
        self.kv_b_proj = nn.Linear(rank, config.num_heads * width, bias=False)
        self.o_proj = nn.Linear(config.num_heads * heads.v_head_dim, d_model, bias=bias)

    def forward(
        self, x: Tensor, positions: Positions, cache: LayerCache | BlockLayer | None = None, route: Route | None = None
    ) -> Tensor:
        """One pass; with a cache, x is what follows what the cache holds. There is no route here."""
        queries, rows = self._queries(x, positions), self._rows(x, positions)
        if isinstance(cache, BlockLayer):
            mixed = self._by_rows(queries, lambda asked: cache.attend(asked, (rows,), self.scale, None))
        else:
            mask = positions.masks[self.window]
            if cache is not None:
                (rows,) = cache.append(rows)
            if rows.shape[2] == x.shape[1]:
                mixed = self._by_heads(queries, rows, mask)
            else:
                mixed = self._by_rows(queries, lambda asked: attend(asked, rows, rows, mask, self.scale))
        return self.o_proj(mixed.transpose(1, 2).flatten(2))

    def _queries(self, x: Tensor, positions: Positions) -> Tensor:
        """[B, heads, L, qk_nope_head_dim + qk_rope_head_dim], the last part rotated."""
        narrow = self.heads.q_lora_rank is None
        projected = self.q_proj(x) if narrow else self.q_b_proj(self.q_a_norm(self.q_a_proj(x)))
        queries = projected.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        plain, turning = queries.split((self.heads.qk_nope_head_dim, self.heads.qk_rope_head_dim), -1)
        return torch.cat((plain, self._turned(turning, positions)), -1)

    def _rows(self, x: Tensor, positions: Positions) -> Tensor:
        """[B, 1, L, R + qk_rope_head_dim]: what a cache keeps."""
        latent, turning = self.kv_a_proj(x)[:, None].split((self.heads.kv_lora_rank, self.heads.qk_rope_head_dim), -1)
        return torch.cat((self.kv_a_norm(latent), self._turned(turning, positions)), -1)

    def _turned(self, x: Tensor, positions: Positions) -> Tensor:
        return rotate(x, positions.cos, positions.sin, self.interleaved).to(x.dtype)

    def _by_heads(self, queries: Tensor, rows: Tensor, mask: Tensor | None) -> Tensor:
        """Keys and values of every head, from every row. -> [B, heads, L, v_head_dim]."""
        latent, turned = rows.split((self.heads.kv_lora_rank, self.heads.qk_rope_head_dim), -1)
        own = self.kv_b_proj(latent).unflatten(-1, (self.num_heads, -1))[:, 0].transpose(1, 2)
        plain, values = own.split((self.heads.qk_nope_head_dim, self.heads.v_head_dim), -1)
        keys = torch.cat((plain, turned.expand(-1, self.num_heads, -1, -1)), -1)
        return attend(queries, keys, values, mask, self.scale)

    def _by_rows(self, queries: Tensor, mix: Callable[[Tensor], Tensor]) -> Tensor:
        """The same with the matrices taken to the queries' side: rows are keys, their latent part is values."""
        matrices = self.kv_b_proj.weight.unflatten(0, (self.num_heads, -1))
        to_key, to_value = matrices.split((self.heads.qk_nope_head_dim, self.heads.v_head_dim), 1)
        plain, turned = queries.split((self.heads.qk_nope_head_dim, self.heads.qk_rope_head_dim), -1)
        asked = torch.cat((torch.einsum("bhld,hdr->bhlr", plain, to_key), turned), -1)
        latent = mix(asked)[..., : self.heads.kv_lora_rank]
        return torch.einsum("bhlr,hvr->bhlv", latent, to_value)
