"""Banks of very many very small experts, read by gathering: no loop over experts, no matrix of tokens by experts."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from moeforge.config import Activation, Config
from moeforge.kernels.activation import activate, is_gated
from moeforge.moe.bank.base import Bank, matrix
from moeforge.moe.route import expert_of


class NeuronBank(Bank):
    """v_e act(u_e x): one hidden unit each (PEER, arXiv:2407.04153, section 2)."""

    def __init__(self, config: "NeuronExperts", d_model: int) -> None:
        super().__init__()
        self.config = config
        self.gate_up_proj = matrix(config.num_experts, 1 + is_gated(config.activation), d_model)
        self.down_proj = matrix(config.num_experts, d_model)

    def rows(self, rows_ND: Tensor, ends_E: Tensor) -> Tensor:
        """[N, D] -> [N, D]."""
        expert_N = expert_of(ends_E, len(rows_ND))
        up = torch.einsum("nd,nkd->nk", rows_ND, self.gate_up_proj[expert_N].to(rows_ND.dtype))
        return activate(up, self.config.activation).to(rows_ND.dtype) * self.down_proj[expert_N].to(rows_ND.dtype)


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
    """A learned vector each: what product keys look up (arXiv:1907.05242, section 3.1)."""

    def __init__(self, config: "ValueExperts", d_model: int) -> None:
        super().__init__()
        self.config = config
        self.value = matrix(config.num_experts, d_model)

    def rows(self, rows_ND: Tensor, ends_E: Tensor) -> Tensor:
        """[N, D] -> [N, D], whatever the rows are."""
        return self.value[expert_of(ends_E, len(rows_ND))].to(rows_ND.dtype)


class ValueExperts(Config):
    """A memory: the layer's output is a weighted sum of vectors, its input decides which."""

    type: Literal["values"] = "values"
    num_experts: int = Field(1024, ge=1)
    """How many."""

    def build(self, d_model: int) -> Bank:
        """The module."""
        return ValueBank(self, d_model)

    def costs(self, d_model: int) -> list[int]:
        """Multiplications per row, of each expert: its vector by its weight."""
        return [d_model] * self.num_experts
