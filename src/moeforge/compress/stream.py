"""A model run layer by layer: one layer's weights in memory, every text's residual stream beside it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from moeforge.data.packing import Batch
from moeforge.errors import UserError
from moeforge.hub.folder import config_json, model_folder, outline
from moeforge.hub.store import PACKED
from moeforge.models import Decoder, ModelConfig
from moeforge.models.attention import locate
from moeforge.models.block import Block, scaled
from moeforge.moe import Context

Tell = Callable[[object], None]
"""Called after each layer, or file, of a pass."""


def silent(_: object) -> None:
    """Tells nobody."""


class Streamed:
    """The model in a folder, opened without its weights.

    Raises UserError as ``hub.load`` does, and for models that cannot be compressed: dense ones, those packed already,
    and those that pass their layers more than once or with momentum.
    """

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

    def outside(self) -> dict[str, Tensor]:
        """The tensors that are in no layer, by name."""
        names = {name.split(".")[0] for name in self.model.state_dict()} - {"blocks"}
        return {key: tensor for name in sorted(names) for key, tensor in self.outline.read(name).items()}

    def head(self, outside: dict[str, Tensor]) -> Decoder:
        """The decoder with nothing but the tensors outside its layers: ``logits`` works."""
        self.model.load_state_dict(outside, strict=False, assign=True)
        return self.model

    def layer(self, index: int) -> dict[str, Tensor]:
        """One layer's tensors, by their names inside it, as they are on disk."""
        prefix = f"blocks.{index}."
        read = self.outline.read(prefix)
        self.outline.shards.close()  # mapped anew for each layer: pages that were read leave memory with its tensors
        return {name.removeprefix(prefix): tensor for name, tensor in read.items()}

    def block(self, tensors: dict[str, Tensor], index: int) -> Block:
        """A layer around such tensors, in evaluation mode."""
        with torch.device("meta"):
            block = Block(self.config, self.config.all_layers[index])
        block.load_state_dict(tensors, assign=True)
        return block.eval()


@dataclass
class Text:
    """Batches on their way through the layers."""

    batches: list[Batch]
    x: list[Tensor]
    """[B, L, D] of each batch: the residual stream before the next layer."""
    contexts: list[Context]

    @classmethod
    def of(cls, batches: Sequence[Batch], outside: dict[str, Tensor], config: ModelConfig) -> "Text":
        """Before the first layer. Raises UserError for tokens that the model does not have."""
        beyond = max(int(batch.input_ids.max()) for batch in batches)
        if beyond >= (config.vocab_size or 0):
            raise UserError(f"the text has token {beyond}, the model's vocabulary ends at {config.vocab_size}")
        table = outside["embedding.weight"]
        x = [scaled(nn.functional.embedding(b.input_ids, table), config.embedding_scale) for b in batches]
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
        return cls(list(batches), x, contexts)

    @torch.no_grad()
    def pass_layer(self, block: Block, config: ModelConfig) -> Iterator[int]:
        """Moves every batch past a layer; yields the number of each as it has."""
        for index, (batch, x, context) in enumerate(zip(self.batches, self.x, self.contexts, strict=True)):
            positions = locate(config, batch.position, batch.document, 0)
            passed = block(x, positions, context, None, False)
            self.x[index] = passed.x + scaled(passed.added, config.residual_scale)
            if passed.routing is not None:
                self.contexts[index] = replace(context, router_state=passed.routing.state)
            yield index

    @property
    def num_tokens(self) -> int:
        """Of all batches."""
        return sum(batch.input_ids.numel() for batch in self.batches)
