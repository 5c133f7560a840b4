"""Router: gate -> noise -> score -> select -> weigh -> capacity. Its config is the pipeline.

The module holds what has parameters or moves after a step: the gate, learned noise, the selection bias.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from moeforge.config import Config
from moeforge.moe.balance import BalanceLoss, Controller, LoadBalancingLoss
from moeforge.moe.capacity import Limit
from moeforge.moe.context import Context
from moeforge.moe.gates import Gate, Linear, Signal
from moeforge.moe.noise import Noise
from moeforge.moe.route import Route, SoftRoute
from moeforge.moe.scores import Score, Softmax
from moeforge.moe.select import Select, TopK
from moeforge.moe.weigh import Scores, Weigh


class RouterConfig(Config):
    """The parts of one router, and what keeps its loads even."""

    gate: Gate = Linear()
    """Rows to logits."""
    input_jitter: float = Field(0.0, ge=0, lt=1)
    """While training, rows are multiplied by uniform numbers of [1 - this, 1 + this] (arXiv:2101.03961)."""
    noise: tuple[Noise, ...] = ()
    """What is done to logits, in order."""
    score: Score = Softmax()
    """Logits to scores."""
    select: Select = TopK()
    """Scores to chosen experts."""
    weigh: Weigh = Scores()
    """Scores of the chosen to combine weights."""
    capacity: tuple[Limit, ...] = ()
    """What is left out of the route, in order; empty: nothing."""
    losses: tuple[BalanceLoss, ...] = Field(default_factory=lambda: (LoadBalancingLoss(),))
    """Balance losses; an empty list switches them off."""
    controller: Controller | None = None
    """Moves the selection bias, or the weight of the losses, after each step."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if not hasattr(self.select, "compares_sizes"):
            raise ValueError(f"select: {self.select.type} does not inherit from moeforge.moe.select.Selector")
        types = [loss.type for loss in self.losses]
        if len(set(types)) < len(types):
            raise ValueError(f"losses: each type once, not {types}")
        if self.controller and self.controller.moves == "loss_scale" and not self.losses:
            raise ValueError(f"controller: {self.controller.type} moves the weight of the losses, and losses is empty")
        if self.gate.type == "hash" and (self.score.type not in ("softmax", "sigmoid") or self.select != TopK(k=1)):
            raise ValueError(
                "gate: hash names one expert: it needs select: {type: top_k, k: 1}, score: softmax or sigmoid"
            )
        if self.select.compares_sizes and self.score.type == "logits":
            raise ValueError(f"select: {self.select.type} compares sizes: logits may be negative, name another score")
        if self.weigh.type == "complement" and self.score.type == "logits":
            raise ValueError("weigh: complement takes shares of scores: logits may be negative, name another score")
        if self.select.type == "soft" and (self.losses or self.controller or self.capacity):
            raise ValueError("select: soft fills every slot; set losses: [] and neither controller nor capacity")
        if self.select.type == "soft" and self.score.type != "logits":
            raise ValueError(f"select: soft has its own softmax; score: {self.score.type} would come before it")
        if self.select.type == "product_keys" and (self.losses or self.controller):
            raise ValueError(
                "select: product_keys has no scores of all experts to balance; set losses: [], no controller"
            )
        if self.select.type == "product_keys" and self.score.type != "logits":
            raise ValueError(f"select: product_keys adds logits of two halves, not {self.score.type} scores")
        rank, cored = getattr(self.select, "rank", 0), self.gate.type == "query" and self.gate.rank
        if rank != cored or (cored and self.gate.heads != self.select.heads):
            raise ValueError("gate: query and select: product_keys need the same rank and queries = heads * 2 * rank")
        if not self.select.scores_experts and any(noise.type == "visible" for noise in self.noise):
            raise ValueError(f"noise: visible hides experts, and select: {self.select.type} has no logit of each")
        if not self.select.scores_experts and getattr(self.weigh, "over", "chosen") != "chosen":
            raise ValueError(
                f"weigh: over: computed tells experts apart, select: {self.select.type} has no score of each"
            )
        if not getattr(self.gate, "learns", True) and (self.losses or self.controller):
            raise ValueError(f"gate: {self.gate.type} learns nothing, so nothing can balance it; set losses: []")
        return self

    def check(self, num_experts: int, costs: Sequence[int]) -> None:
        """Raises ValueError when these parts cannot work with ``num_experts``, or do nothing with such ``costs``."""
        self.select.check(num_experts)
        if self.weigh.type == "complement" and self.select.mean_experts(num_experts) <= 1:
            raise ValueError("weigh: complement sums up all chosen experts but one: choose more than one")
        for part in (self.gate, self.score):
            if hasattr(part, "check"):
                part.check(self.select.columns(num_experts))
        for part in (self.weigh, *self.losses):
            if hasattr(part, "check_costs"):
                part.check_costs(costs)

    @property
    def leaks(self) -> bool:
        """Whether a token's experts depend on other tokens of the batch, those after it included."""
        return self.select.leaks or any(limit.leaks for limit in self.capacity)


@dataclass(frozen=True)
class Routing:
    """What a router decided about T tokens, and what the balance losses need of how it came to it."""

    route: Route | SoftRoute
    probs: Tensor | None = None
    """[T, E] float32 distribution over experts."""
    logits: Tensor | None = None
    """[T, E] float32."""
    scores: Tensor | None = None
    """[T, E] float32, as weights are made of them."""
    state: Tensor | None = None
    """Handed to the next MoE layer's router."""
    cost: tuple[float, ...] | None = None
    """Of each expert, its work as a share of the dearest one's."""
    before_limits: Route | SoftRoute | None = None
    """The route before its capacity limits; None where nothing was left out."""

    @property
    def chosen(self) -> Route | SoftRoute:
        """The route with what was left out; what balance is judged by."""
        return self.before_limits or self.route

    @property
    def choices(self) -> Tensor:
        """[E] int64: choices per expert, those left out included."""
        return self.chosen.counts

    @property
    def dropped(self) -> int:
        """Choices that were left out."""
        return 0 if self.before_limits is None else int(self.choices.sum() - self.route.counts.sum())


class Router(nn.Module):
    """Decides in float32, also under autocast and in a bf16 model: bf16 logits flip near-ties."""

    expert_bias: Tensor | None
    loss_scale: Tensor | None

    def __init__(
        self, config: RouterConfig, d_model: int, num_experts: int, costs: Sequence[int] | None = None
    ) -> None:
        """``costs`` are the work of each expert, for parts that tell dear from cheap ones; None: all alike."""
        super().__init__()
        self.config, self.num_experts = config, num_experts
        costs = costs or [1] * num_experts
        dearest = max(1, *costs)
        self.cost = tuple(cost / dearest for cost in costs)
        columns = config.select.columns(num_experts)
        self.gate = config.gate.build(d_model, columns)
        self.noise = nn.ModuleList(part.build(d_model, columns) for part in config.noise)
        moves = config.controller.moves if config.controller else None
        self.register_buffer("expert_bias", torch.zeros(num_experts) if moves == "expert_bias" else None)
        self.register_buffer("loss_scale", torch.ones(()) if moves == "loss_scale" else None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What a controller moves keeps its type under ``model.bfloat16()``: bf16 would swallow its steps."""
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            now = getattr(self, name)
            if now.dtype != buffer.dtype:
                setattr(self, name, buffer.to(now.device))
        return self

    def forward(self, x_TD: Tensor, context: Context) -> Routing:
        """[T, D] rows -> where they go."""
        config, context = self.config, replace(context, training=self.training, cost=self.cost)
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE, state = self._logits(x_TD, context)
            scores_TE = config.score(logits_TE, context)
            biased_TE = scores_TE if self.expert_bias is None else scores_TE + self.expert_bias
            route = config.select.route(scores_TE, biased_TE.detach(), config.weigh, context)
            kept = route
            for limit in config.capacity:
                kept = limit(kept, context)
            probs_TE = config.score.probs(scores_TE)
            before = None if kept is route else route
            return Routing(kept, probs_TE, logits_TE, scores_TE, state, self.cost, before)

    def _logits(self, x_TD: Tensor, context: Context) -> Signal:
        rows_TD, jitter = x_TD, self.config.input_jitter
        if jitter and self.training:
            rows_TD = x_TD * torch.empty_like(x_TD).uniform_(1 - jitter, 1 + jitter)
        logits_TE, state = self.gate(rows_TD, context)
        for part in self.noise:
            logits_TE = part(logits_TE, x_TD, context)
        return logits_TE, state

    def balance_losses(
        self, routing: Routing, batch_size: int, step_counts: dict[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Unweighted value of each loss by its type; ``step_counts`` as ``counts`` gave them, summed over the step."""
        counts = step_counts or {}
        return {loss.type: loss(routing, batch_size, counts.get(loss.type)) for loss in self.config.losses}

    @property
    def loss_weights(self) -> dict[str, float]:
        """What each balance loss is multiplied by in this step."""
        scale = 1.0 if self.loss_scale is None else float(self.loss_scale)
        return {loss.type: loss.weight * scale for loss in self.config.losses}

    def counts(self, routing: Routing) -> dict[str, Tensor]:
        """[E] choices per loss that wants the counts of the whole step before its gradient is right."""
        wanting = [loss for loss in self.config.losses if getattr(loss, "over", None) == "batch"]
        return {loss.type: loss.counts(routing) for loss in wanting}

    @torch.no_grad()
    def step(self, tokens_per_expert_E: Tensor, num_tokens: int) -> None:
        """Moves what the controller moves by the loads of the whole step. Call once, after the optimizer."""
        controller = self.config.controller
        if controller is not None:
            controller(getattr(self, controller.moves), tokens_per_expert_E, num_tokens)
