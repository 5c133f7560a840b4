"""Expert MLPs with what no kernel knows, biases and a gate that is limited: expert by expert, in autograd."""

import torch
from pydantic import Field
from torch import Tensor

from moeforge.config import Activation, Config
from moeforge.kernels import sum_by_token
from moeforge.kernels.activation import activate
from moeforge.moe.bank.base import by_expert
from moeforge.moe.route import Route


class Clamp(Config):
    """Gate at most ``limit``, up within plus and minus ``limit``: (up + 1) * gate * sigmoid(alpha * gate).

    As the experts of gpt-oss have it (arXiv:2508.10925).
    """

    limit: float = Field(7.0, gt=0)
    """Of the pre-activations."""
    alpha: float = 1.702
    """Steepness of the sigmoid."""

    def __call__(self, z_NH: Tensor) -> Tensor:
        """[N, 2H] pre-activation, gate first -> [N, H]."""
        gate_NH, up_NH = z_NH.chunk(2, dim=-1)
        gate_NH, up_NH = gate_NH.clamp(max=self.limit), up_NH.clamp(-self.limit, self.limit)
        return (up_NH + 1) * (gate_NH * torch.sigmoid(self.alpha * gate_NH))


def biased_mlp(
    x_TD: Tensor,
    route: Route,
    weights: tuple[Tensor, Tensor],
    biases: tuple[Tensor | None, Tensor | None],
    activation: Activation | Clamp,
    share: float = 1.0,
) -> Tensor:
    """[T, D] -> [T, D] weighted sum over the route. ``weights`` are up [E, 2H or H, D] and down [E, D, H], ``biases``
    [E, 2H or H] and [E, D], of which the second counts for its ``share``."""
    z_NH = by_expert(route.gather(x_TD), route.ends, weights[0], biases[0])
    hidden_NH = activation(z_NH) if isinstance(activation, Clamp) else activate(z_NH, activation)
    rows_ND = by_expert(hidden_NH, route.ends, weights[1], None if biases[1] is None else biases[1] * share)
    return sum_by_token(rows_ND * route.weight[:, None], route).to(x_TD.dtype)
