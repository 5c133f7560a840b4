"""Gates that look at the row."""

import math
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from moeforge.config import Config
from moeforge.moe.bank import matrix
from moeforge.moe.context import Context
from moeforge.moe.gates.signal import Signal, in_float32
from moeforge.moe.select import check_groups


class LinearGate(nn.Module):
    """logits = x W^T (Switch Transformer, arXiv:2101.03961, section 2.4)."""

    def __init__(self, config: "Linear", d_model: int, num_experts: int) -> None:
        super().__init__()
        self.weight = matrix(num_experts, d_model)
        if config.orthogonal:
            nn.init.orthogonal_(self.weight)
            self.initialised = ("weight",)
        self.weight.requires_grad = not config.frozen
        self.bias = nn.Parameter(torch.zeros(num_experts), requires_grad=not config.frozen) if config.bias else None
        self.previous = matrix(num_experts, num_experts) if config.previous else None
        self.of_token = config.reads == "token"

    def forward(self, x_TD: Tensor, context: Context) -> Signal:
        """[T, D] -> [T, E]."""
        rows_TD = self._token(context) if self.of_token else in_float32(x_TD)
        bias_E = None if self.bias is None else self.bias.to(rows_TD.dtype)
        logits_TE = nn.functional.linear(rows_TD, self.weight.to(rows_TD.dtype), bias_E)
        if self.previous is None:
            return Signal(logits_TE)
        if context.router_state is not None:
            logits_TE = logits_TE + nn.functional.linear(context.router_state, in_float32(self.previous))
        return Signal(logits_TE, logits_TE)

    def _token(self, context: Context) -> Tensor:
        if context.embedded is None:
            raise ValueError("gate: linear with reads: token needs the tokens' embeddings in the context")
        return nn.functional.rms_norm(in_float32(context.embedded), context.embedded.shape[-1:])


class Linear(Config):
    """A linear gate."""

    type: Literal["linear"] = "linear"
    reads: Literal["row", "token"] = "row"
    """The row, which context has been mixed into, or the token's own embedding (StableMoE, arXiv:2204.08396)."""
    bias: bool = False
    """Add a learned bias, which weights see too; ``controller: expert_bias`` has one that only selection sees."""
    frozen: bool = False
    """Stay as initialised (arXiv:2303.01610)."""
    orthogonal: bool = False
    """Start with orthogonal rows (arXiv:2401.13920)."""
    previous: bool = False
    """Add a linear map of the previous MoE layer's logits (arXiv:2410.07348); it must have as many experts."""

    @property
    def learns(self) -> bool:
        """Whether balancing can change it."""
        return not self.frozen

    def state_width(self, num_experts: int) -> int | None:
        """Of what it takes from the layer below and hands on."""
        return num_experts if self.previous else None

    def build(self, d_model: int, num_experts: int) -> nn.Module:
        """The module: ``(x [T, D], context) -> Signal``."""
        return LinearGate(self, d_model, num_experts)


class CosineGate(nn.Module):
    """logits = cos(P x, w_e) / temperature, which is learned (X-MoE, arXiv:2204.09179)."""

    def __init__(self, config: "Cosine", d_model: int, num_experts: int) -> None:
        super().__init__()
        self.project = matrix(config.d_route, d_model) if config.d_route else None
        self.weight = matrix(num_experts, config.d_route or d_model)
        self.scale = nn.Parameter(torch.tensor(math.log(1 / config.temperature)))
        self.bar = nn.Parameter(torch.zeros(num_experts)) if config.thresholds else None

    def forward(self, x_TD: Tensor, context: Context) -> Signal:
        """[T, D] -> [T, E]; with thresholds, positive where the expert's own one is passed."""
        rows = in_float32(x_TD)
        if self.project is not None:
            rows = nn.functional.linear(rows, in_float32(self.project))
        cosine_TE = nn.functional.normalize(rows, dim=-1) @ nn.functional.normalize(in_float32(self.weight), dim=-1).T
        if self.bar is not None:
            cosine_TE = cosine_TE - in_float32(self.bar)
        return Signal(cosine_TE * in_float32(self.scale).exp())


class Cosine(Config):
    """Cosine similarity to an embedding of each expert: the length of a row plays no part."""

    type: Literal["cosine"] = "cosine"
    d_route: int | None = Field(None, ge=1)
    """Compare in a learned projection of this width; null: in d_model."""
    temperature: float = Field(0.07, gt=0)
    """Divides the cosine at the start; learned from there on."""
    thresholds: bool = False
    """Subtract a learned bar of each expert (arXiv:2405.14297); use with ``select: threshold``."""

    def build(self, d_model: int, num_experts: int) -> nn.Module:
        """The module: ``(x [T, D], context) -> Signal``."""
        return CosineGate(self, d_model, num_experts)


class MLPGate(nn.Module):
    """logits = W2 silu(W1 x)."""

    def __init__(self, width: int, d_model: int, num_experts: int) -> None:
        super().__init__()
        self.up, self.weight = matrix(width, d_model), matrix(num_experts, width)

    def forward(self, x_TD: Tensor, context: Context) -> Signal:
        """[T, D] -> [T, E]."""
        hidden = nn.functional.silu(nn.functional.linear(in_float32(x_TD), in_float32(self.up)))
        return Signal(nn.functional.linear(hidden, in_float32(self.weight)))


class MLP(Config):
    """A gate with one hidden layer: experts need not be separated by planes."""

    type: Literal["mlp"] = "mlp"
    width: int = Field(64, ge=1)
    """Of the hidden layer."""

    def build(self, d_model: int, num_experts: int) -> nn.Module:
        """The module: ``(x [T, D], context) -> Signal``."""
        return MLPGate(self.width, d_model, num_experts)


class TwoLevelGate(nn.Module):
    """log p(group) + log p(place in its group): D * (groups + places) weights (SMILE, arXiv:2212.05191)."""

    def __init__(self, num_groups: int, d_model: int, num_experts: int) -> None:
        super().__init__()
        self.group, self.place = matrix(num_groups, d_model), matrix(num_experts // num_groups, d_model)

    def forward(self, x_TD: Tensor, context: Context) -> Signal:
        """[T, D] -> [T, E]; their softmax is the product of both."""
        group_TG = nn.functional.linear(in_float32(x_TD), in_float32(self.group)).log_softmax(-1)
        place_TP = nn.functional.linear(in_float32(x_TD), in_float32(self.place)).log_softmax(-1)
        return Signal((group_TG[:, :, None] + place_TP[:, None]).flatten(1))


class TwoLevel(Config):
    """Choose a group (a node of a cluster), then a place in it."""

    type: Literal["two_level"] = "two_level"
    num_groups: int = Field(2, ge=1)
    """Experts form this many equal groups, in order."""

    def build(self, d_model: int, num_experts: int) -> nn.Module:
        """The module. Raises ValueError when the experts cannot form the groups."""
        return TwoLevelGate(self.num_groups, d_model, num_experts)

    def check(self, num_experts: int) -> None:
        """Raises ValueError when the experts cannot form the groups."""
        check_groups(num_experts, self.num_groups, "gate.num_groups")


class RecurrentGate(nn.Module):
    """h = GRU(P x, h of the layer below), logits = W h: per token, over depth (RMoE, arXiv:2408.06793)."""

    def __init__(self, d_route: int, d_model: int, num_experts: int) -> None:
        super().__init__()
        self.project, self.weight = matrix(d_route, d_model), matrix(num_experts, d_route)
        self.cell = nn.GRUCell(d_route, d_route)

    def forward(self, x_TD: Tensor, context: Context) -> Signal:
        """[T, D] -> [T, E], and the state [T, d_route] for the next layer."""
        rows = nn.functional.linear(in_float32(x_TD), in_float32(self.project))
        below = context.router_state if context.router_state is not None else torch.zeros_like(rows)
        state = torch.gru_cell(rows, below, *(in_float32(weight) for weight in self.cell.parameters()))
        return Signal(nn.functional.linear(state, in_float32(self.weight)), state)


class Recurrent(Config):
    """A gate that remembers what the routers below made of the same token."""

    type: Literal["recurrent"] = "recurrent"
    d_route: int = Field(32, ge=1)
    """Width of the state; the same in every layer."""

    def state_width(self, num_experts: int) -> int:
        """Of what it takes from the layer below and hands on."""
        return self.d_route

    def build(self, d_model: int, num_experts: int) -> nn.Module:
        """The module: ``(x [T, D], context) -> Signal``."""
        return RecurrentGate(self.d_route, d_model, num_experts)


class DistanceGate(nn.Module):
    """logits = -|x - c_e|^2 / sqrt(D) (Moirai-MoE, arXiv:2410.10469)."""

    def __init__(self, config: "Distance", d_model: int, num_experts: int) -> None:
        super().__init__()
        self.centre = matrix(num_experts, d_model)
        self.centre.requires_grad = not config.frozen
        self.commitment = config.commitment

    def forward(self, x_TD: Tensor, context: Context) -> Signal:
        """[T, D] -> [T, E]."""
        rows_TD, centre = in_float32(x_TD), in_float32(self.centre)
        distance_TE = torch.cdist(rows_TD, centre).square()
        logits_TE = -distance_TE / x_TD.shape[1] ** 0.5
        if self.commitment is None:
            return Signal(logits_TE)
        nearest_TD = centre[distance_TE.argmin(1)]
        to_row_T = (rows_TD.detach() - nearest_TD).square().mean(1)
        to_centre_T = (rows_TD - nearest_TD.detach()).square().mean(1)
        return Signal(logits_TE, loss=to_row_T + self.commitment * to_centre_T)


class Distance(Config):
    """The nearest centres."""

    type: Literal["distance"] = "distance"
    frozen: bool = False
    """Centres stay as they are set, for example by k-means."""
    commitment: float | None = Field(None, ge=0)
    """Centres as a codebook, with ``losses: gate_loss``: the mean squared difference between a row and its nearest
    centre pulls the centre, and with this factor the row (arXiv:1711.00937, equation 3)."""

    @model_validator(mode="after")
    def _codebook_learns(self) -> Self:
        if self.frozen and self.commitment is not None:
            raise ValueError("gate: distance with frozen centres has no codebook to learn: leave commitment out")
        return self

    @property
    def hands_loss(self) -> bool:
        """Whether the centres are a codebook."""
        return self.commitment is not None

    @property
    def learns(self) -> bool:
        """Whether balancing can change it."""
        return not self.frozen

    def build(self, d_model: int, num_experts: int) -> nn.Module:
        """The module: ``(x [T, D], context) -> Signal``."""
        return DistanceGate(self, d_model, num_experts)
