"""``expert_mlp``: a routed MLP over weighted edges, through any engine, keeping about 4H values per edge.

The forward pass keeps x, the weights and the pre-activation z; nothing of size N x D. That suffices because, with
A = act(z) and dA' = dy[token] @ down, the gradient of a combine weight is rowsum(dA' * A) (the identity of SonicMoE,
arXiv:2512.14080), so neither the experts' outputs nor the gathered rows need to live until backward. In bf16 with a
gated activation z is 2H values of 2 bytes: 4H bytes per edge, where the eager path keeps 4D + 8H.

The same three functions are an ``autograd.Function`` and, while ``torch.compile`` traces, a registered operator, which
a graph holds as one node: eager calls of an operator would cost some 30 microseconds more in each pass.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moeforge.config import Activation
from moeforge.errors import UserError
from moeforge.kernels.choose import ENGINES, Engine, choose
from moeforge.kernels.edges import Edges, EdgeTensors, pad_segments
from moeforge.kernels.mixed import MixedWeight, expert_mlp_mixed
from moeforge.kernels.native.quantised import PackedWeight, expert_mlp_quantised
from moeforge.kernels.reference import reference


def expert_mlp(
    x_TD: Tensor,
    edges: Edges,
    up_EHD: Tensor | PackedWeight,
    down_EDH: Tensor | PackedWeight,
    activation: Activation,
    engine: str = "auto",
) -> Tensor:
    """y[t] = sum over edges (t, e, w) of w * down_e(act(up_e(x[t]))), accumulated in float32.

    x [T, D]; up [E, 2H, D] (gate rows first, then up) for a gated activation, else [E, H, D]; down [E, D, H].
    Returns [T, D] in x's type. Differentiable in x, both weights and ``edges.weight``. Under autocast the rows and the
    matrices are taken in the autocast type, the combine weights stay float32. Weights in few bits, both or none, have a
    kernel of their own, without gradients.
    """
    if not isinstance(up_EHD, Tensor) or not isinstance(down_EDH, Tensor):
        assert not isinstance(up_EHD, Tensor) and not isinstance(down_EDH, Tensor)
        if isinstance(up_EHD, MixedWeight) and isinstance(down_EDH, MixedWeight) and up_EHD.whole:

            def run(x_TD: Tensor, own: Edges, above: Any, below: Any) -> Tensor:
                return expert_mlp(x_TD, own, above, below, activation, engine)

            return expert_mlp_mixed(x_TD, edges, up_EHD, down_EDH, run).to(x_TD.dtype)
        return expert_mlp_quantised(x_TD, edges, up_EHD, down_EDH, activation).to(x_TD.dtype)
    device = x_TD.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x_TD, up_EHD, down_EDH = x_TD.to(dtype), up_EHD.to(dtype), down_EDH.to(dtype)
        with torch.autocast(device, enabled=False):
            return expert_mlp(x_TD, edges, up_EHD, down_EDH, activation, engine)
    if not x_TD.dtype == up_EHD.dtype == down_EDH.dtype:
        types = f"rows are {x_TD.dtype}, experts {up_EHD.dtype} and {down_EDH.dtype}"
        raise UserError(f"{types}: give both one type, or run under torch.autocast")
    name, _ = choose(x_TD, up_EHD, down_EDH, engine)
    engine_here = ENGINES[name]
    if engine_here is None:
        return reference(x_TD, edges, up_EHD, down_EDH, activation)
    if engine_here.infer and not torch.compiler.is_compiling() and not _learns(x_TD, edges.weight, up_EHD, down_EDH):
        return engine_here.infer(x_TD, edges, up_EHD, down_EDH, activation)
    if engine_here.uses_onednn and _pads(x_TD):
        edges = pad_segments(edges)
    differentiable = x_TD, edges.weight, up_EHD, down_EDH
    where = edges.token, edges.ends, edges.slot, edges.num_tokens, edges.top_k
    inputs = *differentiable, *where, activation, name
    return _operator(*inputs)[0] if torch.compiler.is_compiling() else _ExpertMLP.apply(*inputs)


def _learns(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _pads(x_TD: Tensor) -> bool:
    """Whether matrix products are oneDNN's, which compiles one for every number of rows (see ``pad_segments``)."""
    return x_TD.device.type == "cpu" and x_TD.dtype in (torch.bfloat16, torch.float16)


Tensors = tuple[Tensor, Tensor, Tensor, Tensor]


def _forward(x_TD: Tensor, weight_N: Tensor, up: Tensor, down: Tensor, *where: Any) -> tuple[Tensor, Tensor]:
    """Output [T, D] and pre-activation of the live edges, those before ``ends[-1]``: padding has no rows."""
    token_N, ends_E, slot_N, num_tokens, top_k, activation, name = where
    live = len(token_N) if slot_N is not None else int(ends_E[-1])
    edges = EdgeTensors(token_N, weight_N, ends_E, num_tokens, top_k, slot_N).cut(live)
    return _engine(name).forward(x_TD, edges, up, down, activation)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    # Tensors alone: an edge object kept here would outlive its graph.
    x_TD, weight_N, up, down, token_N, ends_E, slot_N, *ctx.rest = inputs
    ctx.save_for_backward(output[1], x_TD, weight_N, up, down, token_N, ends_E, slot_N)


def _backward(
    dy_TD: Tensor, z_NH: Tensor, x_TD: Tensor, weight_N: Tensor, up: Tensor, down: Tensor, *where: Any
) -> Tensors:
    """Gradients of x, combine weight, up and down; that of a padded edge's weight is zero."""
    token_N, ends_E, slot_N, num_tokens, top_k, activation, name = where
    edges = EdgeTensors(token_N, weight_N, ends_E, num_tokens, top_k, slot_N).cut(len(z_NH))
    dx_TD, dweight_N, dup, ddown = _engine(name).backward(dy_TD, x_TD, z_NH, edges, up, down, activation)
    padding = len(token_N) - len(z_NH)
    return dx_TD, F.pad(dweight_N, (0, padding)) if padding else dweight_N, dup, ddown


def _engine(name: str) -> Engine:
    engine = ENGINES[name]
    assert engine is not None
    return engine


class _ExpertMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = _forward(*inputs)
        _keep(ctx, inputs, output)
        return output[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        return *_backward(grad_outputs[0], *ctx.saved_tensors, *ctx.rest), *[None] * 7


_EDGES = "Tensor token, Tensor ends, Tensor? slot, SymInt num_tokens, SymInt? top_k, str activation, str engine"
_OPERANDS = f"Tensor x, Tensor weight, Tensor up, Tensor down, {_EDGES}"
_operator = torch.library.custom_op(
    "moeforge::expert_mlp", _forward, mutates_args=(), schema=f"({_OPERANDS}) -> (Tensor, Tensor)"
)
_gradients = torch.library.custom_op(
    "moeforge::expert_mlp_backward",
    _backward,
    mutates_args=(),
    schema=f"(Tensor dy, Tensor z, {_OPERANDS}) -> (Tensor, Tensor, Tensor, Tensor)",
)


@_operator.register_fake
def _shapes(x_TD: Tensor, weight_N: Tensor, up: Tensor, down: Tensor, *where: Any) -> tuple[Tensor, Tensor]:
    token_N, _, slot_N, num_tokens, *_ = where
    # shape[0], not len: that must be a number, so a graph would be made for each number of tokens.
    live = token_N.shape[0] if slot_N is not None else torch.library.get_ctx().new_dynamic_size()
    return x_TD.new_empty(num_tokens, x_TD.shape[1]), x_TD.new_empty(live, up.shape[1])


@_gradients.register_fake
def _like_operands(
    dy_TD: Tensor, z_NH: Tensor, x_TD: Tensor, weight_N: Tensor, up: Tensor, down: Tensor, *where: Any
) -> Tensors:
    return torch.empty_like(x_TD), torch.empty_like(weight_N), torch.empty_like(up), torch.empty_like(down)


def _operator_backward(ctx: Any, dy_TD: Tensor, dz_NH: Tensor) -> tuple[Tensor | None, ...]:
    return *_gradients(dy_TD, *ctx.saved_tensors, *ctx.rest), *[None] * 7


_operator.register_autograd(_operator_backward, setup_context=_keep)
