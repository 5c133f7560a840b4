"""Engine ``streaming``: ordinary torch matmuls over chunks of rows that stay in cache, one product per expert in each.

Rows are gathered, activated and summed once per chunk, so no [N, D] tensor exists beyond one chunk, and small experts
share what does not depend on the expert. The ledger of what each step needs is in ``mlp.py``.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from moeforge.config import Activation
from moeforge.kernels.activation import activate, activate_backward
from moeforge.kernels.edges import Edges, segments

CACHE_BYTES = 1 << 20
"""What one chunk may occupy: half of a server core's second-level cache, so that weights still fit beside it."""

Part = tuple[int, slice]
"""An expert and its rows within a chunk."""


def _rows_per_chunk(x_TD: Tensor, up_EHD: Tensor) -> int:
    per_row = (2 * x_TD.shape[1] + 2 * up_EHD.shape[1]) * x_TD.element_size()
    return max(64, CACHE_BYTES // per_row // 64 * 64)


def _chunks(ends_E: Tensor, size: int, split: bool) -> Iterator[tuple[int, int, list[Part]]]:
    """(first row, end row, parts) of chunks of at most ``size`` rows; without ``split`` an expert's rows stay together,
    and one with more of them than ``size`` is a chunk of its own."""
    low, parts = 0, []
    for expert, start, end in segments(ends_E):
        if parts and end - low > size:
            yield low, start, parts
            low, parts = start, []
        while split and end - low > size:
            yield low, low + size, [(expert, slice(0, size))]
            low = low + size
        first = max(start, low)
        parts.append((expert, slice(first - low, end - low)))
    if parts:
        yield low, parts[-1][1].stop + low, parts


def forward(
    x_TD: Tensor, edges: Edges, up_EHD: Tensor, down_EDH: Tensor, activation: Activation
) -> tuple[Tensor, Tensor]:
    """Returns y [T, D] and the pre-activation z [N, H or 2H]."""
    accumulate = torch.promote_types(x_TD.dtype, torch.float32)
    y_TD = x_TD.new_zeros(edges.num_tokens, x_TD.shape[1], dtype=accumulate)
    z_NH = x_TD.new_empty(len(edges.token), up_EHD.shape[1])
    for low, high, parts in _chunks(edges.ends, _rows_per_chunk(x_TD, up_EHD), split=True):
        token_N, z = edges.token[low:high], z_NH[low:high]
        rows = x_TD.index_select(0, token_N)
        for expert, own in parts:
            torch.mm(rows[own], up_EHD[expert].T, out=z[own])
        a = activate(z, activation)
        for expert, own in parts:
            torch.mm(a[own], down_EDH[expert].T, out=rows[own])
        y_TD.index_add_(0, token_N, rows.to(accumulate).mul_(edges.weight[low:high, None]))
    return y_TD.to(x_TD.dtype), z_NH


def backward(
    dy_TD: Tensor, x_TD: Tensor, z_NH: Tensor, edges: Edges, up_EHD: Tensor, down_EDH: Tensor, activation: Activation
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, combine weight, up and down."""
    accumulate = torch.promote_types(x_TD.dtype, torch.float32)
    dx_TD = x_TD.new_zeros(x_TD.shape, dtype=accumulate)
    dweight_N = torch.empty_like(edges.weight)
    dup_EHD, ddown_EDH = torch.zeros_like(up_EHD), torch.zeros_like(down_EDH)
    # An expert's rows stay together: its weight gradient is one product, not a sum that bf16 would round in between.
    for low, high, parts in _chunks(edges.ends, _rows_per_chunk(x_TD, up_EHD), split=False):
        token_N, z = edges.token[low:high], z_NH[low:high]
        dy, rows = dy_TD.index_select(0, token_N), x_TD.index_select(0, token_N)
        weight = edges.weight[low:high, None].to(x_TD.dtype)
        a = activate(z, activation)
        da = torch.empty_like(a)
        for expert, own in parts:
            torch.mm(dy[own], down_EDH[expert], out=da[own])
        dweight_N[low:high] = (da * a).sum(-1, dtype=accumulate)
        dz = activate_backward(da.mul_(weight), z, activation)
        a.mul_(weight)
        for expert, own in parts:
            torch.mm(dz[own].T, rows[own], out=dup_EHD[expert])
            torch.mm(dy[own].T, a[own], out=ddown_EDH[expert])
            torch.mm(dz[own], up_EHD[expert], out=rows[own])
        dx_TD.index_add_(0, token_N, rows.to(accumulate))
    return dx_TD.to(x_TD.dtype), dweight_N, dup_EHD, ddown_EDH
