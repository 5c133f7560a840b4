"""The plain twin: one expert after another in ordinary differentiable torch. All other engines are tested on it."""

import torch
from torch import Tensor

from moeforge.config import Activation
from moeforge.kernels.activation import activate
from moeforge.kernels.edges import Edges, segments


def reference(x_TD: Tensor, edges: Edges, up_EHD: Tensor, down_EDH: Tensor, activation: Activation) -> Tensor:
    """[T, D] weighted sum of the chosen experts' outputs, each computed on its own rows; accumulated in float32."""
    total_TD = x_TD.new_zeros(edges.num_tokens, x_TD.shape[1], dtype=torch.promote_types(x_TD.dtype, torch.float32))
    for expert, low, high in segments(edges.ends):
        token_N = edges.token[low:high]
        rows = activate(x_TD[token_N] @ up_EHD[expert].T, activation) @ down_EDH[expert].T
        weighted = rows.to(total_TD.dtype) * edges.weight[low:high, None]
        total_TD = total_TD.index_add(0, token_N, weighted.to(total_TD.dtype))
    return total_TD.to(x_TD.dtype)
