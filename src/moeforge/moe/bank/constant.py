"""Banks with little or no work: nothing, the row itself, a learned vector."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from moeforge.config import Config
from moeforge.moe.bank.base import Bank, matrix
from moeforge.moe.merge import MergedRoute
from moeforge.moe.route import Route, SoftRoute, expert_of


class ZeroBank(Bank):
    """Experts that compute nothing and give nothing (AdaMoE, arXiv:2406.13233; MoE++, arXiv:2410.07348)."""

    def __init__(self, config: "ZeroExperts") -> None:
        super().__init__()
        self.config = config

    def rows(self, rows_ND: Tensor, ends_E: Tensor) -> Tensor:
        """Zeros."""
        return torch.zeros_like(rows_ND)

    def forward(self, x_TD: Tensor, route: Route | SoftRoute | MergedRoute) -> Tensor:
        """Zeros, without a row gathered, but for what the route carries."""
        zeros_TD = torch.zeros_like(x_TD)
        return route.add_carry(zeros_TD, x_TD) if isinstance(route, Route) else zeros_TD


class ZeroExperts(Config):
    """A token that chooses one of these leaves that choice empty."""

    type: Literal["zero"] = "zero"
    num_experts: int = Field(1, ge=1)
    """How many."""

    def build(self, d_model: int) -> Bank:
        """The module."""
        return ZeroBank(self)

    def costs(self, d_model: int) -> list[int]:
        """None."""
        return [0] * self.num_experts


class CopyBank(Bank):
    """Experts that give back what they get (MoE++, arXiv:2410.07348)."""

    def __init__(self, config: "CopyExperts") -> None:
        super().__init__()
        self.config = config

    def rows(self, rows_ND: Tensor, ends_E: Tensor) -> Tensor:
        """The rows."""
        return rows_ND


class CopyExperts(Config):
    """A token that chooses one of these skips that choice's work."""

    type: Literal["copy"] = "copy"
    num_experts: int = Field(1, ge=1)
    """How many."""

    def build(self, d_model: int) -> Bank:
        """The module."""
        return CopyBank(self)

    def costs(self, d_model: int) -> list[int]:
        """None."""
        return [0] * self.num_experts


class ConstantBank(Bank):
    """a x + b v_e, (a, b) = softmax(W_e x) and v_e learned (MoE++, arXiv:2410.07348)."""

    def __init__(self, config: "ConstantExperts", d_model: int) -> None:
        super().__init__()
        self.config = config
        self.value = matrix(config.num_experts, d_model)
        self.mix = matrix(config.num_experts, 2, d_model)

    def rows(self, rows_ND: Tensor, ends_E: Tensor) -> Tensor:
        """[N, D] -> [N, D]."""
        expert_N = expert_of(ends_E, len(rows_ND))
        share_N2 = torch.einsum("nd,nkd->nk", rows_ND, self.mix.to(rows_ND.dtype)[expert_N]).softmax(-1)
        return share_N2[:, :1] * rows_ND + share_N2[:, 1:] * self.value.to(rows_ND.dtype)[expert_N]


class ConstantExperts(Config):
    """A learned vector each, mixed with the row itself."""

    type: Literal["constant"] = "constant"
    num_experts: int = Field(1, ge=1)
    """How many."""

    def build(self, d_model: int) -> Bank:
        """The module."""
        return ConstantBank(self, d_model)

    def costs(self, d_model: int) -> list[int]:
        """Multiplications per row, of each expert."""
        return [2 * d_model] * self.num_experts
