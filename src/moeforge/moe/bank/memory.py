"""Banks of very many very small experts, read by gathering: no loop over experts, no matrix of tokens by experts."""

from dataclasses import replace
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from moeforge.config import Activation, Config
from moeforge.kernels.activation import activate, is_gated
from moeforge.moe.bank.base import Bank, matrix
from moeforge.moe.merge import MergedRoute
from moeforge.moe.route import Route, SoftRoute, expert_of
from moeforge.moe.select.selector import check_groups


class NeuronBank(Bank):
    """v_e act(u_e x): one hidden unit each (PEER, arXiv:2407.04153, section 2)."""

    def __init__(self, config: "NeuronExperts", d_model: int) -> None:
        super().__init__()
        self.config = config
        self.gate_up_proj = matrix(config.num_experts, 1 + is_gated(config.activation), d_model)
        self.down_proj = matrix(config.num_experts, d_model)

    def rows(self, rows_ND: Tensor, ends_E: Tensor) -> Tensor:
        """[N, D] -> [N, D]."""
        expert_N, read = expert_of(ends_E, len(rows_ND)), nn.functional.embedding
        up_NKD = read(expert_N, self.gate_up_proj.flatten(1)).unflatten(1, self.gate_up_proj.shape[1:])
        up_NK = torch.einsum("nd,nkd->nk", rows_ND, up_NKD.to(rows_ND.dtype))
        hidden_N1 = activate(up_NK, self.config.activation)
        return (hidden_N1 * read(expert_N, self.down_proj)).to(rows_ND.dtype)


class NeuronExperts(Config):
    """Single hidden units, each read with its two vectors: a million of them is a table, not a loop."""

    type: Literal["neurons"] = "neurons"
    num_experts: int = Field(1024, ge=1)
    """How many."""
    activation: Activation = "gelu"
    """Names ending in ``glu`` are gated."""

    def build(self, d_model: int) -> Bank:
        """The module."""
        return NeuronBank(self, d_model)

    def costs(self, d_model: int) -> list[int]:
        """Multiplications per row, of each expert."""
        return [d_model * (2 + is_gated(self.activation))] * self.num_experts


class ValueBank(Bank):
    """A learned vector each: what product keys look up (arXiv:1907.05242, section 3.1).

    With ``tables`` > 1, expert e has vector e mod (E / tables), projected by the matrix of table e // (E / tables):
    weighted sums come first, so the matrices cost as much per token as one row each (arXiv:2411.12364).
    """

    def __init__(self, config: "ValueExperts", d_model: int) -> None:
        super().__init__()
        self.config = config
        self.value = matrix(config.num_experts // config.tables, d_model)
        self.project = matrix(config.tables, d_model, d_model) if config.tables > 1 else None

    def rows(self, rows_ND: Tensor, ends_E: Tensor) -> Tensor:
        """[N, D] -> [N, D] of one table, whatever the rows are; not projected."""
        return nn.functional.embedding(expert_of(ends_E, len(rows_ND)), self.value).to(rows_ND.dtype)

    def everywhere(self, x_TD: Tensor) -> Tensor:
        """[T, D] -> [E, T, D], projected."""
        value = self.value if self.project is None else (self.value @ self.project.transpose(1, 2)).flatten(0, 1)
        return value[:, None].expand(-1, len(x_TD), -1).to(x_TD.dtype)

    def forward(self, x_TD: Tensor, route: Route | SoftRoute | MergedRoute) -> Tensor:
        """[T, D] -> [T, D] weighted sum over the route, its carry included."""
        if self.project is None or isinstance(route, MergedRoute):
            return super().forward(x_TD, route)
        y_TD, read = torch.zeros_like(x_TD), super().forward
        uncarried = route if isinstance(route, SoftRoute) else replace(route, carry=None)
        for part, weight in zip(uncarried.split([len(self.value)] * self.config.tables), self.project, strict=True):
            y_TD = y_TD + nn.functional.linear(read(x_TD, part), weight.to(x_TD.dtype))
        return y_TD if isinstance(route, SoftRoute) else route.add_carry(y_TD, x_TD)


class ValueExperts(Config):
    """A memory: the layer's output is a weighted sum of vectors, its input decides which."""

    type: Literal["values"] = "values"
    num_experts: int = Field(1024, ge=1)
    """How many."""
    tables: int = Field(1, ge=1)
    """Equal groups of experts, in order, that share their vectors and have a projection each."""

    @model_validator(mode="after")
    def _tables_are_equal(self) -> Self:
        check_groups(self.num_experts, self.tables, "tables")
        return self

    def build(self, d_model: int) -> Bank:
        """The module."""
        return ValueBank(self, d_model)

    def costs(self, d_model: int) -> list[int]:
        """Multiplications per row, of each expert: its vector by its weight."""
        return [d_model] * self.num_experts

    def fixed_cost(self, d_model: int) -> int:
        """Multiplications per row, whichever experts it has."""
        return self.tables * d_model**2 if self.tables > 1 else 0
