"""Experts of transformers on our engines: what its experts interface calls in place of a family's own loop.

An experts module of transformers says what it is in ``has_gate``, ``has_bias``, ``is_transposed``, ``is_concatenated``
and ``has_post_expert_norm``. A plain or gated MLP with an activation that the kernels know runs in one kernel call;
every other variant runs expert by expert over the sorted rows, in ordinary autograd.
"""

import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moeforge.config import Activation
from moeforge.kernels import expert_mlp
from moeforge.kernels.edges import segments
from moeforge.moe import Route

GATED: dict[str, Activation] = {
    "SiLUActivation": "swiglu",
    "SiLU": "swiglu",
    "silu": "swiglu",
    "GELUActivation": "geglu",
}
"""Name of the class or function of ``act_fn`` -> what the kernels call it where it gates."""
PLAIN: dict[str, Activation] = {
    "SiLUActivation": "silu",
    "SiLU": "silu",
    "silu": "silu",
    "GELUActivation": "gelu",
    "ReLU": "relu",
}
"""The same where nothing is gated."""


def is_experts(module: nn.Module) -> bool:
    """Whether the module is a stack of experts that transformers dispatches through its experts interface."""
    return hasattr(module, "has_post_expert_norm") and hasattr(module, "is_transposed")


def kernel_activation(module: Any) -> Activation | None:
    """The activation under which one kernel call computes these experts, or None where only the loop is exact."""
    if module.has_bias or module.has_post_expert_norm:
        return None
    if module.has_gate and type(module)._apply_gate.__module__ != "transformers.integrations.moe":
        return None  # a gate of the family's own: clamped, scaled or computed in float32
    function = module.act_fn
    return (GATED if module.has_gate else PLAIN).get(getattr(function, "__name__", type(function).__name__))


def layer_of(name: str) -> int | None:
    """The layer's number in a module's name."""
    found = re.search(r"\.(\d+)\.", f".{name}.")
    return int(found[1]) if found else None


def names_of(module: Any) -> tuple[str, str]:
    """Of the parameters with the matrices up to the hidden width, the gate's among them, and down again."""
    return ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"


def matrices_of(module: Any) -> tuple[Any, Any]:
    """Up, gate first, and down as the kernels take them, [E, out, in]; of experts that lie packed, these."""
    stacks = (getattr(module, name) for name in names_of(module))
    up, down = (s.transpose(1, 2) if module.is_transposed and isinstance(s, Tensor) else s for s in stacks)
    return up, down


def experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """[T, D] rows, [T, K] ids and weights -> [T, D] weighted sum. Ids from ``num_experts`` on are other processes'."""
    route = route_of(module, top_k_index, top_k_weights)
    activation = kernel_activation(module)
    if activation is None:
        y_TD = route.combine(_rows(module, route.gather(hidden_states), route.ends))
    else:
        y_TD = expert_mlp(hidden_states, route, *matrices_of(module), activation)
    return y_TD.to(hidden_states.dtype)


def route_of(module: Any, ids_TK: Tensor, weights_TK: Tensor) -> Route:
    """[T, K] ids and weights -> the route."""
    weights_TK = weights_TK.to(torch.promote_types(weights_TK.dtype, torch.float32))
    if not module._is_expert_parallel:
        return Route.from_top_k(ids_TK, weights_TK, module.num_experts)
    here_TK = ids_TK < module.num_experts
    token_N, _ = here_TK.nonzero(as_tuple=True)
    return Route.from_edges(token_N, ids_TK[here_TK], weights_TK[here_TK], len(ids_TK), module.num_experts)


def _rows(module: Any, rows_ND: Tensor, ends_E: Tensor) -> Tensor:
    """[N, D] rows sorted by expert -> [N, D] outputs, unweighted: the letter of every variant."""
    if module.has_gate:
        hidden_NH = module._apply_gate(_linear(module, "gate_up_proj", rows_ND, ends_E))
    else:
        hidden_NH = module.act_fn(_linear(module, "up_proj", rows_ND, ends_E))
    rows_ND = _linear(module, "down_proj", hidden_NH, ends_E)
    return module.post_expert_norm(rows_ND) if module.has_post_expert_norm else rows_ND


def _linear(module: Any, name: str, rows_NI: Tensor, ends_E: Tensor) -> Tensor:
    """[N, I] -> [N, O]. Unbound once: an index per expert would make a gradient as large as all experts for each."""
    stack = getattr(module, name)
    weights_E = (stack.transpose(1, 2) if module.is_transposed else stack).unbind()
    biases_E = getattr(module, f"{name}_bias").unbind() if module.has_bias else [None] * len(weights_E)
    parts = [F.linear(rows_NI[low:high], weights_E[e], biases_E[e]) for e, low, high in segments(ends_E)]
    return torch.cat(parts) if parts else rows_NI.new_zeros(0, len(weights_E[0]))
