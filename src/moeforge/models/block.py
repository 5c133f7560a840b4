"""One decoder layer: attention, then experts or an MLP, each behind a norm and added to the residual stream."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moeforge.models.attention import Attention, LayerCache, Positions
from moeforge.models.config import LayerConfig, ModelConfig
from moeforge.moe import Context, MoE, Routing
from moeforge.moe.shared import MLP


class Block(nn.Module):
    """[B, L, D] -> [B, L, D] and what the routers of heads and experts decided, where there are such."""

    def __init__(self, config: ModelConfig, layer: LayerConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.attention = Attention(config, layer.attention)
        self.mlp_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.moe = MoE(layer.moe, config.d_model) if layer.moe else None
        self.mlp = None if layer.moe else MLP(config.d_model, layer.d_ff, layer.activation)

    def forward(
        self, x: Tensor, positions: Positions, context: Context, cache: LayerCache | None, recompute: bool
    ) -> tuple[Tensor, Routing | None, Routing | None]:
        """With ``recompute``, activations are made again in backward; the route is not, so it cannot change."""
        run = _recomputed if recompute else _called
        heads = None
        if self.attention.router is None:
            x = x + run(lambda x: self.attention(self.attention_norm(x), positions, cache), x)
        else:
            normed = self.attention_norm(x)
            heads = self.attention.router(normed.flatten(0, -2), context)
            x = x + run(self.attention, normed, positions, cache, heads.route)
        if self.moe is None:
            return x + run(lambda x: self._dense(self.mlp_norm(x)), x), heads, None
        moe = self.moe
        normed_TD = moe.split(self.mlp_norm(x).flatten(0, -2))
        routing = moe.router(normed_TD, context.split(moe.config.heads))
        return x + run(moe.experts, normed_TD, routing.route).view_as(x), heads, routing

    def _dense(self, x: Tensor) -> Tensor:
        assert self.mlp is not None
        return self.mlp(x)


def _called(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    return function(*arguments)


def _recomputed(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    return checkpoint(function, *arguments, use_reentrant=False)
