"""``expert_mlp``: a routed MLP over weighted edges, through any engine, keeping about 4H values per edge.

The forward pass keeps x, the weights and the pre-activation z; nothing of size N x D. That suffices because, with
A = act(z) and dA' = dy[token] @ down, the gradient of a combine weight is rowsum(dA' * A) (the identity of SonicMoE,
arXiv:2512.14080), so neither the experts' outputs nor the gathered rows need to live until backward. In bf16 with a
gated activation z is 2H values of 2 bytes: 4H bytes per edge, where the eager path keeps 4D + 8H.
"""

from typing import Any

import torch
from torch import Tensor

from moeforge.config import Activation
from moeforge.kernels.choose import ENGINES, choose
from moeforge.kernels.edges import Edges, EdgeTensors, pad_segments
from moeforge.kernels.reference import reference


def expert_mlp(
    x_TD: Tensor, edges: Edges, up_EHD: Tensor, down_EDH: Tensor, activation: Activation, engine: str = "auto"
) -> Tensor:
    """y[t] = sum over edges (t, e, w) of w * down_e(act(up_e(x[t]))), accumulated in float32.

    x [T, D]; up [E, 2H, D] (gate rows first, then up) for a gated activation, else [E, H, D]; down [E, D, H].
    Returns [T, D] in x's type. Differentiable in x, both weights and ``edges.weight``. Under autocast the rows and the
    matrices are taken in the autocast type, the combine weights stay float32.
    """
    if torch.is_autocast_enabled(x_TD.device.type):
        dtype = torch.get_autocast_dtype(x_TD.device.type)
        x_TD, up_EHD, down_EDH = x_TD.to(dtype), up_EHD.to(dtype), down_EDH.to(dtype)
    name, _ = choose(x_TD, up_EHD, down_EDH, engine)
    with torch.autocast(x_TD.device.type, enabled=False):
        if ENGINES[name] is None:
            return reference(x_TD, edges, up_EHD, down_EDH, activation)
        return _ExpertMLP.apply(x_TD, edges.weight, up_EHD, down_EDH, edges, activation, name)


class _ExpertMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weight_N: Tensor, up: Tensor, down: Tensor, edges: Edges, activation: Any, name: str
    ) -> Tensor:
        engine = ENGINES[name]
        assert engine is not None
        padded = pad_segments(edges) if _pads(x_TD) else None
        rows, place = padded or edges, padded.place if padded else None
        y_TD, z_NH = engine.forward(x_TD, rows, up, down, activation)
        # Tensors alone: an edge object kept here would outlive its graph.
        ctx.save_for_backward(x_TD, up, down, z_NH, rows.token, rows.weight, rows.ends, rows.slot, place)
        ctx.sizes, ctx.activation, ctx.engine = (edges.num_tokens, rows.top_k), activation, engine
        return y_TD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        x_TD, up, down, z_NH, token, weight_N, ends, slot, place = ctx.saved_tensors
        num_tokens, top_k = ctx.sizes
        rows = EdgeTensors(token, weight_N, ends, num_tokens, top_k, slot)
        gradients = ctx.engine.backward(grad_outputs[0], x_TD, z_NH, rows, up, down, ctx.activation)
        dx_TD, dweight_N, *dmatrices = gradients
        return dx_TD, dweight_N if place is None else dweight_N[place], *dmatrices, None, None, None


def _pads(x_TD: Tensor) -> bool:
    """Whether matrix products are oneDNN's, which compiles one for every number of rows (see ``pad_segments``)."""
    return x_TD.device.type == "cpu" and x_TD.dtype in (torch.bfloat16, torch.float16)
