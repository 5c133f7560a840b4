"""Bank: a stack of same-shaped experts. A new kind of expert writes one method, ``rows``."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from moeforge.config import Activation, Config, slot
from moeforge.kernels import expert_mlp
from moeforge.kernels.activation import is_gated
from moeforge.moe.route import Route, SoftRoute


class Bank(nn.Module):
    """E experts over routed rows. Subclasses may override ``forward`` where a kernel can skip the copies."""

    def rows(self, rows_ND: Tensor, ends_E: Tensor) -> Tensor:
        """[N, D] rows sorted by expert -> [N, D] outputs, unweighted."""
        raise TypeError(f"{type(self).__name__} is a Bank without rows()")

    def forward(self, x_TD: Tensor, route: Route | SoftRoute) -> Tensor:
        """[T, D] -> [T, D] weighted sum over the route, its carry included."""
        return route.combine(self.rows(route.gather(x_TD), route.ends), x_TD)


class MLPBank(Bank):
    """Gated or plain MLPs. Laid out as in transformers 5: gate_up_proj [E, 2H, D] (gate first), down_proj [E, D, H]."""

    def __init__(self, config: "MLPExperts", d_model: int) -> None:
        super().__init__()
        self.config = config
        width = config.d_expert * (1 + is_gated(config.activation))
        self.gate_up_proj = nn.Parameter(torch.empty(config.num_experts, width, d_model))
        self.down_proj = nn.Parameter(torch.empty(config.num_experts, d_model, config.d_expert))
        for weight in self.parameters():
            nn.init.trunc_normal_(weight, std=weight.shape[-1] ** -0.5)

    def rows(self, rows_ND: Tensor, ends_E: Tensor) -> Tensor:
        """[N, D] -> [N, D], every row an edge of weight one to itself."""
        order_N = torch.arange(len(rows_ND), device=rows_ND.device)
        ones_N = torch.ones(len(rows_ND), device=rows_ND.device)
        return self._run(rows_ND, Route(order_N, ones_N, ends_E, len(rows_ND), top_k=1, slot=order_N))

    def forward(self, x_TD: Tensor, route: Route | SoftRoute) -> Tensor:
        """[T, D] -> [T, D]; a Route runs in one call without gathered copies."""
        if isinstance(route, SoftRoute):
            return super().forward(x_TD, route)
        return route.add_carry(self._run(x_TD, route), x_TD)

    def _run(self, x_TD: Tensor, route: Route) -> Tensor:
        return expert_mlp(x_TD, route, self.gate_up_proj, self.down_proj, self.config.activation, self.config.engine)


class MLPExperts(Config):
    """``num_experts`` MLPs of width ``d_expert``."""

    type: Literal["mlp"] = "mlp"
    num_experts: int = Field(8, ge=1)
    """How many."""
    d_expert: int = Field(ge=1)
    """Width of each."""
    activation: Activation = "swiglu"
    """Names ending in ``glu`` are gated."""
    engine: Literal["auto", "reference", "streaming", "grouped"] = "auto"
    """Which kernel computes them; ``moeforge doctor`` says what auto picks."""

    def build(self, d_model: int) -> Bank:
        """The module."""
        return MLPBank(self, d_model)


Experts = slot(MLPExperts)
