"""Engine ``grouped``: all experts in one ``torch.nn.functional.grouped_mm`` per projection. The GPU's default."""

import torch
from torch import Tensor
from torch.nn import functional as F

from moeforge.config import Activation
from moeforge.kernels.activation import activate, activate_backward
from moeforge.kernels.edges import Edges, sum_by_token


def why_not(x_TD: Tensor, up_EHD: Tensor, down_EDH: Tensor) -> str | None:
    """The reason ``grouped_mm`` cannot run these operands, or None. It wants 16-byte strides and no float64."""
    if not hasattr(F, "grouped_mm"):
        return "this torch has no grouped_mm"
    if x_TD.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"grouped_mm has no {x_TD.dtype}"
    rows = (up_EHD.shape[2], up_EHD.shape[1], down_EDH.shape[2])
    narrow = [n for n in rows if n * x_TD.element_size() % 16]
    return f"a row of {narrow[0]} values is no multiple of 16 bytes" if narrow else None


def forward(
    x_TD: Tensor, edges: Edges, up_EHD: Tensor, down_EDH: Tensor, activation: Activation
) -> tuple[Tensor, Tensor]:
    """Returns y [T, D] and the pre-activation z [N, H or 2H]."""
    z_NH = F.grouped_mm(x_TD.index_select(0, edges.token), up_EHD.transpose(1, 2), offs=edges.ends)
    rows_ND = F.grouped_mm(activate(z_NH, activation), down_EDH.transpose(1, 2), offs=edges.ends)
    y_TD = sum_by_token(rows_ND * edges.weight[:, None], edges)
    return y_TD.to(x_TD.dtype), z_NH


def backward(
    dy_TD: Tensor, x_TD: Tensor, z_NH: Tensor, edges: Edges, up_EHD: Tensor, down_EDH: Tensor, activation: Activation
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, combine weight, up and down."""
    weight_N1 = edges.weight[:, None].to(x_TD.dtype)
    dy_ND, a_NH = dy_TD.index_select(0, edges.token), activate(z_NH, activation)
    da_NH = F.grouped_mm(dy_ND, down_EDH, offs=edges.ends)
    dweight_N = (da_NH * a_NH).sum(-1, dtype=edges.weight.dtype)
    dz_NH = activate_backward(da_NH * weight_N1, z_NH, activation)
    dx_TD = sum_by_token(F.grouped_mm(dz_NH, up_EHD, offs=edges.ends), edges)
    dup_EHD = F.grouped_mm(dz_NH.T, x_TD.index_select(0, edges.token), offs=edges.ends)
    ddown_EDH = F.grouped_mm(dy_ND.T, a_NH * weight_N1, offs=edges.ends)
    return dx_TD.to(x_TD.dtype), dweight_N, dup_EHD, ddown_EDH
