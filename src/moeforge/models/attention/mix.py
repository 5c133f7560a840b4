"""The products of attention: values by how well queries and keys agree, and the same to look at."""

import torch
from torch import Tensor
from torch.nn import functional as F


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scale: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Queries [B, heads, L, D], keys [B, key heads, S, D], values [B, key heads, S, V] -> [B, heads, L, V].

    ``mask`` [..., L, at least S] bool is true where a query may look, its last S columns count; None means plain
    causal. ``scale`` multiplies products (None: 1 / sqrt(D)). ``sinks`` [heads] are logits of one more key, whose value
    is zero: what a head has no use for goes there (arXiv:2309.17453).
    """
    if mask is not None:
        mask = mask[..., -keys.shape[2] :]
    if sinks is not None:
        scale = queries.shape[3] ** -0.5 if scale is None else scale
        queries, keys, values, mask = _with_sink(queries, keys, values, mask, sinks / scale)
    causal, grouped = mask is None and queries.shape[2] > 1, queries.shape[1] != keys.shape[1]
    narrower = keys.shape[3] - values.shape[3]
    wide = F.pad(values, (0, narrower)) if narrower > 0 else values  # fused kernels want values as wide as keys
    mixed = F.scaled_dot_product_attention(
        queries, keys, wide, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
    )
    return mixed[..., : values.shape[3]]


def _with_sink(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, products: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """One more key in front and one more dimension, in which no other key has anything: the sink's product is exact."""
    if mask is None and queries.shape[2] > 1:
        mask = torch.ones(queries.shape[2], keys.shape[2], dtype=torch.bool, device=keys.device).tril()
    extra = products.to(queries.dtype)[:, None, None].expand(*queries.shape[:3], 1)
    keys = F.pad(keys, (0, 1, 1, 0))
    keys[:, :, 0, -1] = 1
    mask = None if mask is None else F.pad(mask, (1, 0), value=True)
    return torch.cat((queries, extra), -1), keys, F.pad(values, (0, 0, 1, 0)), mask


def received(
    queries: Tensor, keys: Tensor, mask: Tensor | None, scale: float | None = None, sinks: Tensor | None = None
) -> Tensor:
    """[B, S] float32: attention to each key, mean over heads and the queries that may look at it."""
    keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
    products = queries.float() @ keys.float().transpose(2, 3)
    scores = products / queries.shape[3] ** 0.5 if scale is None else products * scale
    plain = torch.ones(scores.shape[2:], dtype=torch.bool, device=keys.device).tril()
    looks = plain if mask is None else mask[..., -scores.shape[3] :]
    scores = scores.masked_fill(~looks, -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.float()[:, None, None].expand(*scores.shape[:3], 1)), -1)
    attention = scores.softmax(-1)[..., : keys.shape[2]].mean(1, keepdim=True)
    return (attention.sum(2) / looks.sum(-2)).squeeze(1)
