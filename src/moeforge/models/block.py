"""One decoder layer: attention where it attends, then experts or an MLP, each behind a norm."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moeforge.models.attention import Attention, BlockLayer, LayerCache, Positions, build
from moeforge.models.config import LayerConfig, ModelConfig
from moeforge.moe import Context, MoE, Routing
from moeforge.moe.shared import MLP


class Passed(NamedTuple):
    """What one layer makes of the residual stream."""

    x: Tensor
    """[B, L, D] stream, attention's part added."""
    added: Tensor
    """[B, L, D] what the MLP or the experts have to add to it."""
    routing: Routing | None
    """What the router decided; None for a layer without experts."""
    heads: Routing | None
    """What the router of attention heads decided; None where every token has all of them."""


class Block(nn.Module):
    """[B, L, D] -> the stream after attention and what comes on top; the decoder joins the two."""

    def __init__(self, config: ModelConfig, layer: LayerConfig) -> None:
        super().__init__()
        self.residual_scale = config.residual_scale
        self.attention_norm = norm(config) if layer.attends else None
        self.attention = build(config, layer) if layer.attends else None
        self.mlp_norm = norm(config)
        self.moe = MoE(layer.moe, config.d_model) if layer.moe else None
        self.mlp = None if layer.moe else MLP(config.d_model, layer.d_ff, layer.activation, layer.mlp_bias)

    def forward(
        self, x: Tensor, positions: Positions, context: Context, cache: LayerCache | BlockLayer | None, recompute: bool
    ) -> Passed:
        """With ``recompute``, activations are made again in backward; the route is not, so it cannot change."""
        run, heads, ahead = _recomputed if recompute else _called, None, None
        if self.attention is not None:
            heads = self._route_heads(x, context)
            route: Any = heads.route if heads else None
            if self.moe is not None and self.moe.config.router.select.reads_importance:
                assert isinstance(self.attention, Attention)
                importance = self.attention.received(self._normed(x), positions, route)
                context = replace(context, importance=importance.flatten())
            ahead = self._ahead(x, context, recompute)
            x = x + scaled(run(lambda x: self._attend(x, positions, cache, route), x), self.residual_scale)
        if self.moe is None:
            return Passed(x, run(lambda x: self._dense(self.mlp_norm(x)), x), None, heads)
        rows_TD = self.moe.split(self.mlp_norm(x).flatten(0, -2))
        if ahead is not None:
            routing, finish = ahead
            return Passed(x, finish(rows_TD).view_as(x), routing, heads)
        routing = self.moe.decide(rows_TD, context)
        return Passed(x, run(self.moe.experts, rows_TD, routing.route).view_as(x), routing, heads)

    def _ahead(self, x: Tensor, context: Context, recompute: bool) -> tuple[Routing, Callable[[Tensor], Tensor]] | None:
        """Of a layer with a shortcut, the experts of what comes before attention, begun, so that rows travel meanwhile.

        What is to be made again in backward is one call, so it begins only when the shared branch has its input too.
        """
        moe = self.moe
        if moe is None or not moe.config.shortcut:
            return None
        rows_TD = moe.split(self.mlp_norm(x).flatten(0, -2))
        routing = moe.decide(rows_TD, context)
        if recompute:
            return routing, lambda after_TD: _recomputed(moe.experts, rows_TD, routing.route, after_TD)
        return routing, moe.begin(rows_TD, routing.route)

    def _route_heads(self, x: Tensor, context: Context) -> Routing | None:
        assert self.attention is not None
        router = self.attention.router
        return router(self._normed(x).flatten(0, -2), context) if router else None

    def _attend(self, x: Tensor, positions: Positions, cache: LayerCache | BlockLayer | None, route: Any) -> Tensor:
        assert self.attention is not None
        return self.attention(self._normed(x), positions, cache, route)

    def _normed(self, x: Tensor) -> Tensor:
        assert self.attention_norm is not None
        return self.attention_norm(x)

    def _dense(self, x: Tensor) -> Tensor:
        assert self.mlp is not None
        return self.mlp(x)


def norm(config: ModelConfig) -> nn.Module:
    """The norm in front of a part, over the residual stream."""
    return (nn.LayerNorm if config.norm == "layer" else nn.RMSNorm)(config.d_model, eps=config.norm_eps)


def scaled(x: Tensor, factor: float) -> Tensor:
    """``factor * x``, which 1 leaves untouched."""
    return x if factor == 1.0 else x * factor


def _called(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    return function(*arguments)


def _recomputed(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    return checkpoint(function, *arguments, use_reentrant=False)
