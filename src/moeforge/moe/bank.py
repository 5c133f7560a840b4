"""Bank: a stack of same-shaped experts. A new kind of expert writes one method, ``rows``."""

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from moeforge.config import Activation, Config, slot
from moeforge.kernels import expert_mlp
from moeforge.kernels.activation import activate, is_gated
from moeforge.moe.merge import MergedRoute
from moeforge.moe.route import Route, SoftRoute, expert_of


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


class MLPBank(Bank):
    """Gated or plain MLPs. Laid out as in transformers 5: gate_up_proj [E, 2H, D] (gate first), down_proj [E, D, H]."""

    def __init__(self, config: "MLPExperts", d_model: int) -> None:
        super().__init__()
        self.config = config
        width = config.d_expert * (1 + is_gated(config.activation))
        self.gate_up_proj = matrix(config.num_experts, width, d_model)
        self.down_proj = matrix(config.num_experts, d_model, config.d_expert)

    def rows(self, rows_ND: Tensor, ends_E: Tensor) -> Tensor:
        """[N, D] -> [N, D], every row an edge of weight one to itself."""
        order_N = torch.arange(len(rows_ND), device=rows_ND.device)
        ones_N = torch.ones(len(rows_ND), device=rows_ND.device)
        return self._run(rows_ND, Route(order_N, ones_N, ends_E, len(rows_ND), top_k=1, slot=order_N))

    def forward(self, x_TD: Tensor, route: Route | SoftRoute | MergedRoute) -> Tensor:
        """[T, D] -> [T, D]; a Route runs in one call without gathered copies, merged experts are a new stack."""
        if isinstance(route, MergedRoute):
            up, down = route.merge(self.gate_up_proj), route.merge(self.down_proj)
            return expert_mlp(x_TD, route.to_groups, up, down, self.config.activation, self.config.engine)
        if isinstance(route, SoftRoute):
            return super().forward(x_TD, route)
        return route.add_carry(self._run(x_TD, route), x_TD)

    def _run(self, x_TD: Tensor, route: Route) -> Tensor:
        return expert_mlp(x_TD, route, self.gate_up_proj, self.down_proj, self.config.activation, self.config.engine)


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
    engine: Literal["auto", "reference", "streaming", "grouped"] = "auto"
    """Which kernel computes them; ``moeforge doctor`` says what auto picks."""

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


def matrix(*shape: int) -> nn.Parameter:
    """A weight whose last dimension is summed over."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(*shape), std=shape[-1] ** -0.5))


Experts = slot(
    MLPExperts,
    FactorisedExperts,
    LowRankExperts,
    NestedExperts,
    ZeroExperts,
    CopyExperts,
    ConstantExperts,
    default=MLPExperts,
)
