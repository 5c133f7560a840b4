"""The decoder: token ids in, logits and every router's decision out."""

from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from moeforge.models.attention import Attention, LayerCache, locate
from moeforge.models.block import Block
from moeforge.models.config import ModelConfig
from moeforge.models.init import initialise
from moeforge.moe import Context, MoE, Router, Routing

T = TypeVar("T")


@dataclass(frozen=True)
class Output:
    """Of one forward pass."""

    logits: Tensor
    """[B, L, V]."""
    routings: dict[int, Routing]
    """By layer number, for layers with experts."""
    heads: dict[int, Routing] = field(default_factory=dict)
    """By layer number, for layers whose attention heads are routed."""

    @property
    def by_name(self) -> dict[str, Routing]:
        """All of them, under the names of ``Decoder.routers``."""
        return named(self.routings, self.heads)


class Cache:
    """Keys and values of every layer, so that each token is computed once."""

    def __init__(self, model: "Decoder", batch_size: int, max_len: int) -> None:
        like = model.embedding.weight
        self.layers = [LayerCache(batch_size, model.config, max_len, like) for _ in model.blocks]

    @property
    def length(self) -> int:
        """Tokens held."""
        return self.layers[0].length


class Decoder(nn.Module):
    """Config-driven; each layer has its own experts or none. ``config.vocab_size`` must be set."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("vocab_size is not set: take the tokenizer's")
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in config.all_layers)
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.output = None if config.tie_embeddings else nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.recompute_activations = False
        initialise(self, config)

    def forward(
        self,
        input_ids: Tensor,
        position: Tensor | None = None,
        document: Tensor | None = None,
        cache: Cache | None = None,
        step: int | None = None,
    ) -> Output:
        """[B, L] ids -> logits [B, L, V].

        ``position`` and ``document`` [B, L] describe packed sequences: positions restart with each document, and no
        token sees another document. With a ``cache`` the ids follow what it holds.
        """
        past = cache.length if cache else 0
        if position is None:
            position = torch.arange(past, past + input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        positions = locate(self.config, position, document, past)
        x, routings, heads = self.embedding(input_ids), {}, {}
        if self.config.embedding_scale != 1.0:
            x = x * self.config.embedding_scale
        context = Context(len(input_ids), input_ids.flatten(), x.flatten(0, 1), positions=position.flatten(), step=step)
        recompute = self.recompute_activations and torch.is_grad_enabled()
        for index, block in enumerate(self.blocks):
            x, chosen, routing = block(x, positions, context, cache.layers[index] if cache else None, recompute)
            if chosen is not None:
                heads[index] = chosen
            if routing is not None:
                routings[index] = routing
                context = replace(context, router_state=routing.state)
        x = self.norm(x)
        logits = self.output(x) if self.output is not None else nn.functional.linear(x, self.embedding.weight)
        return Output(logits, routings, heads)

    @property
    def moe_layers(self) -> dict[int, MoE]:
        """The layers with experts, by number; the keys of ``Output.routings``."""
        return {index: block.moe for index, block in enumerate(self.blocks) if isinstance(block.moe, MoE)}

    @property
    def routers(self) -> dict[str, Router]:
        """Every router, of experts and of attention heads, by the name that metrics have."""
        heads = {index: attention.router for index, attention in enumerate(self.attentions) if attention.router}
        return named({index: moe.router for index, moe in self.moe_layers.items()}, heads)

    @property
    def attentions(self) -> list[Attention]:
        """Of every layer."""
        return [block.attention for block in self.blocks]  # type: ignore[misc]


def named(experts: dict[int, T], heads: dict[int, T]) -> dict[str, T]:
    """``layer_00`` for what belongs to a layer's experts, ``attention_00`` for what belongs to its heads."""
    of_heads = {f"attention_{index:02d}": value for index, value in heads.items()}
    return {f"layer_{index:02d}": value for index, value in experts.items()} | of_heads
