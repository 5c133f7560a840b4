"""The pointwise middle of an expert: what happens between the up- and the down-projection, and its derivative.

A gated activation reads a pre-activation of 2H columns, gate first, then up; a plain one reads H.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from moeforge.config import Activation

_POINTWISE = {"swiglu": F.silu, "geglu": F.gelu, "gelu": F.gelu, "relu": F.relu, "silu": F.silu}


def is_gated(activation: Activation) -> bool:
    """Whether the activation multiplies a gate with an up-projection."""
    return activation.endswith("glu")


def activate(z: Tensor, activation: Activation) -> Tensor:
    """[N, 2H] (gated) or [N, H] pre-activation -> [N, H]."""
    if not is_gated(activation):
        return _POINTWISE[activation](z)
    gate, up = z.chunk(2, dim=-1)
    return _POINTWISE[activation](gate) * up


def activate_backward(grad: Tensor, z: Tensor, activation: Activation) -> Tensor:
    """Gradient at the pre-activation ``z`` from the gradient [N, H] at ``activate(z)``."""
    if not is_gated(activation):
        return _pointwise_backward(grad, z, activation)
    gate, up = z.chunk(2, dim=-1)
    dz = torch.empty_like(z)
    torch.mul(grad, _POINTWISE[activation](gate), out=dz[..., up.shape[-1] :])
    dz[..., : gate.shape[-1]] = _pointwise_backward(grad * up, gate, activation)
    return dz


def _pointwise_backward(grad: Tensor, z: Tensor, activation: Activation) -> Tensor:
    match activation:
        case "swiglu" | "silu":
            return torch.ops.aten.silu_backward(grad, z)
        case "geglu" | "gelu":
            return torch.ops.aten.gelu_backward(grad, z)
        case "relu":
            return grad * (z > 0)
