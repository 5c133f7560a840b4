"""What every bank is: a stack of experts over routed rows. A new kind of expert writes one method, ``rows``."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moeforge.moe.merge import MergedRoute
from moeforge.moe.route import Route, SoftRoute


class Bank(nn.Module):
    """E experts over routed rows. Subclasses may override ``forward`` where a kernel can skip the copies."""

    config: Any

    def rows(self, rows_ND: Tensor, ends_E: Tensor) -> Tensor:
        """[N, D] rows sorted by expert -> [N, D] outputs, unweighted."""
        raise TypeError(f"{type(self).__name__} is a Bank without rows()")

    def everywhere(self, x_TD: Tensor) -> Tensor:
        """[T, D] -> [E, T, D]: every expert's output for every row, for gates that compare them."""
        num_experts, num_tokens = self.config.num_experts, len(x_TD)
        ends_E = torch.arange(1, num_experts + 1, device=x_TD.device, dtype=torch.int32) * num_tokens
        return self.rows(x_TD.repeat(num_experts, 1), ends_E).unflatten(0, (num_experts, num_tokens))

    def first_norms(self, x_TD: Tensor) -> Tensor:
        """[T, D] float32 -> [T, E]: norm of what each expert computes first, where that is cheap."""
        raise TypeError(f"{type(self).__name__} is a Bank without first_norms()")

    def forward(self, x_TD: Tensor, route: Route | SoftRoute | MergedRoute) -> Tensor:
        """[T, D] -> [T, D] weighted sum over the route, its carry included."""
        if isinstance(route, MergedRoute):
            raise TypeError(f"{type(self).__name__} has no parameters that could be merged")
        return route.combine(self.rows(route.gather(x_TD), route.ends), x_TD)

    def begin(self, x_TD: Tensor, route: Route | SoftRoute | MergedRoute) -> Callable[[], Tensor]:
        """``forward``, whose output is asked for later: experts elsewhere can be on their way meanwhile."""
        y_TD = self(x_TD, route)
        return lambda: y_TD


def matrix(*shape: int) -> nn.Parameter:
    """A weight whose last dimension is summed over."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(*shape), std=shape[-1] ** -0.5))


def by_expert(rows_NI: Tensor, ends_E: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None = None) -> Tensor:
    """[N, I] rows sorted by expert -> [N, O], each through its expert's matrix; padding goes through the last one's."""
    # Unbound once: an index per expert would make a gradient as large as all experts for each.
    biases = bias_EO.unbind() if bias_EO is not None else [None] * len(weight_EOI)
    parts = zip(rows_NI.tensor_split(ends_E[:-1].cpu().long()), weight_EOI.unbind(), biases, strict=True)
    return torch.cat([nn.functional.linear(*part) for part in parts])
