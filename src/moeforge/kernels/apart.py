"""Products whose rows do not know each other: what a row gets has the same bits alone and among any others.

torch's own products on a CPU do not promise that: which loop runs depends on how many rows there are. Nor do some of
its functions of single values, of which vectors and a tensor's last few come from different code. ``apart`` is a mode
in which these are computed here, and a product that is not known here is refused.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from math import pi, prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from moeforge.kernels.native import engine


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[..., in] times [out, in] transposed: ``F.linear`` without gradient, each row by itself."""
    if x.device.type != "cpu":
        return F.linear(x, weight, bias)
    if x.shape[-1] != weight.shape[-1] or (bias is not None and len(bias) != len(weight)):
        raise ValueError(f"rows of shape {tuple(x.shape)} and a matrix {tuple(weight.shape)} do not fit each other")
    rows, weight = x.detach().reshape(-1, x.shape[-1]), weight.detach()
    native = x.dtype == weight.dtype and x.dtype in engine.TYPES and engine.missing() is None
    y = _native(rows, weight, bias) if native else _one_by_one(rows, weight, bias)
    return y.view(*x.shape[:-1], len(weight))


def _one_by_one(x_TK: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Slow, and right: torch gets one row at a time."""
    rows = [F.linear(row[None], weight, bias) for row in x_TK]
    return torch.cat(rows) if rows else x_TK.new_empty(0, len(weight))


def _native(x_TK: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    x_TK, weight = x_TK.contiguous(), weight.contiguous()
    bias = None if bias is None else bias.detach().float().contiguous()
    y_TN = x_TK.new_empty(len(x_TK), len(weight))
    where = x_TK.data_ptr(), weight.data_ptr(), None if bias is None else bias.data_ptr()
    sizes = len(x_TK), *weight.shape, int(x_TK.dtype == torch.bfloat16), torch.get_num_threads(), 0
    engine.check(_function()(*where, *sizes, y_TN.data_ptr()))
    return y_TN


@cache
def _function() -> Any:
    function = engine.open_library().moeforge_linear
    function.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64] + [ctypes.c_int] * 5 + [ctypes.c_void_p]
    return function


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """``torch.matmul``: every value is a sum in one order, whatever else is computed."""
    if a.device.type != "cpu":
        return torch.matmul(a, b)
    if b.dim() == 1:
        return linear(a, b[None]).squeeze(-1)
    if a.dim() == 1:
        return matmul(a[None], b).squeeze(-2)
    if b.dim() == 2:
        return linear(a, b.T)
    shape = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    a, b = a.expand(*shape, *a.shape[-2:]), b.expand(*shape, *b.shape[-2:])
    parts = zip(a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:]), strict=True)
    products = [linear(one, other.T) for one, other in parts]
    return torch.stack(products).view(*shape, a.shape[-2], b.shape[-1])


def einsum(equation: str, *operands: Any) -> Tensor:
    """``torch.einsum`` of two tensors, by ``matmul``; ``...`` stands in one of the two."""
    if len(operands) != 2:
        raise NotImplementedError(f"einsum of {len(operands)} tensors keeps no rows apart")
    inputs, _, out = equation.replace(" ", "").partition("->")
    names = inputs.split(",")
    unnamed = max(one.dim() - len(own.replace("...", "")) for own, one in zip(names, operands, strict=True))
    left, right, out = (own.replace("...", "ABCDEFGH"[:unnamed]) for own in (*names, out))
    shared = [c for c in left if c in right and c in out]
    summed = [c for c in left if c in right and c not in out]
    own_left, own_right = ([c for c in own if c not in shared + summed] for own in (left, right))
    a = operands[0].permute([left.index(c) for c in shared + own_left + summed])
    b = operands[1].permute([right.index(c) for c in shared + summed + own_right])
    sizes = dict(zip(left + right, [*operands[0].shape, *operands[1].shape], strict=True))
    batch, rows, inner, columns = (prod(sizes[c] for c in own) for own in (shared, own_left, summed, own_right))
    product = matmul(a.reshape(batch, rows, inner), b.reshape(batch, inner, columns))
    order = shared + own_left + own_right
    return product.view([sizes[c] for c in order]).permute([order.index(c) for c in out])


def cdist(a: Tensor, b: Tensor, p: float = 2.0, compute_mode: str | None = None) -> Tensor:
    """``torch.cdist``: distances of [T, K] and [E, K]."""
    return torch.stack([(a - one).norm(p=p, dim=-1) for one in b], -1)


def gru_cell(x: Tensor, state: Tensor, w_x: Tensor, w_state: Tensor, b_x: Tensor, b_state: Tensor) -> Tensor:
    """``torch.gru_cell``."""
    reset_x, update_x, new_x = linear(x, w_x, b_x).chunk(3, -1)
    reset_h, update_h, new_h = linear(state, w_state, b_state).chunk(3, -1)
    reset, update = sigmoid(reset_x + reset_h), sigmoid(update_x + update_h)
    new = (new_x + reset * new_h).tanh()
    return new + update * (state - new)


def sigmoid(x: Tensor) -> Tensor:
    """``torch.sigmoid``, whose own vectors and single values at a tensor's end are rounded differently."""
    return (1 / (1 + (-x.to(_wide(x))).exp())).to(x.dtype)


def silu(x: Tensor, inplace: bool = False) -> Tensor:
    """``F.silu``, for the same reason."""
    wide = x.to(_wide(x))
    return (wide * sigmoid(wide)).to(x.dtype)


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """``F.gelu``, for the same reason."""
    if approximate == "none":
        return F.gelu(x)
    wide = x.to(_wide(x))
    return (0.5 * wide * (1 + ((wide + 0.044715 * wide * wide * wide) * (2 / pi) ** 0.5).tanh())).to(x.dtype)


def softplus(x: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    """``F.softplus``, for the same reason."""
    scaled = x.to(_wide(x)) * beta
    return torch.where(scaled > threshold, scaled, scaled.clamp_max(threshold).exp().log1p()).div(beta).to(x.dtype)


def power(x: Tensor, exponent: Any) -> Tensor:
    """``torch.pow``, for the same reason; of small whole numbers it is products."""
    if isinstance(exponent, Tensor) or exponent in (1, 2, 3, 0.5) or not x.is_floating_point():
        return torch.pow(x, exponent)
    return (x.double().log() * exponent).exp().to(x.dtype)


def rsqrt(x: Tensor) -> Tensor:
    """``torch.rsqrt``, for the same reason."""
    return (1 / x.to(_wide(x)).sqrt()).to(x.dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


OURS: dict[Any, Callable[..., Tensor]] = {
    F.linear: linear,
    torch.einsum: einsum,
    torch.cdist: cdist,
    torch.gru_cell: gru_cell,
    F.silu: silu,
    F.gelu: gelu,
    F.softplus: softplus,
    **dict.fromkeys((torch.sigmoid, Tensor.sigmoid, F.sigmoid), sigmoid),
    **dict.fromkeys((torch.pow, Tensor.pow, Tensor.__pow__), power),
    **dict.fromkeys((torch.rsqrt, Tensor.rsqrt), rsqrt),
    **dict.fromkeys((torch.matmul, torch.mm, torch.bmm, torch.mv), matmul),
    **dict.fromkeys((Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm, Tensor.mv), matmul),
}
REFUSED = {
    *(torch.addmm, torch.baddbmm, torch.addbmm, torch.addmv, torch.tensordot, torch.bilinear, torch.lstm_cell),
    *(Tensor.addmm, Tensor.baddbmm, Tensor.addbmm, Tensor.addmv, F.bilinear, F.grouped_mm, torch.chain_matmul),
    *(F.conv1d, F.conv2d, F.conv3d, F.scaled_dot_product_attention, F.multi_head_attention_forward),
}
"""Products that nothing of ours runs in a pass over blocks; a third party's gate that does is told so."""


class _Apart(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        ours = OURS.get(func)
        if ours is not None:
            with torch._C.DisableTorchFunction():
                return ours(*args, **(kwargs or {}))
        if func in REFUSED:
            raise NotImplementedError(f"{func.__name__} keeps no rows apart: use linear, matmul or einsum")
        return func(*args, **(kwargs or {}))


def apart() -> TorchFunctionMode:
    """``with apart():`` every product inside is row by row; no gradients."""
    return _Apart()
