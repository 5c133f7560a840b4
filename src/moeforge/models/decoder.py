"""The decoder: token ids in, logits and every router's decision out."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from moeforge.kernels.paged import Rows
from moeforge.models.attention import Attention, BlockLayer, LatentAttention, LayerCache, locate
from moeforge.models.block import Block, norm, scaled
from moeforge.models.config import ModelConfig
from moeforge.models.init import initialise
from moeforge.models.momentum import Moments
from moeforge.moe import Context, MoE, Router, Routing

T = TypeVar("T")


@dataclass(frozen=True)
class Output:
    """Of one forward pass."""

    logits: Tensor
    """[B, L, V], or of the places asked for."""
    routings: dict[int, Routing]
    """By depth, for layers with experts: the layer's number, and ``num_layers`` more with every repeat."""
    heads: dict[int, Routing] = field(default_factory=dict)
    """By depth, for layers whose attention heads are routed."""
    taken: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """In place of ``routings``, of layers that ran in one call: experts [T, K], best first, and their ends [E]."""

    @property
    def by_name(self) -> dict[str, Routing]:
        """All of them, under the names of ``Decoder.routers``."""
        return named(self.routings, self.heads)


class Cache:
    """Keys and values at every depth that attends, so that each token is computed once."""

    def __init__(self, model: "Decoder", batch_size: int, max_len: int) -> None:
        like = model.embedding.weight
        self.layers = {
            depth: LayerCache(batch_size, max_len, layer.attention.cached(model.config), like, layer.window)
            for depth, layer in enumerate(model.config.applied_layers)
            if layer.attends
        }

    @property
    def length(self) -> int:
        """Tokens held."""
        return next(iter(self.layers.values())).length


class Blocks:
    """The same for many texts at once: pools of blocks at every depth that attends (``kernels/paged.py``).

    A pass is one row of ids [1, T], of any texts: ``rows`` says whose and where they are stored.
    """

    def __init__(self, model: "Decoder", blocks: int, block_size: int) -> None:
        like = model.embedding.weight
        self.block_size = block_size
        self.fused: dict[int, Any] = {}
        """Layers that run in one call, where ``models.fused`` has put them."""
        self.layers = {
            depth: BlockLayer(blocks, block_size, layer.attention.cached(model.config), like, layer.window)
            for depth, layer in enumerate(model.config.applied_layers)
            if layer.attends
        }

    def take(self, rows: Rows) -> None:
        """The rows of the next pass."""
        for layer in self.layers.values():
            layer.rows = rows


class Decoder(nn.Module):
    """Config-driven; each layer has its own experts or none. ``config.vocab_size`` must be set."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("vocab_size is not set: take the tokenizer's")
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in config.all_layers)
        self.norm = norm(config)
        self.output = None if config.tie_embeddings else nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.output_bias = nn.Parameter(torch.zeros(config.vocab_size)) if config.output_bias else None
        self.recompute_activations = False
        initialise(self, config)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        position: Tensor | None = None,
        document: Tensor | None = None,
        cache: Cache | Blocks | None = None,
        step: int | None = None,
        known: Mapping[str, Tensor] | None = None,
        logits_of: Tensor | None = None,
    ) -> Output:
        """[B, L] ids -> logits [B, L, V].

        ``attention_mask`` [B, past + L] is 0 for padding, left or right, which no token sees and no position counts.
        ``position`` and ``document`` [B, L] describe packed sequences: positions restart with each document, and no
        token sees another document. With a ``cache`` the ids follow what it holds. ``known`` [B, L] by kind is what the
        tokens are known to be (``domain``), for gates that look it up. ``Blocks`` need ``position``. ``logits_of`` are
        the places in L that logits are wanted of; None: all.
        """
        blocks = isinstance(cache, Blocks)
        past = cache.length if cache and not blocks else 0
        visible = _visible(attention_mask, input_ids, past)
        if position is None:
            position = torch.arange(past, past + input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
            if visible is not None:
                position = (visible.cumsum(1) - 1).clamp_min(0)[:, past:]
        positions = locate(self.config, position, document, None if blocks else past, visible)
        x, routings, heads, taken = scaled(self.embedding(input_ids), self.config.embedding_scale), {}, {}, {}
        facts = {kind: ids.flatten() for kind, ids in (known or {}).items()}
        tokens, embedded = input_ids.flatten(), x.flatten(0, 1)
        context = Context(len(input_ids), tokens, embedded, positions=position.flatten(), step=step, ids=facts)
        recompute = self.recompute_activations and torch.is_grad_enabled()
        moments, momentum = Moments(), self.config.momentum
        for depth, block in enumerate(self.stack):
            if isinstance(cache, Blocks) and depth in cache.fused:
                x, taken[depth] = cache.fused[depth](x, positions)
                continue
            stored = cache.layers.get(depth) if cache else None
            x, added, routing, chosen = block(x, positions, context, stored, recompute)
            if chosen is not None:
                heads[depth] = chosen
            if routing is not None:
                routings[depth] = routing
                context = replace(context, router_state=routing.state)
                if momentum is not None:
                    added, moments = momentum(added, moments)
            x = x + scaled(added, self.config.residual_scale)
        wanted = x if logits_of is None else x[:, logits_of]
        return Output(self.logits(wanted), routings, heads, taken)

    def logits(self, x: Tensor) -> Tensor:
        """[B, L, D], what the last layer leaves -> [B, L, V]."""
        x = self.norm(x)
        logits = self.output(x) if self.output is not None else nn.functional.linear(x, self.embedding.weight)
        if self.output_bias is not None:
            logits = logits + self.output_bias
        divisor = self.config.logits_divisor
        return logits if divisor == 1.0 else logits / divisor

    @property
    def stack(self) -> list[nn.Module]:
        """The layers in the order in which a token passes them: all of them, ``num_repeats`` times."""
        return list(self.blocks) * self.config.num_repeats

    @property
    def moe_layers(self) -> dict[int, MoE]:
        """The layers with experts, by depth as in ``Output.routings``; with repeats, one module at several depths."""
        return {depth: block.moe for depth, block in enumerate(self.stack) if isinstance(block.moe, MoE)}

    @property
    def routers(self) -> dict[str, Router]:
        """Every router, of experts and of attention heads, at every depth, by the name that metrics have."""
        heads = {depth: attention.router for depth, attention in self.attentions.items() if attention.router}
        return named({depth: moe.router for depth, moe in self.moe_layers.items()}, heads)

    @property
    def cannot_write(self) -> list[str]:
        """Names of the routers by which a token's output depends on more than it and what a cache keeps."""
        blocks = named({depth: moe for depth, moe in self.moe_layers.items() if not moe.config.decodes}, {})
        return [name for name, router in self.routers.items() if name in blocks or not router.config.decodes]

    @property
    def attentions(self) -> dict[int, Attention | LatentAttention]:
        """By depth, of the layers that attend."""
        return {depth: block.attention for depth, block in enumerate(self.stack) if block.attention is not None}  # type: ignore[misc]


def _visible(attention_mask: Tensor | None, input_ids: Tensor, past: int) -> Tensor | None:
    """The mask as bool. Raises ValueError unless it has a column for each token, those in the cache included."""
    if attention_mask is None:
        return None
    wanted = [len(input_ids), past + input_ids.shape[1]]
    if list(attention_mask.shape) != wanted:
        raise ValueError(f"attention_mask is {list(attention_mask.shape)}, not {wanted}: one column for each token")
    return attention_mask.bool()


def named(experts: dict[int, T], heads: dict[int, T]) -> dict[str, T]:
    """``layer_00`` for what belongs to a layer's experts, ``attention_00`` for what belongs to its heads."""
    of_heads = {f"attention_{depth:02d}": value for depth, value in heads.items()}
    return {f"layer_{depth:02d}": value for depth, value in experts.items()} | of_heads
