"""Banks of MLPs: with matrices of their own, with shared factors, or slices of one."""

from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from moeforge.config import Activation, Config
from moeforge.kernels import expert_mlp
from moeforge.kernels.activation import activate, is_gated
from moeforge.moe.bank.base import Bank, matrix
from moeforge.moe.bank.biased import Clamp, biased_mlp
from moeforge.moe.merge import MergedRoute
from moeforge.moe.route import Route, SoftRoute, expert_of


class MLPBank(Bank):
    """Gated or plain MLPs. Laid out as in transformers 5: gate_up_proj [E, 2H, D] (gate first), down_proj [E, D, H].

    The kernels know matrices and plain activations; with biases or a clamp the same runs expert by expert in autograd.
    """

    def __init__(self, config: "MLPExperts", d_model: int) -> None:
        super().__init__()
        self.config, self.gates = config, 1 + is_gated(config.activation)
        width = config.d_expert * self.gates
        self.gate_up_proj = matrix(config.num_experts, width, d_model)
        self.down_proj = matrix(config.num_experts, d_model, config.d_expert)
        self.gate_up_bias, self.down_bias = (_bias(config, size) for size in (width, d_model))
        self.bias_share = 1.0
        """Of ``down_bias``, what is added here: less, where others hold slices of the same experts and add the rest."""

    def rows(self, rows_ND: Tensor, ends_E: Tensor) -> Tensor:
        """[N, D] -> [N, D], every row an edge of weight one to itself."""
        return self._run(rows_ND, Route.from_sorted(ends_E, len(rows_ND)))

    def forward(self, x_TD: Tensor, route: Route | SoftRoute | MergedRoute) -> Tensor:
        """[T, D] -> [T, D]; a Route runs in one call without gathered copies, merged experts are a new stack."""
        if isinstance(route, MergedRoute):
            return self._run(x_TD, route.to_groups, route)
        if isinstance(route, SoftRoute):
            return super().forward(x_TD, route)
        return route.add_carry(self._run(x_TD, route), x_TD)

    def _run(self, x_TD: Tensor, route: Route, merged: MergedRoute | None = None) -> Tensor:
        def stack(parameter: Tensor | None, *hidden: int) -> Any:
            return parameter if merged is None or parameter is None else merged.merge(parameter, *hidden)

        up, down = stack(self.gate_up_proj, 1, self.gates), stack(self.down_proj, 2)
        if not (self.config.bias or self.config.clamp):
            return expert_mlp(x_TD, route, up, down, self.config.activation, self.config.engine)
        biases = stack(self.gate_up_bias, 1, self.gates), stack(self.down_bias)
        return biased_mlp(x_TD, route, (up, down), biases, self.config.clamp or self.config.activation, self.bias_share)


def _bias(config: "MLPExperts", size: int) -> nn.Parameter | None:
    return nn.Parameter(torch.zeros(config.num_experts, size)) if config.bias else None


class MLPExperts(Config):
    """``num_experts`` MLPs of width ``d_expert``."""

    type: Literal["mlp"] = "mlp"
    merges: ClassVar[bool] = True
    num_experts: int = Field(8, ge=1)
    """How many."""
    d_expert: int = Field(ge=1)
    """Width of each."""
    activation: Activation = "swiglu"
    """Names ending in ``glu`` are gated."""
    bias: bool = False
    """Whether both projections of every expert have one."""
    clamp: Clamp | None = None
    """In place of ``activation: swiglu``, one that limits what it reads; null: none."""
    engine: Literal["auto", "reference", "streaming", "grouped", "native", "triton"] = "auto"
    """Which kernel computes them; ``moeforge doctor`` says what auto picks."""

    @model_validator(mode="after")
    def _engines_can(self) -> Self:
        if self.clamp and self.activation != "swiglu":
            raise ValueError(f"clamp limits the gate of activation: swiglu, not {self.activation}")
        if (self.bias or self.clamp) and self.engine != "auto":
            raise ValueError(f"engine: {self.engine} knows neither bias nor clamp: leave it at auto")
        return self

    def build(self, d_model: int) -> Bank:
        """The module."""
        return MLPBank(self, d_model)

    def costs(self, d_model: int) -> list[int]:
        """Multiplications per row, of each expert."""
        return [d_model * self.d_expert * (2 + is_gated(self.activation))] * self.num_experts


class FactorisedBank(Bank):
    """Expert e's matrices are U diag(s_e) V with U and V shared by all (a CP form, arXiv:2402.12550).

    One more expert costs one vector of length ``rank`` per matrix.
    """

    initialised = ("up_scale", "down_scale")

    def __init__(self, config: "FactorisedExperts", d_model: int) -> None:
        super().__init__()
        self.config = config
        width, rank = config.d_expert * (1 + is_gated(config.activation)), config.rank
        self.up_in, self.up_out = matrix(rank, d_model), matrix(width, rank)
        self.down_in, self.down_out = matrix(rank, config.d_expert), matrix(d_model, rank)
        # Around one: every expert starts as its own variation of the shared matrix.
        self.up_scale = nn.Parameter(1 + torch.randn(config.num_experts, rank))
        self.down_scale = nn.Parameter(1 + torch.randn(config.num_experts, rank))

    def rows(self, rows_ND: Tensor, ends_E: Tensor) -> Tensor:
        """[N, D] -> [N, D]."""
        expert_N, linear = expert_of(ends_E, len(rows_ND)), nn.functional.linear
        up = linear(linear(rows_ND, self.up_in) * self.up_scale[expert_N], self.up_out)
        hidden_NH = activate(up, self.config.activation)
        return linear(linear(hidden_NH, self.down_in) * self.down_scale[expert_N], self.down_out).to(rows_ND.dtype)


class FactorisedExperts(Config):
    """MLPs whose matrices share their factors: many experts in few parameters."""

    type: Literal["factorised"] = "factorised"
    num_experts: int = Field(8, ge=1)
    """How many."""
    d_expert: int = Field(ge=1)
    """Width of each."""
    rank: int = Field(32, ge=1)
    """Of each matrix."""
    activation: Activation = "swiglu"
    """Names ending in ``glu`` are gated."""

    def build(self, d_model: int) -> Bank:
        """The module."""
        return FactorisedBank(self, d_model)

    def costs(self, d_model: int) -> list[int]:
        """Multiplications per row, of each expert."""
        width = self.d_expert * (1 + is_gated(self.activation))
        return [self.rank * (2 * d_model + width + self.d_expert)] * self.num_experts


class NestedBank(Bank):
    """One MLP; expert e is its first ``widths[e]`` hidden units (arXiv:2407.19985): no weights of its own."""

    def __init__(self, config: "NestedExperts", d_model: int) -> None:
        super().__init__()
        self.config = config
        self.gates = 1 + is_gated(config.activation)
        self.gate_up_proj = matrix(self.gates, max(config.widths), d_model)
        self.down_proj = matrix(d_model, max(config.widths))

    def rows(self, rows_ND: Tensor, ends_E: Tensor) -> Tensor:
        """[N, D] -> [N, D]."""
        outputs = []
        for width, part in zip(self.config.widths, rows_ND.tensor_split(ends_E[:-1].cpu().long()), strict=True):
            up = nn.functional.linear(part, self.gate_up_proj[:, :width].flatten(0, 1))
            hidden = activate(up, self.config.activation)
            outputs.append(nn.functional.linear(hidden, self.down_proj[:, :width]))
        return torch.cat(outputs)


class NestedExperts(Config):
    """Slices of one MLP, from cheap to whole."""

    type: Literal["nested"] = "nested"
    widths: tuple[Annotated[int, Field(ge=1)], ...] = Field(min_length=1)
    """Hidden units of each expert."""
    activation: Activation = "swiglu"
    """Names ending in ``glu`` are gated."""

    @property
    def num_experts(self) -> int:
        """How many."""
        return len(self.widths)

    def build(self, d_model: int) -> Bank:
        """The module."""
        return NestedBank(self, d_model)

    def costs(self, d_model: int) -> list[int]:
        """Multiplications per row, of each expert."""
        return [d_model * width * (2 + is_gated(self.activation)) for width in self.widths]
