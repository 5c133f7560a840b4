"""Engine ``streaming``: ordinary torch matmuls, expert by expert, in chunks of rows that stay in cache.

Rows are gathered and summed chunk by chunk, so no [N, D] tensor exists beyond one chunk: the working set of the
forward pass is about ``rows * (2D + 3H)`` values. The ledger of what each step needs is in ``mlp.py``.
"""

import torch
from torch import Tensor

from moeforge.config import Activation
from moeforge.kernels.activation import activate, activate_backward
from moeforge.kernels.edges import Edges, segments

CACHE_BYTES = 1 << 20
"""What one chunk may occupy: half of a server core's second-level cache, so that weights still fit beside it."""


def _rows_per_chunk(x_TD: Tensor, up_EHD: Tensor) -> int:
    per_row = (2 * x_TD.shape[1] + 2 * up_EHD.shape[1]) * x_TD.element_size()
    return max(64, CACHE_BYTES // per_row // 64 * 64)


def forward(
    x_TD: Tensor, edges: Edges, up_EHD: Tensor, down_EDH: Tensor, activation: Activation
) -> tuple[Tensor, Tensor]:
    """Returns y [T, D] and the pre-activation z [N, H or 2H]."""
    accumulate = torch.promote_types(x_TD.dtype, torch.float32)
    y_TD = x_TD.new_zeros(edges.num_tokens, x_TD.shape[1], dtype=accumulate)
    z_NH = x_TD.new_empty(len(edges.token), up_EHD.shape[1])
    step = _rows_per_chunk(x_TD, up_EHD)
    for expert, start, end in segments(edges.ends):
        for low in range(start, end, step):
            high = min(low + step, end)
            token_N = edges.token[low:high]
            z = torch.mm(x_TD.index_select(0, token_N), up_EHD[expert].T, out=z_NH[low:high])
            rows = torch.mm(activate(z, activation), down_EDH[expert].T).to(accumulate)
            y_TD.index_add_(0, token_N, rows.mul_(edges.weight[low:high, None]))
    return y_TD.to(x_TD.dtype), z_NH


def backward(
    dy_TD: Tensor, x_TD: Tensor, z_NH: Tensor, edges: Edges, up_EHD: Tensor, down_EDH: Tensor, activation: Activation
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, combine weight, up and down."""
    accumulate = torch.promote_types(x_TD.dtype, torch.float32)
    dx_TD = x_TD.new_zeros(x_TD.shape, dtype=accumulate)
    dweight_N = torch.empty_like(edges.weight)
    dup_EHD, ddown_EDH = torch.zeros_like(up_EHD), torch.zeros_like(down_EDH)
    for expert, low, high in segments(edges.ends):
        token_N = edges.token[low:high]
        dy, rows, z = dy_TD.index_select(0, token_N), x_TD.index_select(0, token_N), z_NH[low:high]
        weight = edges.weight[low:high, None].to(x_TD.dtype)
        da, a = dy @ down_EDH[expert], activate(z, activation)
        dweight_N[low:high] = (da * a).sum(-1, dtype=accumulate)
        dz = activate_backward(da.mul_(weight), z, activation)
        torch.mm(dz.T, rows, out=dup_EHD[expert])
        torch.mm(dy.T, a.mul_(weight), out=ddown_EDH[expert])
        dx_TD.index_add_(0, token_N, torch.mm(dz, up_EHD[expert]).to(accumulate))
    return dx_TD.to(x_TD.dtype), dweight_N, dup_EHD, ddown_EDH
