"""Which attention heads a token has: all of them, with keys of their own or latent ones, or those of a router."""

from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from moeforge.config import Config, slot
from moeforge.moe import RouterConfig

if TYPE_CHECKING:
    from moeforge.models.config import ModelConfig


class AllHeads(Config):
    """Every token has all ``num_heads`` heads."""

    type: Literal["all"] = "all"
    router: ClassVar[RouterConfig | None] = None
    qkv_bias: bool = False
    """Whether the projections to queries, keys and values have one."""
    o_bias: bool = False
    """Whether the output projection has one."""
    scale: float | None = Field(None, gt=0)
    """Multiplies products of queries and keys; null: 1 / sqrt(head_dim)."""
    clip: float | None = Field(None, gt=0)
    """Queries, keys and values are cut off at plus and minus this, before rotation; null: not."""
    sinks: bool = False
    """Whether every head has a learned logit of one more key without value, for what it has no use for."""

    def per_token(self, config: "ModelConfig") -> float:
        """Query heads that a token is computed with."""
        return config.num_heads

    def widths(self, config: "ModelConfig") -> tuple[int, int]:
        """Of a key and of a value."""
        return config.size_of_head, config.size_of_head

    def cached(self, config: "ModelConfig") -> tuple[tuple[int, int], ...]:
        """(heads, width) of each tensor that a cache keeps of a token."""
        return (config.num_key_heads, config.size_of_head), (config.num_key_heads, config.size_of_head)

    def rotary_width(self, config: "ModelConfig") -> int:
        """How much of a query and a key rotates."""
        return int(config.size_of_head * config.rope_fraction)

    def check(self, config: "ModelConfig") -> None:
        """Raises ValueError when the decoder's sizes make no heads."""
        _check_sizes(config)


class RoutedHeads(Config):
    """Experts that own query and output projections; the heads' outputs are summed by the router's weights.

    With shared keys, an expert has one query head for each of the ``num_kv_heads`` key heads, and keys and values are
    computed once for all experts (Mixture of Attention Heads, arXiv:2210.05144, section 3, has one of them).
    With keys of its own, an expert is ``num_kv_heads`` / ``num_experts`` whole heads of multi-head attention: one head
    each, or attentions side by side.
    """

    type: Literal["routed"] = "routed"
    qkv_bias: ClassVar[bool] = False
    o_bias: ClassVar[bool] = False
    scale: ClassVar[float | None] = None
    clip: ClassVar[float | None] = None
    sinks: ClassVar[bool] = False
    num_experts: int = Field(8, ge=1)
    """How many; ``num_heads`` then only says how wide a head is, where ``head_dim`` does not."""
    keys: Literal["shared", "own"] = "shared"
    """Whether experts see the same keys and values, or expert i those of the i-th part of the key heads. Own ones are
    computed for all."""
    frozen_experts: int = Field(0, ge=0)
    """The first so many stay as they start (``prior`` in the names of their weights), with ``keys: own``: a trained
    attention that others are mixed with (arXiv:2404.11565)."""
    router: RouterConfig = RouterConfig()
    """Who goes where."""

    @model_validator(mode="after")
    def _selectable(self) -> Self:
        select = self.router.select.type
        if select in ("soft", "merged"):
            raise ValueError(f"attention: routed gives tokens some of the heads; select: {select} does not")
        if self.router.select.auxiliary:
            raise ValueError(f"attention: routed has no vectors for heads that do not run: not select: {select}")
        if self.router.select.reads_importance:
            raise ValueError(f"attention: routed is what select: {select} would read: it cannot choose the heads by it")
        asking = [part.type for part in (self.router.gate, *self.router.losses) if _asks_experts(part)]
        if asking:
            raise ValueError(f"attention: routed has heads for experts: {asking[0]} asks experts of a layer")
        if self.keys == "own" and select == "product_keys":
            raise ValueError("attention: routed with keys: own computes every head: product_keys is for many experts")
        if hasattr(self.router.gate, "state_width") and self.router.gate.state_width(self.num_experts):
            raise ValueError(f"attention: routed hands on no state, and gate: {self.router.gate.type} needs one")
        if self.frozen_experts and self.keys == "shared":
            raise ValueError("frozen_experts are to stay as they are, and with keys: shared others change their keys")
        if self.frozen_experts >= self.num_experts:
            raise ValueError(f"frozen_experts = {self.frozen_experts} of num_experts = {self.num_experts}: none learns")
        self.router.check(self.num_experts, [1] * self.num_experts)
        return self

    def per_expert(self, config: "ModelConfig") -> int:
        """Query heads of one expert."""
        return config.num_key_heads // (self.num_experts if self.keys == "own" else 1)

    def per_token(self, config: "ModelConfig") -> float:
        """Query heads that a token is computed with."""
        chosen = self.num_experts if self.keys == "own" else self.router.select.mean_experts(self.num_experts)
        return chosen * self.per_expert(config)

    def widths(self, config: "ModelConfig") -> tuple[int, int]:
        """Of a key and of a value."""
        return AllHeads().widths(config)

    def cached(self, config: "ModelConfig") -> tuple[tuple[int, int], ...]:
        """(heads, width) of each tensor that a cache keeps of a token."""
        return AllHeads().cached(config)

    def rotary_width(self, config: "ModelConfig") -> int:
        """How much of a query and a key rotates."""
        return AllHeads().rotary_width(config)

    def check(self, config: "ModelConfig") -> None:
        """Raises ValueError when the decoder's sizes make no heads, or no keys for each expert."""
        _check_sizes(config)
        if config.qk_norm == "whole":
            raise ValueError("qk_norm: whole is over all heads, and attention: routed gives a token some of them")
        if self.frozen_experts and config.qk_norm:
            raise ValueError("frozen_experts would share the learned norm of qk_norm with others: set it to false")
        if self.keys == "own" and config.num_key_heads % self.num_experts:
            raise ValueError(
                f"attention: routed with keys: own needs as many key heads for each expert: num_kv_heads is "
                f"{config.num_key_heads}, num_experts {self.num_experts}"
            )


class LatentHeads(Config):
    """All ``num_heads`` heads, their keys and values out of one narrow row per token (arXiv:2405.04434, section 2.1).

    A cache keeps that row alone: ``kv_lora_rank + qk_rope_head_dim`` numbers.
    """

    type: Literal["latent"] = "latent"
    router: ClassVar[RouterConfig | None] = None
    q_lora_rank: int | None = Field(None, ge=1)
    """Queries go through so many values, and a norm, as well; null: one matrix."""
    kv_lora_rank: int = Field(512, ge=1)
    """Latent values of a row."""
    qk_nope_head_dim: int = Field(128, ge=1)
    """Of each head's queries and keys, what does not rotate."""
    qk_rope_head_dim: int = Field(64, ge=2, multiple_of=2)
    """What does; all heads share these of the keys."""
    v_head_dim: int = Field(128, ge=1)
    """Of each head's values."""
    bias: bool = False
    """Whether the projections from and to the residual stream have one; a single query matrix has none."""
    norm_eps: float = Field(1e-6, gt=0)
    """Inside the norms of latent values."""

    def per_token(self, config: "ModelConfig") -> float:
        """Query heads that a token is computed with."""
        return config.num_heads

    def widths(self, config: "ModelConfig") -> tuple[int, int]:
        """Of a key and of a value."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim, self.v_head_dim

    def cached(self, config: "ModelConfig") -> tuple[tuple[int, int], ...]:
        """(heads, width) of each tensor that a cache keeps of a token."""
        return ((1, self.kv_lora_rank + self.qk_rope_head_dim),)

    def rotary_width(self, config: "ModelConfig") -> int:
        """How much of a query and a key rotates."""
        return self.qk_rope_head_dim

    def softmax_scale(self, config: "ModelConfig") -> float:
        """What products of queries and keys are multiplied by."""
        return self.widths(config)[0] ** -0.5 * getattr(config.rope, "all_dim_gain", 1.0) ** 2

    def check(self, config: "ModelConfig") -> None:
        """Raises ValueError for settings of the decoder that are other heads'."""
        others = {"head_dim": None, "num_kv_heads": None, "qk_norm": False, "rope_fraction": 1.0}
        for name, neutral in others.items():
            if getattr(config, name) != neutral:
                raise ValueError(
                    f"attention: latent has sizes and norms of its own, so {name} does nothing: leave it out"
                )


def _check_sizes(config: "ModelConfig") -> None:
    if config.head_dim is None and config.d_model % config.num_heads:
        raise ValueError(f"d_model = {config.d_model} is not divisible by num_heads = {config.num_heads}")
    if config.size_of_head % 2:
        raise ValueError(f"head_dim = {config.size_of_head} is odd; rotary positions need pairs")
    if config.num_heads % config.num_key_heads:
        raise ValueError(f"num_heads = {config.num_heads} is not divisible by num_kv_heads = {config.num_key_heads}")
    width = AllHeads().rotary_width(config)
    if width < 2 or width % 2:
        raise ValueError(
            f"rope_fraction = {config.rope_fraction:g} of head_dim = {config.size_of_head} is {width}: "
            "rotary positions need pairs"
        )


def _asks_experts(part: Config) -> bool:
    return getattr(part, "asks_experts", False) or hasattr(part, "watch") or part.type == "budget_loss"  # type: ignore[attr-defined]


Heads = slot(AllHeads, RoutedHeads, LatentHeads, default=AllHeads)
