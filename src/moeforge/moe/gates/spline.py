"""A gate of learned functions of single numbers."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import elu, glu, layer_norm, linear, silu

from moeforge.config import Config
from moeforge.moe.bank import matrix
from moeforge.moe.context import Context
from moeforge.moe.gates.signal import Signal, in_float32


def spline_basis(x: Tensor, intervals: int, degree: int, reach: float) -> Tensor:
    """[...] -> [..., intervals + degree]: B-splines on equal intervals of [-reach, reach], where they sum to one.

    The recursion of Cox and de Boor. Outside they fall to zero, within ``degree`` intervals.
    """
    place = (x[..., None] + reach) * (intervals / (2 * reach))  # in units of an interval
    after = place - torch.arange(-degree, intervals + degree + 1, device=x.device)  # how far behind it each knot lies
    basis = ((after >= 0) & (after < 1)).to(x.dtype)[..., :-1]
    for order in range(1, degree + 1):
        basis = (after[..., : -order - 1] * basis[..., :-1] - after[..., order + 1 :] * basis[..., 1:]) / order
    return basis


class SplineGate(nn.Module):
    """logits = LayerNorm(W x + GLU(f(g(x)))), f and g layers of splines (KAMoE, arXiv:2409.15161).

    A layer of splines sums, for each output, one learned function of each input: its matrix weighs an activation of the
    input and the input's place in a basis of splines (arXiv:2404.19756, equation 2.10).
    """

    def __init__(self, config: "Spline", d_model: int, num_experts: int) -> None:
        super().__init__()
        self.config = config
        functions = 1 + config.intervals + config.degree
        self.inner = matrix(config.width, d_model * functions)
        self.outer = matrix(config.width, config.width * functions)
        self.gated, self.skip = matrix(2 * num_experts, config.width), matrix(num_experts, d_model)
        self.norm = nn.LayerNorm(num_experts)

    def forward(self, x_TD: Tensor, context: Context) -> Signal:
        """[T, D] -> [T, E]."""
        rows_TD = in_float32(x_TD)
        hidden = linear(self._functions(rows_TD, elu(rows_TD)), in_float32(self.inner))
        hidden = linear(self._functions(hidden, silu(hidden)), in_float32(self.outer))
        logits_TE = linear(rows_TD, in_float32(self.skip)) + glu(linear(hidden, in_float32(self.gated)))
        scale, shift = in_float32(self.norm.weight), in_float32(self.norm.bias)
        return Signal(layer_norm(logits_TE, scale.shape, scale, shift))

    def _functions(self, x: Tensor, activated: Tensor) -> Tensor:
        config = self.config
        basis = spline_basis(x, config.intervals, config.degree, config.reach)
        return torch.cat([activated[..., None], basis], -1).flatten(1)


class Spline(Config):
    """A gated residual network of splines beside a linear gate."""

    type: Literal["spline"] = "spline"
    width: int = Field(8, ge=1)
    """Of the hidden layers."""
    intervals: int = Field(5, ge=1)
    """Pieces of each learned function."""
    degree: int = Field(3, ge=1)
    """Of the polynomial on each piece."""
    reach: float = Field(3.0, gt=0)
    """The pieces cover inputs from minus this to this."""

    def build(self, d_model: int, num_experts: int) -> nn.Module:
        """The module: ``(x [T, D], context) -> Signal``."""
        return SplineGate(self, d_model, num_experts)
