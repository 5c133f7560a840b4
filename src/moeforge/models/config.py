"""The decoder's settings: one default layer, and what each layer changes of it."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, field_serializer, model_validator

from moeforge.config import Activation, Config, difference, merge, slot
from moeforge.models.heads import AllHeads, Heads
from moeforge.models.momentum import Momentum
from moeforge.models.rope import Rope
from moeforge.moe import MoEConfig, RouterConfig


class Normal(Config):
    """Every matrix from N(0, std), those that write to the residual stream divided by sqrt(2 * layers passed)."""

    type: Literal["normal"] = "normal"
    std: float = Field(0.02, gt=0)
    """DeepSeek-V2 and V3 use 0.006 (arXiv:2412.19437, section 4.2)."""


class FanIn(Config):
    """Every matrix from a normal of variance scale / fan-in, cut at two deviations."""

    type: Literal["fan_in"] = "fan_in"
    scale: float = Field(0.1, gt=0)
    """Switch Transformer found 0.1 steadier than 1.0 (arXiv:2101.03961, section 2.4)."""


Init = slot(Normal, FanIn)


class LayerConfig(Config):
    """One layer: which attention heads a token has, then experts, or one MLP of width ``d_ff``."""

    d_ff: int = Field(256, ge=1)
    """Width of the MLP of a layer without experts."""
    activation: Activation = "swiglu"
    """Of that MLP."""
    mlp_bias: bool = False
    """Whether its two projections have one."""
    moe: MoEConfig | None = None
    """The experts; null makes the layer dense."""
    attention: Heads = AllHeads()
    """Which heads a token has."""
    attends: bool = True
    """Whether attention comes first; without it two layers of experts can follow one another."""
    window: int | None = Field(None, ge=1)
    """How many tokens a token sees, itself included; null: all before it."""

    @property
    def mixes_tokens(self) -> bool:
        """Whether its experts mix tokens, those after a token among them."""
        return self.moe is not None and self.moe.token_block is not None

    @model_validator(mode="after")
    def _shortcut_leads_past_something(self) -> Self:
        if self.moe and self.moe.shortcut and not self.attends:
            raise ValueError("moe.shortcut leads past the layer's attention, and attends: false leaves that out")
        if self.moe and self.moe.router.select.reads_importance and not self.attends:
            raise ValueError(
                f"select: {self.moe.router.select.type} reads attention, and attends: false leaves that out"
            )
        if self.moe and self.moe.router.select.reads_importance and self.attention.router:
            select = self.moe.router.select.type
            raise ValueError(f"select: {select} reads the attention of all heads, and attention: routed has others")
        if self.moe and self.moe.router.select.reads_importance and self.attention.type == "latent":
            raise ValueError(f"select: {self.moe.router.select.type} reads keys, and attention: latent keeps none")
        if self.attention.router and not self.attends:
            raise ValueError("attention: routed chooses heads, and attends: false leaves attention out")
        return self


class ModelConfig(LayerConfig):
    """A decoder. The fields of ``LayerConfig`` are the default layer; ``layers`` changes single ones."""

    vocab_size: int | None = Field(None, ge=1)
    """Null: as many as the tokenizer has."""
    d_model: int = Field(64, ge=1)
    """Width of the residual stream."""
    num_layers: int = Field(4, ge=1)
    """Decoder layers, each with weights of its own."""
    num_repeats: int = Field(1, ge=1)
    """Times that the whole stack of layers is passed, with the same weights (arXiv:2405.16039)."""
    momentum: Momentum | None = None
    """How what experts add joins the residual stream; null: it is added."""
    num_heads: int = Field(4, ge=1)
    """Query heads."""
    num_kv_heads: int | None = Field(None, ge=1)
    """Key and value heads; null: as many as query heads."""
    head_dim: int | None = Field(None, ge=2)
    """Null: d_model / num_heads."""
    max_seq_len: int = Field(1024, ge=1)
    """Longest context the model is meant for."""
    rope_theta: float = Field(10000.0, gt=0)
    """Base of the rotary position embedding."""
    rope: Rope | None = None
    """How rotation was stretched to a longer context; null: not at all."""
    rope_fraction: float = Field(1.0, gt=0, le=1)
    """How much of each head rotates, from its start."""
    rope_interleaved: bool = False
    """Whether neighbours rotate as pairs, (2 i, 2 i + 1), or halves: (i, i + head_dim / 2)."""
    norm: Literal["rms", "layer"] = "rms"
    """Before every part of a layer and the output: RMSNorm, or LayerNorm with a bias."""
    norm_eps: float = Field(1e-5, gt=0)
    """Inside every norm."""
    qk_norm: bool | Literal["whole"] = False
    """RMSNorm on queries and keys before rotation: true: of each head; whole: over all heads together."""
    tie_embeddings: bool = True
    """The output matrix is the input embedding."""
    output_bias: bool = False
    """Whether logits have one."""
    embedding_scale: float = Field(1.0, gt=0)
    """Multiplies what the embedding gives to the first layer; sqrt(d_model) in arXiv:1706.03762, section 3.4."""
    residual_scale: float = Field(1.0, gt=0)
    """Multiplies what every part of a layer adds to the residual stream."""
    logits_divisor: float = Field(1.0, gt=0)
    """Divides the logits."""
    init: Init = Normal()
    """How weights start."""
    first_dense_layers: int = Field(0, ge=0)
    """This many layers at the bottom have no experts."""
    moe_every: int = Field(1, ge=1)
    """Of the layers above them, every so-manieth has experts, the last of each group."""
    domains: tuple[str, ...] = ()
    """Names of the domains that a gate looks up, in order of their ids; a run takes them from its data."""
    layers: dict[int, LayerConfig] = Field(default_factory=dict)
    """By layer number from 0, what differs from the default layer: ``3: {moe: {experts: {num_experts: 32}}}``."""

    @model_validator(mode="before")
    @classmethod
    def _fill_layers(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or not isinstance(data.get("layers"), Mapping):
            return data
        default = _plain({name: data[name] for name in LayerConfig.model_fields if name in data})
        pattern = data.get("first_dense_layers", 0), data.get("moe_every", 1)
        layers = {}
        for index, change in ((index, _plain(change)) for index, change in data["layers"].items()):
            names_moe = isinstance(change, Mapping) and "moe" in change
            inherits = names_moe or _has_experts(index, *pattern)
            layers[index] = merge(default if inherits else {**default, "moe": None}, change)
        return {**data, "layers": layers}

    @field_serializer("layers", mode="wrap")
    def _only_changes(self, value: dict[int, LayerConfig], dump: SerializerFunctionWrapHandler) -> object:
        return {index: difference(self._default(index).model_dump(), layer) for index, layer in dump(value).items()}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        beyond = [index for index in self.layers if not 0 <= index < self.num_layers]
        if beyond:
            raise ValueError(f"layers names layer {beyond[0]}, but num_layers = {self.num_layers} (numbered from 0)")
        if self.moe and not any(layer.moe for layer in self.all_layers):
            raise ValueError("moe is set but no layer has experts: see first_dense_layers, moe_every and layers")
        if self.domains and not self.looks_up_domains:
            raise ValueError("domains has names, but no gate looks domains up")
        if self.momentum and not any(layer.moe for layer in self.all_layers):
            raise ValueError("momentum acts on what experts add, and no layer has experts")
        if not any(layer.attends or layer.mixes_tokens for layer in self.all_layers):
            raise ValueError("attends is false in every layer: no token would see another")
        self._check_attention()
        self._check_gates()
        return self

    def _check_attention(self) -> None:
        """Raises ValueError for heads that cannot be made of the decoder's sizes, or do not rotate alike."""
        for layer in self.all_layers:
            layer.attention.check(self)
        widths = {layer.attention.rotary_width(self) for layer in self.all_layers if layer.attends}
        if len(widths) > 1:
            raise ValueError(f"layers rotate {' and '.join(map(str, sorted(widths)))} values: all must rotate as many")
        if self.rope is not None and hasattr(self.rope, "check"):
            self.rope.check(*widths)

    def _check_gates(self) -> None:
        """Raises ValueError for gates that get nothing they can use from this decoder, or from the layer below."""
        below = None
        for depth, layer in enumerate(self.applied_layers):
            index = depth % self.num_layers
            if layer.attention.router:
                self._check_lookup(index, layer.attention.router)
            if layer.moe:
                self._check_lookup(index, layer.moe.router)
                layer.moe.row_width(self.d_model)
                gate = layer.moe.router.gate
                width = None
                if hasattr(gate, "state_width"):
                    width = gate.state_width(layer.moe.router.select.columns(layer.moe.num_experts))
                state = f"{width}{f' for each of {layer.moe.heads} heads' if layer.moe.heads > 1 else ''}"
                if width and below and state != below:
                    raise ValueError(
                        f"layer {index}: its gate takes a state of {state}, the layer below hands on {below}"
                    )
                below = width and state

    def _check_lookup(self, index: int, router: RouterConfig) -> None:
        gate = router.gate
        if gate.type != "lookup" or gate.by == "width":
            return
        if gate.by not in ("token", "domain"):
            raise ValueError(f"layer {index}: gate: lookup by {gate.by}: a decoder knows token and domain ids")
        count = len(self.domains) if gate.by == "domain" else self.vocab_size or 0
        if gate.num_ids < count:
            raise ValueError(f"layer {index}: gate.num_ids = {gate.num_ids} is less than {count} {gate.by}s")

    @property
    def looks_up_domains(self) -> bool:
        """Whether a gate must be told each token's domain."""
        routers = [part.router for layer in self.all_layers for part in (layer.moe, layer.attention) if part]
        gates = [router.gate for router in routers if router]
        return any(gate.type == "lookup" and gate.by == "domain" for gate in gates)

    @property
    def size_of_head(self) -> int:
        """``head_dim``, or what follows from the others."""
        return self.head_dim or self.d_model // self.num_heads

    @property
    def num_key_heads(self) -> int:
        """``num_kv_heads``, or what follows from the others."""
        return self.num_kv_heads or self.num_heads

    @cached_property
    def rotary_width(self) -> int:
        """How much of a query and a key rotates."""
        widths = (layer.attention.rotary_width(self) for layer in self.all_layers if layer.attends)
        return next(widths, self.size_of_head)

    @cached_property
    def all_layers(self) -> list[LayerConfig]:
        """Every layer's own config, from the bottom."""
        return [self.layers.get(index) or self._default(index) for index in range(self.num_layers)]

    @property
    def applied_layers(self) -> list[LayerConfig]:
        """The layers that a token passes, in order: ``all_layers``, ``num_repeats`` times."""
        return self.all_layers * self.num_repeats

    def _default(self, index: int) -> LayerConfig:
        """The layer as it is where ``layers`` says nothing."""
        moe = self.moe if _has_experts(index, self.first_dense_layers, self.moe_every) else None
        return LayerConfig(**{name: getattr(self, name) for name in LayerConfig.model_fields} | {"moe": moe})


def _has_experts(index: Any, first_dense_layers: Any, moe_every: Any) -> bool:
    """The pattern of dense and expert layers. True for what is no number yet: the fields' own checks refuse it."""
    try:
        above = int(index) - int(first_dense_layers)
        return above >= 0 and (above + 1) % int(moe_every) == 0
    except (TypeError, ValueError, ZeroDivisionError):
        return True


def _plain(value: Any) -> Any:
    """Configs inside ``value`` as plain mappings, so that changes can be merged into them."""
    if isinstance(value, Config):
        return value.model_dump(exclude_unset=True)
    return {key: _plain(below) for key, below in value.items()} if isinstance(value, Mapping) else value
