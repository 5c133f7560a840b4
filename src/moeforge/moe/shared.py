"""The branch beside the routed experts that every token takes: shared experts, or PR-MoE's fixed MLP."""

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from moeforge.config import Activation, Config, slot
from moeforge.kernels.activation import activate, is_gated


class MLP(nn.Module):
    """down(act(up(x))), gate and up fused in one matrix as in the banks. A decoder layer without experts is one too."""

    def __init__(self, d_model: int, d_ff: int, activation: Activation, bias: bool = False) -> None:
        super().__init__()
        self.activation: Activation = activation
        self.gate_up_proj = nn.Linear(d_model, d_ff * (1 + is_gated(activation)), bias=bias)
        self.down_proj = nn.Linear(d_ff, d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.down_proj(activate(self.gate_up_proj(x), self.activation))


class Sum(Config):
    """routed + shared (DeepSeekMoE, arXiv:2401.06066, equation 9)."""

    type: Literal["sum"] = "sum"
    num_outputs: Literal[0] = Field(0, exclude=True)
    has_bias: ClassVar[bool] = False

    def __call__(self, logits: Tensor | None, routed_TD: Tensor, shared_TD: Tensor) -> Tensor:
        """[T, D] each."""
        return routed_TD + shared_TD


class Gated(Config):
    """routed + sigmoid(x w) * shared: a scalar gate per token, as Qwen1.5-MoE has it."""

    type: Literal["gated"] = "gated"
    num_outputs: Literal[1] = Field(1, exclude=True)
    has_bias: ClassVar[bool] = False

    def __call__(self, logits: Tensor | None, routed_TD: Tensor, shared_TD: Tensor) -> Tensor:
        """logits [T, 1]."""
        assert logits is not None
        return routed_TD + torch.sigmoid(logits) * shared_TD


class Coefficient(Config):
    """A learned softmax pair weighs the two (reference code of DeepSpeed-MoE's residual layer, arXiv:2201.05596)."""

    type: Literal["coefficient"] = "coefficient"
    num_outputs: Literal[2] = Field(2, exclude=True)
    has_bias: ClassVar[bool] = True

    def routed_share(self, logits: Tensor) -> Tensor:
        """logits [T, 2] -> [T, 1]: how much of each token's output comes from its experts."""
        return logits.softmax(-1)[:, :1]

    def __call__(self, logits: Tensor | None, routed_TD: Tensor, shared_TD: Tensor) -> Tensor:
        """logits [T, 2]: routed first."""
        assert logits is not None
        weight_T2 = logits.softmax(-1)
        return weight_T2[:, :1] * routed_TD + weight_T2[:, 1:] * shared_TD


class Interpolated(Config):
    """g * routed + (1 - g) * shared with g = sigmoid(x w + b): a token may do without experts.

    Conditional MoE routing (arXiv:2212.07571). ``losses: budget_loss`` says how much the experts are used.
    """

    type: Literal["interpolated"] = "interpolated"
    num_outputs: Literal[1] = Field(1, exclude=True)
    has_bias: ClassVar[bool] = True

    def routed_share(self, logits: Tensor) -> Tensor:
        """logits [T, 1] -> [T, 1]: how much of each token's output comes from its experts."""
        return torch.sigmoid(logits)

    def __call__(self, logits: Tensor | None, routed_TD: Tensor, shared_TD: Tensor) -> Tensor:
        """logits [T, 1]."""
        assert logits is not None
        share_T1 = self.routed_share(logits)
        return share_T1 * routed_TD + (1 - share_T1) * shared_TD


Mix = slot(Sum, Gated, Coefficient, Interpolated)


class SharedConfig(Config):
    """``num_shared_experts`` experts side by side are one MLP of their total width."""

    num_shared_experts: int = Field(1, ge=1)
    """How many, each ``d_expert`` wide."""
    d_expert: int = Field(ge=1)
    """Width of one."""
    activation: Activation = "swiglu"
    """Of every shared expert."""
    bias: bool = False
    """Whether their two projections have one."""
    mix: Mix = Sum()
    """How it joins the routed experts."""

    @property
    def d_ff(self) -> int:
        """Total width."""
        return self.num_shared_experts * self.d_expert


class Shared(nn.Module):
    """The MLP and the gate of its mix."""

    def __init__(self, config: SharedConfig, d_model: int) -> None:
        super().__init__()
        self.config = config
        self.mlp = MLP(d_model, config.d_ff, config.activation, config.bias)
        outputs = config.mix.num_outputs
        self.gate = nn.Linear(d_model, outputs, bias=config.mix.has_bias) if outputs else None

    def forward(self, x_TD: Tensor, routed_TD: Tensor) -> Tensor:
        """[T, D] input and routed output -> [T, D] layer output."""
        return self.begin(x_TD)(routed_TD)

    def begin(self, x_TD: Tensor) -> Callable[[Tensor], Tensor]:
        """All that can be computed before the routed output is there."""
        logits = self.gate(x_TD) if self.gate is not None else None
        shared_TD = self.mlp(x_TD)
        return lambda routed_TD: self.config.mix(logits, routed_TD, shared_TD)

    def routed_share(self, x_TD: Tensor) -> Tensor:
        """[T, D] -> [T, 1] float32: how much of each token's output comes from its experts, where the mix says so."""
        assert self.gate is not None
        return self.config.mix.routed_share(self.gate(x_TD)).float()
