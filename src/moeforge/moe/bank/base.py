"""What every bank is: a stack of experts over routed rows. A new kind of expert writes one method, ``rows``."""

import torch
from torch import Tensor, nn

from moeforge.moe.route import Route, SoftRoute


class Bank(nn.Module):
    """E experts over routed rows. Subclasses may override ``forward`` where a kernel can skip the copies."""

    def rows(self, rows_ND: Tensor, ends_E: Tensor) -> Tensor:
        """[N, D] rows sorted by expert -> [N, D] outputs, unweighted."""
        raise TypeError(f"{type(self).__name__} is a Bank without rows()")

    def forward(self, x_TD: Tensor, route: Route | SoftRoute) -> Tensor:
        """[T, D] -> [T, D] weighted sum over the route, its carry included."""
        return route.combine(self.rows(route.gather(x_TD), route.ends), x_TD)


def matrix(*shape: int) -> nn.Parameter:
    """A weight whose last dimension is summed over."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(*shape), std=shape[-1] ** -0.5))
