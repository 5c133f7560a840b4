"""What becomes of each expert, as data: rows that a program solves for or a person writes."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from moeforge.config import Config, build, read_yaml
from moeforge.errors import UserError
from moeforge.hub.store import Bits, Format
from moeforge.models import LayerConfig, ModelConfig
from moeforge.moe import MoEConfig
from moeforge.moe.bank.mlp import MLPExperts
from moeforge.moe.scores import Softmax
from moeforge.moe.select import Confident, TopK
from moeforge.moe.weigh import Scores

Rounding = Literal["nearest", "gptq"]


class Row(Config):
    """One expert. Layers count from 0, experts as their router numbers them."""

    layer: int = Field(ge=0)
    """Of the decoder."""
    expert: int = Field(ge=0)
    """Over all banks of the layer."""
    action: Literal["keep", "drop", "merge_into"] = "keep"
    """``drop``: the router does not know it any more. ``merge_into``: it shares the weights of another, whose mean they
    are; the router still tells the two apart."""
    into: int | None = Field(None, ge=0)
    """The expert that a merged one joins."""
    bits: Bits = 16
    """Of a kept expert's weights; 16 is bfloat16, ``vector`` two and a codebook, ``coded`` less than one."""
    group: Literal[32, 64, 128] | None = None
    """Inputs that share a scale; null with 16 bits and coded ones."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.action == "merge_into") != (self.into is not None):
            raise ValueError("into names the expert of action: merge_into, and belongs to nothing else")
        if self.action == "keep" and (self.bits in (16, "coded")) != (self.group is None):
            raise ValueError("16 bits and coded have no group, all other formats have one: 32, 64 or 128")
        return self

    @property
    def place(self) -> tuple[int, int]:
        """(layer, expert)."""
        return self.layer, self.expert

    @property
    def format(self) -> Format:
        """Of a kept expert."""
        return Format(self.bits, self.group)


class Skip(Config):
    """Of one layer: which choices after a token's first are not run (arXiv:2402.14800, section 3.3)."""

    min_ratio: float = Field(gt=0, le=1)
    """Those whose score is under this share of the first one's."""
    typical: float = Field(ge=1)
    """Experts that a token has left, on average."""


class Plan(Config):
    """A row for every expert that is an MLP with matrices of its own."""

    rows: tuple[Row, ...]
    """In any order."""
    rounding: Rounding = "nearest"
    """``nearest``: every weight by itself. ``gptq``: so that the expert's output on a text changes least."""
    dense: Literal["as stored", "bf16"] = "bf16"
    """What all other weights are kept as; routers stay as stored."""
    skip: dict[int, Skip] = Field(default_factory=dict)
    """By layer."""

    def of_layer(self, layer: int) -> dict[int, Row]:
        """Rows by expert."""
        return {row.expert: row for row in self.rows if row.layer == layer}

    def save(self, path: Path) -> None:
        """As JSON, a row to a line."""
        tree = self.model_dump()
        rows = ",\n  ".join(json.dumps(row) for row in tree.pop("rows"))
        rest = "".join(f"{json.dumps(name)}: {json.dumps(value)},\n" for name, value in tree.items())
        path.write_text(f'{{{rest}"rows": [\n  {rows}\n]}}\n', encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "Plan":
        """A plan from JSON or YAML. Raises UserError."""
        if not path.is_file():
            raise UserError(f"{path} is missing: a plan is a JSON or YAML file with rows")
        return build(cls, read_yaml(path), source=str(path))

    def check(self, config: ModelConfig) -> None:
        """Raises UserError unless the rows are the model's experts, one each, and say something to do."""
        wanted = {*packable(config)}
        named = [row.place for row in self.rows]
        for what, problem in (
            ("names absent experts", set(named) - wanted),
            (
                "names twice",
                {place for place in named if named.count(place) > 1} if len(set(named)) < len(named) else (),
            ),
            ("misses", wanted - set(named)),
        ):
            if problem:
                some = ", ".join(f"{layer}.{expert}" for layer, expert in sorted(problem)[:8])
                raise UserError(f"the plan {what}: {some}{' ...' if len(problem) > 8 else ''} (layer.expert)")
        if not self.skip and all(row.action == "keep" and row.bits == 16 for row in self.rows):
            raise UserError("the plan does nothing: it keeps all experts at 16 bits")
        kept = {row.place for row in self.rows if row.action == "keep"}
        lost = [
            f"{row.layer}.{row.expert}"
            for row in self.rows
            if row.into is not None and (row.layer, row.into) not in kept
        ]
        if lost:
            raise UserError(f"the plan merges {', '.join(lost)} into experts that it does not keep")
        self.config(config)

    def config(self, config: ModelConfig) -> ModelConfig:
        """The model's settings without the experts that are dropped and the choices that are skipped. Raises UserError
        where that cannot be."""
        changed = {}
        for index, layer in enumerate(config.all_layers):
            gone = {expert for expert, row in self.of_layer(index).items() if row.action == "drop"}
            fewer = _without(index, layer, gone) if gone else layer
            changed[index] = _skipping(index, fewer, self.skip[index]) if index in self.skip else fewer
        absent = sorted(self.skip.keys() - changed.keys())
        if absent:
            raise UserError(f"the plan skips in layers that are not there: {absent}")
        changed = {index: layer for index, layer in changed.items() if layer != config.all_layers[index]}
        return config.replace(layers={**config.layers, **changed}) if changed else config


def _skipping(index: int, layer: LayerConfig, skip: Skip) -> LayerConfig:
    """Sizes of scores are compared, so a softmax over the chosen logits becomes one over all, divided by the chosen
    ones' sum: the same weights."""
    moe = layer.moe
    select = moe.router.select if moe else None
    if moe is None or not isinstance(select, TopK) or select.k == 1 or (select.skip, select.num_groups) != (0, 1):
        raise UserError(f"layer {index}: choices are skipped of select: top_k with k of 2 or more, without groups")
    router, change = moe.router, dict[str, object](select=Confident(k=select.k, **skip.model_dump()))
    if router.score.type == "logits" and router.weigh.type == "softmax" and not router.controller:
        scale = router.weigh.weight_scale
        change |= {"score": Softmax(), "weigh": Scores(normalize_weights=True, weight_scale=scale)}
    try:
        return layer.replace(moe=moe.replace(router=router.replace(**change)))
    except ValueError as error:
        raise UserError(f"layer {index} cannot skip choices: {error}") from error


def groups(config: ModelConfig) -> dict[int, int]:
    """By layer with experts, how many equal groups of them its router chooses among, in order."""
    layers = {index: layer.moe for index, layer in enumerate(config.all_layers) if layer.moe}
    return {index: _num_groups(moe) for index, moe in layers.items()}


def _num_groups(moe: MoEConfig) -> int:
    return getattr(moe.router.select, "num_groups", 1)


def _without(index: int, layer: LayerConfig, gone: set[int]) -> LayerConfig:
    assert layer.moe is not None
    count = _num_groups(layer.moe)
    lost = [sum(expert * count // layer.moe.num_experts == group for expert in gone) for group in range(count)]
    if len({*lost}) > 1:
        raise UserError(
            f"layer {index}: as many experts have to go from each of its router's {count} groups, not {lost}"
        )
    gate = layer.moe.router.gate
    if gate.type != "linear" or gate.previous:
        raise UserError(
            f"layer {index}: experts are dropped from linear gates, whose rows are theirs, not from {gate.type}"
        )
    experts = []
    for bank, span in zip(layer.moe.experts, layer.moe.spans, strict=True):
        stay = bank.num_experts - len(gone.intersection(span))
        if not stay:
            raise UserError(f"layer {index}: a bank would have no expert left")
        experts.append(bank.replace(num_experts=stay) if stay < bank.num_experts else bank)
    try:
        return layer.replace(moe=layer.moe.replace(experts=tuple(experts)))
    except ValueError as error:
        raise UserError(f"layer {index} without experts {sorted(gone)}: {error}") from error


def packable(config: ModelConfig) -> Iterator[tuple[int, int]]:
    """(layer, expert) of the experts that a plan has rows for."""
    for index, layer in enumerate(config.all_layers):
        for bank, span in zip(layer.moe.experts, layer.moe.spans, strict=True) if layer.moe else ():
            if can_pack(bank, layer):
                yield from ((index, expert) for expert in span)


def can_pack(bank: Config, layer: LayerConfig) -> bool:
    """Whether experts of a bank can lie packed: MLPs with matrices of their own, without biases or limits."""
    merged = layer.moe is not None and layer.moe.router.select.type == "merged"
    return isinstance(bank, MLPExperts) and not (bank.bias or bank.clamp or merged)
