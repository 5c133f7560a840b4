"""Causal self-attention: how queries, keys and values are made, who sees whom, and what a cache keeps."""

from moeforge.models.attention.attention import Attention as Attention
from moeforge.models.attention.cache import BlockLayer as BlockLayer
from moeforge.models.attention.cache import LayerCache as LayerCache
from moeforge.models.attention.latent import LatentAttention as LatentAttention
from moeforge.models.attention.positions import Positions as Positions
from moeforge.models.attention.positions import locate as locate
from moeforge.models.attention.positions import rotate as rotate
from moeforge.models.attention.routed import places as places
from moeforge.models.config import LayerConfig, ModelConfig
from moeforge.models.heads import LatentHeads


def build(config: ModelConfig, layer: LayerConfig) -> Attention | LatentAttention:
    """The attention of one layer."""
    if isinstance(layer.attention, LatentHeads):
        return LatentAttention(config, layer.attention, layer.window)
    return Attention(config, layer.attention, layer.window)
