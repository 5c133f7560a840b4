"""The layer: y = mix(sum over edges of w * expert(x), shared(x)). It reads in one screen and names no paper."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import accumulate
from typing import Any, Self

from pydantic import Field, SerializerFunctionWrapHandler, field_serializer, field_validator, model_validator
from torch import Tensor, nn

from moeforge.config import Config
from moeforge.moe.bank import Bank, Experts, matrix
from moeforge.moe.context import Context
from moeforge.moe.merge import MergedRoute
from moeforge.moe.route import Route, SoftRoute
from moeforge.moe.router import Router, RouterConfig, Routing
from moeforge.moe.shared import Shared, SharedConfig


class MoEConfig(Config):
    """One Mixture-of-Experts layer."""

    experts: tuple[Experts, ...]
    """One bank, or a list of banks (unequal widths, other kinds); the router numbers their experts in order."""
    router: RouterConfig = RouterConfig()
    """Who goes where."""
    shared: SharedConfig | None = None
    """The branch that every token takes."""
    shortcut: bool = False
    """Router and experts read the row from before this layer's attention, the shared branch the one after it, so that
    experts on other devices work while attention does (arXiv:2404.05019)."""
    heads: int = Field(1, ge=1)
    """Rows are cut into so many of width d_model / heads, routed one by one, between two square matrices (MH-MoE,
    arXiv:2404.15045)."""
    token_block: int | None = Field(None, ge=2)
    """Null: rows are tokens. Else a row is what one channel has at so many neighbouring tokens, and experts mix tokens,
    also with those after them (arXiv:2109.02008). Sequences must be cut into such blocks evenly."""

    @field_validator("experts", mode="before")
    @classmethod
    def _one_bank_is_a_list(cls, value: object) -> object:
        return value if isinstance(value, list | tuple) else (value,)

    @field_serializer("experts", mode="wrap")
    def _one_bank_is_no_list(self, value: tuple[Config, ...], dump: SerializerFunctionWrapHandler) -> object:
        dumped = dump(value)
        return dumped[0] if len(dumped) == 1 else dumped

    @model_validator(mode="after")
    def _selectable(self) -> Self:
        if not self.experts:
            raise ValueError("experts is empty: name at least one bank")
        if self.router.select.type == "merged" and not (len(self.experts) == 1 and hasattr(self.experts[0], "merges")):
            raise ValueError("select: merged sums parameters: it needs one bank, of type mlp")
        widths = getattr(self.router.select, "widths", ())
        bank = self.experts[0]
        if widths and (list(widths) != sorted({*widths}) or widths[0] < 1 or widths[-1] != bank.d_expert or bank.bias):
            raise ValueError(f"select.widths must rise from 1 or more to d_expert = {bank.d_expert}, without bias")
        self.router.check(self.num_experts, self.costs(d_model=64))  # which cost more does not depend on the width
        if hasattr(self.router.gate, "check_banks"):
            self.router.gate.check_banks(self.experts)
        return self

    @model_validator(mode="after")
    def _mixable(self) -> Self:
        budget = any(loss.type == "budget_loss" for loss in self.router.losses)
        if budget and not hasattr(self.shared and self.shared.mix, "routed_share"):
            raise ValueError("losses: budget_loss needs shared: with mix: interpolated or coefficient")
        if budget and self.shortcut:
            raise ValueError(
                "losses: budget_loss asks the mix about the experts' row, and with shortcut it reads another"
            )
        return self

    @model_validator(mode="after")
    def _rows_are_tokens(self) -> Self:
        if self.heads > 1 and getattr(self.router.select, "segment", None):
            raise ValueError("select: merged counts a segment's tokens, and with heads a token is several rows")
        if self.token_block is not None:
            found = next(self._token_facts(), None)
            if found:
                raise ValueError(f"token_block: rows are channels over several tokens, and {found}")
        return self

    def _token_facts(self) -> Iterator[str]:
        """Parts that need rows to be tokens."""
        gate, select = self.router.gate, self.router.select
        if self.heads > 1:
            yield "heads cuts tokens"
        if gate.type in ("hash", "lookup") or getattr(gate, "reads", "row") == "token":
            yield f"gate: {gate.type} asks what a token is"
        if hasattr(gate, "state_width") and gate.state_width(self.num_experts):
            yield f"gate: {gate.type} follows a token through the layers"
        if any(noise.type == "visible" for noise in self.router.noise):
            yield "noise: visible goes by a token's id"
        if select.reads_importance or select.type in ("merged", "soft"):
            yield f"select: {select.type} looks at a sequence's tokens"

    @property
    def decodes(self) -> bool:
        """Whether what a token gets follows from it and those before it, so that a model writes as it reads."""
        return self.router.decodes and self.token_block is None

    @property
    def num_experts(self) -> int:
        """Experts of all banks together."""
        return sum(bank.num_experts for bank in self.experts)

    @property
    def spans(self) -> list[range]:
        """The experts of each bank, as the router numbers them."""
        ends = list(accumulate(bank.num_experts for bank in self.experts))
        return [range(end - bank.num_experts, end) for end, bank in zip(ends, self.experts, strict=True)]

    def costs(self, d_model: int) -> list[int]:
        """Multiplications per row of width ``d_model``, of each expert."""
        return [cost for bank in self.experts for cost in bank.costs(d_model)]

    def row_width(self, d_model: int) -> int:
        """Width of what is routed. Raises ValueError when rows cannot be cut into ``heads``."""
        if d_model % self.heads:
            raise ValueError(f"d_model = {d_model} is not divisible by moe.heads = {self.heads}")
        return self.token_block or d_model // self.heads


class MoE(nn.Module):
    """Router, banks and shared branch. ``forward`` writes nothing to ``self``."""

    initialised = ("split_proj", "merge_proj")

    def __init__(self, config: MoEConfig, d_model: int) -> None:
        super().__init__()
        self.config, self.d_model, self.row_width = config, d_model, config.row_width(d_model)
        self.router = Router(config.router, self.row_width, config.num_experts, config.costs(self.row_width))
        self.banks = nn.ModuleList(bank.build(self.row_width) for bank in config.experts)
        self.shared = Shared(config.shared, self.row_width) if config.shared else None
        # Rows keep their length through these, whatever the experts' weights start as.
        self.split_proj = matrix(d_model, d_model) if config.heads > 1 else None
        self.merge_proj = matrix(d_model, d_model) if config.heads > 1 else None
        self.watching: list[Any] = [loss for loss in config.router.losses if hasattr(loss, "watch")]

    def forward(self, x: Tensor, context: Context | None = None) -> tuple[Tensor, Routing]:
        """[..., D] -> ([..., D], what the router decided about the rows).

        A layer by itself has no attention for ``shortcut`` to pass: both branches read x.
        """
        rows_TD = self.split(x.flatten(0, -2))
        routing = self.decide(rows_TD, context or Context())
        return self.experts(rows_TD, routing.route).view_as(x), routing

    def split(self, x_TD: Tensor) -> Tensor:
        """[T, D] -> [T * heads, D / heads], or [T * D / block, block]: the rows that are routed."""
        if self.config.token_block:
            return self._transposed(x_TD, self.config.token_block)
        if self.split_proj is None:
            return x_TD
        return nn.functional.linear(x_TD, self.split_proj).reshape(-1, self.row_width)

    def _transposed(self, x_TD: Tensor, block: int) -> Tensor:
        if len(x_TD) % block:
            raise ValueError(f"{len(x_TD)} tokens cannot be cut into blocks of token_block = {block}")
        return x_TD.unflatten(0, (-1, block)).transpose(1, 2).flatten(0, 1)

    def decide(self, rows_TD: Tensor, context: Context) -> Routing:
        """What the router decides, which may ask the experts, and what a loss wants to know about the layer besides.

        Takes what ``split`` gave, and the context of the rows before it.
        """
        block = self.config.token_block
        if block and len(rows_TD) // context.batch_size % self.d_model:
            raise ValueError(f"sequences of a batch cannot be cut into blocks of token_block = {block}")
        known = Context(context.batch_size, step=context.step) if block else context.split(self.config.heads)
        context = replace(known, banks=tuple(self.banks))  # type: ignore[arg-type]
        routing = self.router(rows_TD, context)
        for loss in self.watching:
            routing = loss.watch(routing, rows_TD, self.shared)
        return routing

    def experts(self, x_TD: Tensor, route: Route | SoftRoute | MergedRoute, shared_TD: Tensor | None = None) -> Tensor:
        """What ``split`` gave -> [T, D] once the route is known: the part that checkpointing may recompute.

        ``shared_TD`` is what the shared branch reads, where that is not x.
        """
        return self.begin(x_TD, route)(x_TD if shared_TD is None else shared_TD)

    def begin(self, x_TD: Tensor, route: Route | SoftRoute | MergedRoute) -> Callable[[Tensor], Tensor]:
        """``experts`` in two calls: between them, rows may be on their way to experts elsewhere."""
        x_TD = self.router.as_read(x_TD, route)
        parts = route.split([bank.num_experts for bank in self.config.experts])
        banks: list[Bank] = list(self.banks)  # type: ignore[arg-type]
        begun = [bank.begin(x_TD, part) for bank, part in zip(banks, parts, strict=True)]
        return lambda shared_TD: self._finish(begun, route, shared_TD)

    def _finish(self, begun: list[Callable[[], Tensor]], route: object, shared_TD: Tensor) -> Tensor:
        join = self.shared.begin(shared_TD) if self.shared is not None else None
        y_TD = begun[0]()
        for finish in begun[1:]:
            y_TD = y_TD + finish()
        if isinstance(route, Route) and route.probe is not None:
            y_TD = y_TD + route.probe.to(y_TD.dtype)
        if join is not None:
            y_TD = join(y_TD)
        if self.merge_proj is not None:
            y_TD = nn.functional.linear(y_TD.reshape(-1, len(self.merge_proj)), self.merge_proj)
        if self.config.token_block:
            return y_TD.unflatten(0, (-1, self.d_model)).transpose(1, 2).flatten(0, 1)
        return y_TD
