"""A bank whose experts can be asked for a cheap first answer before any of them is chosen."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from moeforge.config import Config
from moeforge.kernels.activation import activate
from moeforge.moe.bank.base import Bank, matrix


class LowRankBank(Bank):
    """Gated MLPs whose gate matrix is B_e A_e (arXiv:2501.13074): A_e x is cheap enough to ask every expert."""

    def __init__(self, config: "LowRankExperts", d_model: int) -> None:
        super().__init__()
        self.config = config
        experts, width, rank = config.num_experts, config.d_expert, config.rank
        self.gate_in, self.gate_out = matrix(experts, rank, d_model), matrix(experts, width, rank)
        self.up_proj, self.down_proj = matrix(experts, width, d_model), matrix(experts, d_model, width)

    def rows(self, rows_ND: Tensor, ends_E: Tensor) -> Tensor:
        """[N, D] -> [N, D]."""
        linear, outputs = nn.functional.linear, []
        weights = zip(self.gate_in, self.gate_out, self.up_proj, self.down_proj, strict=True)
        parts = rows_ND.tensor_split(ends_E[:-1].cpu().long())
        for part, (gate_in, gate_out, up, down) in zip(parts, weights, strict=True):
            gate_up = torch.cat([linear(linear(part, gate_in), gate_out), linear(part, up)], 1)
            outputs.append(linear(activate(gate_up, self.config.activation), down))
        return torch.cat(outputs)

    def first_norms(self, x_TD: Tensor) -> Tensor:
        """[T, D] -> [T, E]: |A_e x|."""
        low = nn.functional.linear(x_TD, self.gate_in.flatten(0, 1).to(x_TD.dtype))
        return low.unflatten(1, (self.config.num_experts, -1)).norm(dim=-1)


class LowRankExperts(Config):
    """Gated MLPs that begin with ``rank`` numbers of their own: with ``gate: activation_norm``."""

    type: Literal["low_rank"] = "low_rank"
    num_experts: int = Field(8, ge=1)
    """How many."""
    d_expert: int = Field(ge=1)
    """Width of each."""
    rank: int = Field(16, ge=1)
    """Of the gate matrix."""
    activation: Literal["swiglu", "geglu"] = "swiglu"
    """On what the gate matrix gives."""

    def build(self, d_model: int) -> Bank:
        """The module."""
        return LowRankBank(self, d_model)

    def costs(self, d_model: int) -> list[int]:
        """Multiplications per row, of each expert."""
        return [self.rank * (d_model + self.d_expert) + 2 * d_model * self.d_expert] * self.num_experts

    def first_cost(self, d_model: int) -> int:
        """Multiplications per row of ``first_norms``, over all experts."""
        return self.num_experts * self.rank * d_model
