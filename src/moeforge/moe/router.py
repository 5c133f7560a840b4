"""Router: gate -> score -> select -> weigh. Its config is the pipeline; the module holds the gate and the bias."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from pydantic import Field
from torch import Tensor, nn

from moeforge.config import Config
from moeforge.moe.balance import BalanceLoss, Controller, LoadBalancingLoss
from moeforge.moe.context import Context
from moeforge.moe.gates import Gate, Linear
from moeforge.moe.route import Route, SoftRoute
from moeforge.moe.scores import Score, Softmax
from moeforge.moe.select import Select, TopK
from moeforge.moe.weigh import Scores, Weigh


class RouterConfig(Config):
    """The parts of one router, and what keeps its loads even."""

    gate: Gate = Linear()
    """Rows to logits."""
    score: Score = Softmax()
    """Logits to scores."""
    select: Select = TopK()
    """Scores to chosen experts."""
    weigh: Weigh = Scores()
    """Scores of the chosen to combine weights."""
    losses: tuple[BalanceLoss, ...] = Field(default_factory=lambda: (LoadBalancingLoss(),))
    """Balance losses; an empty list switches them off."""
    controller: Controller | None = None
    """Moves the selection bias after each step."""


@dataclass(frozen=True)
class Routing:
    """What a router decided about T tokens, and what the balance losses need of how it came to it."""

    route: Route | SoftRoute
    probs: Tensor | None = None
    """[T, E] float32 distribution over experts."""
    logits: Tensor | None = None
    """[T, E] float32."""
    state: Tensor | None = None
    """Handed to the next MoE layer's router."""


class Router(nn.Module):
    """Decides in float32, also under autocast and in a bf16 model: bf16 logits flip near-ties."""

    expert_bias: Tensor | None

    def __init__(self, config: RouterConfig, d_model: int, num_experts: int) -> None:
        super().__init__()
        self.config, self.num_experts = config, num_experts
        self.gate = config.gate.build(d_model, num_experts)
        bias = torch.zeros(num_experts) if config.controller else None
        self.register_buffer("expert_bias", bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """The bias keeps its type under ``model.bfloat16()``: bf16 would swallow the controller's steps."""
        bias = self.expert_bias
        super()._apply(fn, recurse)
        if bias is not None and self.expert_bias is not None and self.expert_bias.dtype != bias.dtype:
            self.expert_bias = bias.to(self.expert_bias.device)
        return self

    def forward(self, x_TD: Tensor, context: Context) -> Routing:
        """[T, D] rows -> where they go."""
        config = self.config
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = self.gate(x_TD, context)
            scores_TE = config.score(logits_TE)
            biased_TE = scores_TE if self.expert_bias is None else scores_TE + self.expert_bias
            selection = config.select(biased_TE.detach())
            weights = config.weigh(scores_TE, selection)
            route = selection.route(weights, self.num_experts)
            return Routing(route, config.score.probs(scores_TE), logits_TE)

    def balance_losses(
        self, routing: Routing, batch_size: int, step_counts: dict[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Unweighted value of each loss by its type; ``step_counts`` as ``counts`` gave them, summed over the step."""
        counts = step_counts or {}
        return {loss.type: loss(routing, batch_size, counts.get(loss.type)) for loss in self.config.losses}

    def counts(self, routing: Routing) -> dict[str, Tensor]:
        """[E] choices per loss that wants the counts of the whole step before its gradient is right."""
        wanting = [loss for loss in self.config.losses if getattr(loss, "over", None) == "batch"]
        return {loss.type: loss.counts(routing) for loss in wanting}

    @torch.no_grad()
    def step(self, tokens_per_expert_E: Tensor) -> None:
        """Moves the selection bias by the loads of the whole step. Call once, after the optimizer."""
        if self.config.controller is not None and self.expert_bias is not None:
            self.config.controller(self.expert_bias, tokens_per_expert_E)
