"""One decoder layer: attention, then experts or an MLP, each behind a norm and added to the residual stream."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moeforge.models.attention import Attention, LayerCache, Positions
from moeforge.models.config import LayerConfig, ModelConfig
from moeforge.moe import Context, MoE, Routing
from moeforge.moe.shared import MLP


class Block(nn.Module):
    """[B, L, D] -> [B, L, D] and, for a layer with experts, what its router decided."""

    def __init__(self, config: ModelConfig, layer: LayerConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.moe = MoE(layer.moe, config.d_model) if layer.moe else None
        self.mlp = None if layer.moe else MLP(config.d_model, layer.d_ff, layer.activation)

    def forward(
        self, x: Tensor, positions: Positions, context: Context, cache: LayerCache | None, recompute: bool
    ) -> tuple[Tensor, Routing | None]:
        """With ``recompute``, activations are made again in backward; the route is not, so it cannot change."""
        run = _recomputed if recompute else _called
        if self.moe is not None and self.moe.config.router.select.reads_importance:
            importance = self.attention.received(self.attention_norm(x), positions)
            context = replace(context, importance=importance.flatten())
        x = x + run(lambda x: self.attention(self.attention_norm(x), positions, cache), x)
        if self.moe is None:
            return x + run(lambda x: self._dense(self.mlp_norm(x)), x), None
        moe = self.moe
        normed_TD = self.mlp_norm(x).flatten(0, -2)
        routing = moe.decide(normed_TD, context)
        return x + run(moe.experts, normed_TD, routing.route).view_as(x), routing

    def _dense(self, x: Tensor) -> Tensor:
        assert self.mlp is not None
        return self.mlp(x)


def _called(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    return function(*arguments)


def _recomputed(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    return checkpoint(function, *arguments, use_reentrant=False)
