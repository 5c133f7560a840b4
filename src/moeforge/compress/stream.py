"""A model run layer by layer: one layer's weights in memory, every text's residual stream beside it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moeforge.config import Tree
from moeforge.data.packing import Batch
from moeforge.errors import UserError
from moeforge.hub.folder import MODEL_TYPE, config_json, model_folder, open_model, outline, write_own_config
from moeforge.hub.pretrained import SPECIAL
from moeforge.hub.shards import Shards
from moeforge.hub.store import PACKED
from moeforge.models import Decoder, ModelConfig
from moeforge.models.attention import locate
from moeforge.models.block import Block, scaled
from moeforge.moe import Context, Routing

CLASSES = ("experts", "dense", "embeddings", "router", "other")
"""Of tensors."""
Tell = Callable[[object], None]
"""Called after each layer, or file, of a pass."""


def silent(_: object) -> None:
    """Tells nobody."""


class Streamed:
    """The model in a folder, opened without its weights.

    Raises UserError as ``hub.load`` does, and for models that cannot be compressed: dense ones, those packed already,
    and those that pass their layers more than once or with momentum.
    """

    dense: Literal["bf16", "as stored"] = "bf16"
    """What a plan keeps the other weights as, where nobody says."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = model_folder(Path(folder))
        if PACKED in config_json(self.folder):
            raise UserError(f"{folder} is compressed already: start from the folder that it was made of")
        self.outline = outline(self.folder)
        self.outline.check()
        self.model: Decoder = self.outline.model
        config = self.config
        if not any(layer.moe for layer in config.all_layers):
            raise UserError(f"{folder} is a dense model: it has no experts to compress")
        if config.num_repeats > 1 or config.momentum:
            raise UserError(f"{folder} passes its layers with repeats or momentum, which is not streamed")

    @property
    def config(self) -> ModelConfig:
        """Of the model."""
        return self.model.config

    @cached_property
    def stored(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Type on disk and shape of every tensor."""
        dtypes = {piece.parameter: self.outline.shards.dtypes[piece.name] for piece in self.outline.pieces}
        return {name: (dtypes[name], tuple(tensor.shape)) for name, tensor in self.model.state_dict().items()}

    def names(self, layer: int | None) -> list[str]:
        """The tensors of a layer; with None, those outside of all."""
        prefix = f"blocks.{layer}."
        return [n for n in self.stored if (n.startswith(prefix) if layer is not None else not n.startswith("blocks."))]

    def read(self, layer: int | None) -> dict[str, Tensor]:
        """Those tensors, by name, as they are on disk."""
        if layer is not None:
            found = self.outline.read(f"blocks.{layer}.")
            self.outline.shards.close()  # mapped anew for each layer: pages that were read leave memory with it
            return found
        parts = {name.split(".")[0] for name in self.names(None)}
        return {key: tensor for name in sorted(parts) for key, tensor in self.outline.read(name).items()}

    def bank(self, layer: int, index: int) -> str:
        """The name of a bank, whose tensors start so."""
        return f"blocks.{layer}.moe.banks.{index}"

    def kind(self, name: str, shape: tuple[int, ...]) -> str:
        """The class of a tensor."""
        return kind_of(name, shape)

    def bytes_on_disk(self, folder: Path) -> dict[str, int]:
        """Bytes by class of the weight files in its folder, or in one that it became."""
        return bytes_on_disk(folder)

    def open(self, folder: Path) -> Decoder:
        """What it became."""
        return open_model(folder)

    def check_opens(self, fresh: Path) -> None:
        """Raises UserError where what it became cannot be opened, which ``Plan.check`` has seen to."""

    def check(self, plan: Any) -> None:
        """Raises UserError for what this kind of model cannot be made to: nothing that ``Plan.check`` does not know."""

    def write_config(self, fresh: Path, config: ModelConfig, dtype: Callable[[str], torch.dtype], packed: Tree) -> str:
        """The config.json of what it became, and its kind in words; ``dtype`` is that of a tensor, by name."""
        fields = config_json(self.folder)
        if fields["model_type"] != MODEL_TYPE:
            fields = {name: fields[name] for name in SPECIAL if name in fields}
        write_own_config(fresh, config, dtype("embedding.weight"), {**fields, PACKED: packed})
        return MODEL_TYPE

    def router_of(self, name: str) -> int | None:
        """The layer for each of whose experts a tensor has a row."""
        return int(name.split(".")[1]) if ".moe.router." in name else None

    def narrows(self, name: str) -> bool:
        """Whether a tensor may be written in fewer bits than it is stored in."""
        return ".router." not in name

    def block(self, index: int) -> Block:
        """A layer with its weights, in evaluation mode."""
        prefix = f"blocks.{index}."
        with torch.device("meta"):
            block = Block(self.config, self.config.all_layers[index])
        tensors = {name.removeprefix(prefix): tensor for name, tensor in self.read(index).items()}
        block.load_state_dict(tensors, assign=True)
        return block.eval()

    def text(self, batches: Sequence[Batch]) -> "Text":
        """A text before the first layer. Raises UserError for tokens that the model does not have."""
        check_tokens(batches, self.config)
        table = self.outline.read("embedding.weight")["embedding.weight"]
        x = [scaled(nn.functional.embedding(b.input_ids, table), self.config.embedding_scale) for b in batches]
        contexts = [
            Context(
                len(b.input_ids),
                b.input_ids.flatten(),
                e.flatten(0, 1),
                positions=b.position.flatten(),
                ids={kind: ids.flatten() for kind, ids in b.known.items()},
            )
            for b, e in zip(batches, x, strict=True)
        ]
        return Text(list(batches), x, contexts, self.config)

    def logits(self, x_TD: Tensor) -> Tensor:
        """[T, D] past the last layer -> [T, V]."""
        if self.model.embedding.weight.is_meta:
            self.model.load_state_dict(self.read(None), strict=False, assign=True)
        return self.model.logits(x_TD)


def bytes_on_disk(folder: Path) -> dict[str, int]:
    """Bytes of the weight files by class, as ``Job.bytes_by_class`` predicts them."""
    found = outline(folder)
    ours = {piece.name: piece.parameter for piece in found.pieces}
    return by_class(found.shards, lambda name, shape: kind_of(ours.get(name, name), shape))


def by_class(shards: Shards, kind: Callable[[str, tuple[int, ...]], str]) -> dict[str, int]:
    """Bytes of weight files by the class that tensors have; their headers are ``other``."""
    sums = dict.fromkeys(CLASSES, 0)
    for name, shape in shards.shapes.items():
        sums[kind(name, tuple(shape))] += shards.bytes_on_disk(name)
    whole = sum(file.stat().st_size for file in {*shards.file_of.values()})
    sums["other"] += whole - sum(sums.values())
    return sums


def kind_of(name: str, shape: tuple[int, ...]) -> str:
    """The class of one of our tensors."""
    if ".banks." in name:
        return "experts"
    if ".router." in name:
        return "router"
    if name.startswith(("embedding.", "output.")):
        return "embeddings"
    return "dense" if len(shape) > 1 else "other"


def check_tokens(batches: Sequence[Batch], config: ModelConfig) -> None:
    """Raises UserError for tokens that the model does not have."""
    beyond = max(int(batch.input_ids.max()) for batch in batches)
    if beyond >= (config.vocab_size or 0):
        raise UserError(f"the text has token {beyond}, the model's vocabulary ends at {config.vocab_size}")


@dataclass
class Text:
    """Batches on their way through the layers."""

    batches: list[Batch]
    x: list[Tensor]
    """[B, L, D] of each batch: the residual stream before the next layer."""
    contexts: list[Context]
    config: ModelConfig

    @torch.no_grad()
    def pass_layer(self, block: Block) -> None:
        """Moves every batch past a layer."""
        for index, (batch, x, context) in enumerate(zip(self.batches, self.x, self.contexts, strict=True)):
            positions = locate(self.config, batch.position, batch.document, 0)
            passed = block(x, positions, context, None, False)
            self.x[index] = passed.x + scaled(passed.added, self.config.residual_scale)
            if passed.routing is not None:
                self.contexts[index] = replace(context, router_state=passed.routing.state)

    @torch.no_grad()
    def early(self, block: Block) -> Iterator[Routing]:
        """What a layer's router says of each batch before its attention."""
        assert block.moe is not None
        for x, context in zip(self.x, self.contexts, strict=True):
            yield block.moe.decide(block.moe.split(block.mlp_norm(x).flatten(0, -2)), context)

    @property
    def num_tokens(self) -> int:
        """Of all batches."""
        return sum(batch.input_ids.numel() for batch in self.batches)
