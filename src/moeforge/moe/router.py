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
from moeforge.moe.combinations import objections
from moeforge.moe.context import Context
from moeforge.moe.gates import Gate, Linear, Signal
from moeforge.moe.merge import MergedRoute
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
        found = list(objections(self))
        if found:
            raise ValueError("; ".join(found))
        return self

    def check(self, num_experts: int, costs: Sequence[int]) -> None:
        """Raises ValueError when these parts cannot work with ``num_experts``, or do nothing with such ``costs``."""
        self.select.check(num_experts)
        if self.weigh.type == "complement" and self.select.mean_experts(num_experts) <= 1:
            raise ValueError("weigh: complement sums up all chosen experts but one: choose more than one")
        for part in (self.gate, self.score):
            if hasattr(part, "check"):
                part.check(self.select.columns(num_experts))
        for part in (self.gate, *self.noise, self.weigh, *self.capacity, *self.losses):
            if hasattr(part, "check_costs"):
                part.check_costs(costs)
            if hasattr(part, "check_router"):
                part.check_router(self, num_experts)

    @property
    def leaks(self) -> bool:
        """Whether a token's experts depend on other tokens of the batch, those after it included."""
        return self.select.leaks or any(limit.leaks for limit in self.capacity)

    @property
    def decodes(self) -> bool:
        """Whether a token's experts follow from the token, so that a model writes as it was trained to read."""
        return not (self.leaks or self.select.looks_back)


@dataclass(frozen=True)
class Routing:
    """What a router decided about T tokens, and what the balance losses need of how it came to it."""

    route: Route | SoftRoute | MergedRoute
    probs: Tensor | None = None
    """[T, E] float32 distribution over experts."""
    logits: Tensor | None = None
    """[T, E] float32."""
    scores: Tensor | None = None
    """[T, E] float32, as weights are made of them."""
    state: Tensor | None = None
    """Handed to the next MoE layer's router."""
    gate_loss: Tensor | None = None
    """[T] float32: what the gate itself wants small, where it says so."""
    cost: tuple[float, ...] | None = None
    """Of each expert, its work as a share of the dearest one's."""
    before_limits: Route | SoftRoute | MergedRoute | None = None
    """The route before its capacity limits; None where nothing was left out."""
    clean: Tensor | None = None
    """[T, E] float32: logits before noise."""
    noise_std: Tensor | None = None
    """[T, E] or scalar: deviation of Gaussian noise, where a loss asks for it."""
    embeddings: Tensor | None = None
    """[E, ...]: the gate's row of each expert, where a loss asks for them."""
    core: Tensor | None = None
    """[R, R]: how vectors of rows and columns multiply, where a loss asks for it."""
    routed_share: Tensor | None = None
    """[T, 1] float32: how much of a token's output comes from experts, where a loss asks for it."""
    conflict: Tensor | None = None
    """Scalar: zero, with a gradient that is known in the backward pass, where a loss asks for it."""

    @property
    def chosen(self) -> Route | SoftRoute | MergedRoute:
        """The route with what was left out; what balance is judged by."""
        return self.before_limits or self.route

    @property
    def choices(self) -> Tensor:
        """[E] int64: choices per expert, those left out included."""
        return self.chosen.counts

    @property
    def dropped(self) -> int:
        """Choices that were left out for good."""
        return 0 if self.before_limits is None else int(self.choices.sum() - self.route.counts.sum())


class Router(nn.Module):
    """Decides in float32, also under autocast and in a bf16 model: bf16 logits flip near-ties."""

    expert_bias: Tensor | None
    loss_scale: Tensor | None
    initialised = ("auxiliary",)

    def __init__(
        self, config: RouterConfig, d_model: int, num_experts: int, costs: Sequence[int] | None = None
    ) -> None:
        """``costs`` are the work of each expert, for parts that tell dear from cheap ones; None: all alike."""
        super().__init__()
        costs = costs or [1] * num_experts
        config.check(num_experts, costs)
        self.config, self.num_experts = config, num_experts
        dearest = max(1, *costs)
        self.cost = tuple(cost / dearest for cost in costs)
        columns = config.select.columns(num_experts)
        self.gate = config.gate.build(d_model, columns)
        self.noise = nn.ModuleList(part.build(d_model, columns) for part in config.noise)
        read = config.select.auxiliary
        # An expert's vector, less one, for where it does not run: so weight decay takes it to what changes nothing.
        self.auxiliary = nn.Parameter(torch.zeros(num_experts, d_model)) if read else None
        self.looked_up = {"auxiliary": read} if read else {}
        self.shows_noise = any(getattr(loss, "reads_noise", False) for loss in config.losses)
        self.reads_gate = dict(loss.reads_gate for loss in config.losses if hasattr(loss, "reads_gate"))
        """By field of ``Routing``, the gate's weight that a loss wants to see there."""
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
        context = config.select.facts(context, len(x_TD))
        with torch.autocast(x_TD.device.type, enabled=False):
            signal, clean_TE = self._signal(x_TD, context)
            logits_TE = signal.logits
            scores_TE = config.score(logits_TE, context)
            biased_TE = scores_TE if self.expert_bias is None else scores_TE + self.expert_bias
            route = config.select.route(scores_TE, biased_TE.detach(), config.weigh, context)
            probs_TE, kept = config.score.probs(scores_TE), route
            for limit in config.capacity:
                kept = limit(kept, probs_TE, lambda selection: config.weigh(scores_TE, selection, context), context)
            before = None if kept is route else route
            seen = {"clean": clean_TE, "noise_std": self._noise_std(x_TD, logits_TE)}
            # Copies: FSDP has taken the weights themselves away when a loss looks at them.
            seen |= {name: getattr(self.gate, weight).clone() for name, weight in self.reads_gate.items()}
            return Routing(kept, probs_TE, logits_TE, scores_TE, signal.state, signal.loss, self.cost, before, **seen)

    def as_read(self, rows_TD: Tensor, route: Route | SoftRoute | MergedRoute) -> Tensor:
        """[T, D] -> [T, D]: what experts read, where others that were chosen do not run (arXiv:2503.00634)."""
        if self.auxiliary is None or not isinstance(route, Route) or route.auxiliary is None:
            return rows_TD
        return rows_TD * (1 + route.auxiliary.to(self.auxiliary.dtype) @ self.auxiliary).to(rows_TD.dtype)

    def _signal(self, x_TD: Tensor, context: Context) -> tuple[Signal, Tensor]:
        """What the gate says of the rows, with noise on its logits; and the logits [T, E] before noise."""
        rows_TD, jitter = x_TD, self.config.input_jitter
        if jitter and self.training:
            rows_TD = x_TD * torch.empty_like(x_TD).uniform_(1 - jitter, 1 + jitter)
        signal = self.gate(rows_TD, context)
        clean_TE = signal.logits
        for part in self.noise:
            signal = signal._replace(logits=part(signal.logits, x_TD, context))
        return signal, clean_TE

    def _noise_std(self, x_TD: Tensor, like_TE: Tensor) -> Tensor | None:
        if not self.shows_noise:
            return None
        (noise,) = self.noise
        return noise.std_of(x_TD, like_TE)  # type: ignore[operator]

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
