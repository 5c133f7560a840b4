"""A model of transformers, whole in memory, run layer by layer: what ``Streamed`` is to ours.

Every layer is called with what the model's own pass would give it besides the residual stream: a pass in which layers
hand on what comes to them tells that. Their experts run as banks of ours around the same weights.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moeforge.compress.plan import Plan
from moeforge.compress.stream import by_class, check_tokens
from moeforge.config import Tree
from moeforge.data.packing import Batch
from moeforge.errors import UserError
from moeforge.hub.bridge import names_on_disk
from moeforge.hub.experts import LayerExperts, experts
from moeforge.hub.folder import config_json, model_folder
from moeforge.hub.interface import kernel_activation, matrices_of, route_of
from moeforge.hub.shards import Shards
from moeforge.hub.store import METHOD, PACKED
from moeforge.hub.theirs import Theirs
from moeforge.models import ModelConfig
from moeforge.models.weights import EXPERTS
from moeforge.moe import Routing
from moeforge.moe.bank.mlp import MLPBank, MLPExperts

PROBE = 32
"""Tokens on which passing layer by layer is compared with the model's own pass."""
MOST_HANDED = 2
"""Values that layers may hand on besides the stream, as a choice of keys, or the state of a router."""


@dataclass(frozen=True)
class TheirMoE:
    """The experts of a layer."""

    router: nn.Module
    banks: list[nn.Module]
    """One, around their weights; where they are no plain MLPs, what transformers has."""


@dataclass(frozen=True)
class TheirBlock:
    """A layer."""

    index: int
    module: nn.Module
    moe: TheirMoE | None


class StreamedTheirs:
    """The model in a folder.

    Raises UserError as ``Theirs`` does, and for models that cannot be compressed: dense ones, those in few bits, and
    those that cannot be passed layer by layer.
    """

    dense: Literal["bf16", "as stored"] = "as stored"
    """What a plan keeps the other weights as."""

    def __init__(self, folder: str | Path) -> None:
        if "quantization_config" in config_json(model_folder(Path(folder))):
            raise UserError(f"{folder} is compressed already: start from the folder that it was made of")
        self.theirs = Theirs(folder)
        self.folder, self.model, self.config = self.theirs.folder, self.theirs.model, self.theirs.config
        self.shards = Shards(self.folder)
        self.found = {found.layer: found for found in experts(self.model)}
        path = self.theirs.names[min(self.found)].split(f".{min(self.found)}.")[0]
        self.layers: list[Any] = list(self.model.get_submodule(path))
        self.banks = {layer: bank for layer, found in self.found.items() if (bank := _as_bank(found)) is not None}
        lost = [name for layer in self.banks for name in self._of_experts(layer) if name not in self.shards.shapes]
        if lost:
            raise UserError(f"{folder}: {lost[0]} is not there: transformers would write these experts otherwise")
        self.handed = self._handed()

    def _handed(self) -> int:
        """What layers hand to the next ones besides the residual stream: so many values. Raises UserError where calling
        layer by layer does not compute what the model does."""
        ids = torch.arange(PROBE)[None] * 7919 % (self.config.vocab_size or 1)
        with torch.no_grad():
            whole = self.theirs(ids).logits[0]
        for self.handed in range(MOST_HANDED + 1):
            try:
                text = self._enter([ids], [torch.arange(PROBE)[None]])
                for index in range(self.config.num_layers):
                    text.pass_layer(self.block(index))
                if torch.allclose(whole, self.logits(text.x[0].flatten(0, 1)), rtol=1e-3, atol=1e-3):
                    return self.handed
            except (AttributeError, RuntimeError, TypeError, ValueError):
                continue  # it wants to be handed more, or something else
        raise UserError(
            f"{self.folder}: {type(self.model).__name__} called layer by layer computes something else than whole, "
            f"so it cannot be calibrated"
        )

    def _of_experts(self, layer: int) -> tuple[str, ...]:
        """The tensors on disk that a layer's experts are joined from."""
        return tuple(name for names in self.found[layer].stacks[0].on_disk.values() for name in names)

    @cached_property
    def _theirs_on_disk(self) -> set[str]:
        return {name for layer in self.banks for name in self._of_experts(layer)}

    @cached_property
    def stored(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Type on disk and shape of every tensor; experts that can be packed by the names of their bank."""
        shapes, dtypes = self.shards.shapes, self.shards.dtypes
        found = {name: (dtypes[name], tuple(shapes[name])) for name in self.names(None)}
        for layer, bank in self.banks.items():
            found |= {f"{self.bank(layer, 0)}.{name}": (w.dtype, tuple(w.shape)) for name, w in bank.named_parameters()}
        return found

    def names(self, layer: int | None) -> list[str]:
        """The experts of a layer that can be packed; with None, all other tensors."""
        if layer is not None:
            return [f"{self.bank(layer, 0)}.{name}" for name in EXPERTS] if layer in self.banks else []
        return [name for name in self.shards.shapes if name not in self._theirs_on_disk]

    def read(self, layer: int | None) -> dict[str, Tensor]:
        """Those tensors, by name."""
        if layer is None:
            return {name: self.shards.get(name) for name in self.names(None)}
        return {name: getattr(self.banks[layer], name.rpartition(".")[2]) for name in self.names(layer)}

    def bank(self, layer: int, index: int) -> str:
        """The name of transformers' module."""
        return self.theirs.names[layer]

    def kind(self, name: str, shape: tuple[int, ...]) -> str:
        """The class of a tensor on disk, or of one in a folder that this became."""
        if name in self._theirs_on_disk or name.startswith(tuple(f"{self.bank(layer, 0)}." for layer in self.banks)):
            return "experts"
        if name in self._routers:
            return "router"
        if len(shape) > 1 and shape[0] == self.config.vocab_size:
            return "embeddings"
        return "dense" if len(shape) > 1 else "other"

    @cached_property
    def _routers(self) -> dict[str, int]:
        """By tensor on disk of a router, or beside it and the experts, the layer."""
        layers = dict[int, int]()
        for layer, found in self.found.items():
            holder = self.model.get_submodule(found.name)
            tensors = *found.router.parameters(), *found.router.buffers(), *holder._parameters.values()
            layers |= {id(tensor): layer for tensor in (*tensors, *holder._buffers.values()) if tensor is not None}
        named = self.model.state_dict(keep_vars=True).items()
        own = {name: layers[id(tensor)] for name, tensor in named if id(tensor) in layers}
        return {there: layer for name, layer in own.items() for there in names_on_disk(self.model, name)}

    def router_of(self, name: str) -> int | None:
        """The layer for each of whose experts a tensor has a row."""
        layer, shape = self._routers.get(name), self.stored[name][1]
        return layer if layer is not None and shape[:1] == (self.found[layer].num_experts,) else None

    def narrows(self, name: str) -> bool:
        """Nothing: what transformers computes with stays as it is."""
        return False

    def bytes_on_disk(self, folder: Path) -> dict[str, int]:
        """Bytes by class of the weight files in its folder, or in one that it became."""
        return by_class(Shards(folder), self.kind)

    def open(self, folder: Path) -> Theirs:
        """What it became."""
        return Theirs(folder)

    def check(self, plan: Plan) -> None:
        """Raises UserError for what would need routers of ours, or that a config of transformers has no words for."""
        if plan.skip:
            raise UserError(f"{self.folder}: transformers' routers keep all choices: leave skip out of the plan")
        if any(row.action == "drop" for row in plan.rows):
            left = {sum(row.action != "drop" for row in plan.of_layer(layer).values()) for layer in self.banks}
            if len(left) > 1 or self.banks.keys() < self.found.keys():
                raise UserError(f"{self.folder}: transformers wants as many experts in each layer, not {sorted(left)}")
            self.theirs.counted()  # before the work

    def check_opens(self, fresh: Path) -> None:
        """Raises UserError where transformers does not open, or cannot run, what it became."""
        try:
            Theirs(fresh)(torch.arange(PROBE)[None] % (self.config.vocab_size or 1))
        except (UserError, RuntimeError, ValueError, IndexError) as error:
            said = str(error).removeprefix(f"{fresh}: ")
            raise UserError(f"transformers does not take {type(self.model).__name__} with this plan: {said}") from error

    def write_config(self, fresh: Path, config: ModelConfig, dtype: Callable[[str], torch.dtype], packed: Tree) -> str:
        """The config.json of what it became, and its kind in words."""
        tree = {**config_json(self.folder), "quantization_config": {"quant_method": METHOD, PACKED: packed}}
        counts = ({layer.moe.num_experts for layer in c.all_layers if layer.moe} for c in (self.config, config))
        before, after = counts
        if before != after:
            (tree[self.theirs.counted()],) = after
        (fresh / "config.json").write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
        return f"{type(self.model).__name__} of transformers, where moeforge is imported"

    def block(self, index: int) -> TheirBlock:
        """A layer."""
        found = self.found.get(index)
        moe = TheirMoE(found.router, [self.banks.get(index, found.stacks[0].module)]) if found else None
        return TheirBlock(index, self.layers[index], moe)

    def text(self, batches: Sequence[Batch]) -> "TheirText":
        """A text before the first layer. Raises UserError for tokens that the model does not have."""
        check_tokens(batches, self.config)
        return self._enter([batch.input_ids for batch in batches], [batch.position for batch in batches])

    @torch.no_grad()
    def _enter(self, ids: Sequence[Tensor], positions: Sequence[Tensor]) -> "TheirText":
        text = TheirText([], [], [])

        def note(x: Tensor, *arguments: Any, **named: Any) -> Any:
            if not calls:
                text.x.append(x)
            calls.append(Call(arguments, named))
            return self._returned(x)

        for own, position in zip(ids, positions, strict=True):
            calls: list[Call] = []
            with _in_place_of(self.layers, note):
                self.model(input_ids=own, position_ids=position, use_cache=False, logits_to_keep=1)
            text.calls.append(calls)
            text.rest.append(())
        return text

    def _returned(self, x: Tensor) -> Any:
        """What a layer returns, with a mark for all but the stream."""
        return (x, *map(Handed, range(self.handed))) if self.handed else x

    @torch.no_grad()
    def logits(self, x_TD: Tensor) -> Tensor:
        """[T, D] past the last layer -> [T, V]."""
        with _in_place_of(self.layers, lambda x, *_, **__: self._returned(x_TD[None])):
            return self.model(input_ids=torch.zeros(1, len(x_TD), dtype=torch.long), use_cache=False).logits[0]


@dataclass(frozen=True)
class Handed:
    """Stands for what the layer before has returned after the stream."""

    index: int


@dataclass(frozen=True)
class Call:
    """What a layer is called with besides the residual stream."""

    arguments: tuple[Any, ...]
    named: dict[str, Any]

    def __call__(self, layer: Any, x: Tensor, rest: tuple[Any, ...]) -> tuple[Any, ...]:
        """What the layer returns, the stream first; ``rest`` is what the one before did."""

        def known(value: Any) -> Any:
            return rest[value.index] if isinstance(value, Handed) else value

        found = layer(x, *map(known, self.arguments), **{name: known(value) for name, value in self.named.items()})
        return found if isinstance(found, tuple) else (found,)


@contextmanager
def _in_place_of(layers: Sequence[nn.Module], run: Callable[..., Any]) -> Iterator[None]:
    for layer in layers:
        layer.forward = run
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


@dataclass
class TheirText:
    """Batches on their way through the layers."""

    x: list[Tensor]
    """Of each batch: the residual stream before the next layer."""
    rest: list[tuple[Any, ...]]
    """What came with it from the layer before."""
    calls: list[list[Call]]
    """Of each batch, by layer."""

    @torch.no_grad()
    def pass_layer(self, block: TheirBlock) -> None:
        """Moves every batch past a layer."""
        for index, (x, rest, calls) in enumerate(zip(self.x, self.rest, self.calls, strict=True)):
            self.x[index], *others = calls[block.index](block.module, x, rest)
            self.rest[index] = tuple(others)

    def early(self, block: TheirBlock) -> Iterator[Routing]:
        """Nothing: their layers are not taken apart."""
        return iter(())

    @property
    def num_tokens(self) -> int:
        """Of all batches."""
        return sum(x.shape[0] * x.shape[1] for x in self.x)


def _as_bank(found: LayerExperts) -> MLPBank | None:
    """A bank of ours around the experts' weights, which they run through from now on; None where they are no plain
    MLPs."""
    module: Any = found.stacks[0].module
    activation = kernel_activation(module)
    if activation is None:
        return None
    matrices = matrices_of(module)
    shape = {"num_experts": module.num_experts, "d_expert": matrices[1].shape[2], "activation": activation}
    with torch.device("meta"):
        bank = MLPBank(MLPExperts.model_validate(shape), matrices[1].shape[1])
    for name, weight in zip(EXPERTS, matrices, strict=True):
        setattr(bank, name, nn.Parameter(weight.detach(), requires_grad=False))
    module.forward = lambda x_TD, ids_TK, weights_TK: bank(x_TD, route_of(module, ids_TK, weights_TK)).to(x_TD.dtype)
    return bank
