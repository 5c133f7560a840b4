"""Where tokens stand and which of them a token sees: made once per forward pass, shared by all layers."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moeforge.models.config import ModelConfig
from moeforge.models.rope import frequencies


@dataclass(frozen=True)
class Positions:
    """Rotations and masks of a batch."""

    cos: Tensor
    """[B, 1, L, W], W the width that rotates."""
    sin: Tensor
    """[B, 1, L, W]."""
    masks: Mapping[int | None, Tensor | None]
    """By the layers' windows, [B or 1, 1, L, past + L] bool, true where a query may look; None means plain causal.
    Empty where caches know who sees whom."""


def locate(
    config: ModelConfig, position: Tensor, document: Tensor | None, past: int | None, visible: Tensor | None = None
) -> Positions:
    """Rotations and masks for [B, L] positions. ``document`` [B, L] keeps packed documents from seeing each other.

    ``visible`` [B, past + L] is false for padding, which nobody sees but itself. With ``past`` None there are no masks.
    """
    frequency, gain = frequencies(config, position)
    angle = (position[:, None, :, None].float() * frequency[:, None, None]).repeat(1, 1, 1, 2)
    if past is None:
        return Positions(angle.cos() * gain, angle.sin() * gain, {})
    mask = _mask(position, document, past, visible)
    windows = {layer.window for layer in config.all_layers}
    masks = {window: _within(mask, window, position, past) for window in windows}
    return Positions(angle.cos() * gain, angle.sin() * gain, masks)


def _mask(position: Tensor, document: Tensor | None, past: int, visible: Tensor | None) -> Tensor | None:
    """Who sees whom where no window is set; None where that is every token and all before it."""
    length, mask = position.shape[1], None
    if past and length > 1:
        mask = _causal(position, past)
    if document is not None and bool((document != document[:, :1]).any()):
        if past:
            raise ValueError("packed documents cannot follow what a cache holds: give each document its own cache")
        mask = (document[:, None, :, None] == document[:, None, None, :]) & _causal(position, 0)
    if visible is not None and not bool(visible.all()):
        if document is not None:
            raise ValueError("a batch has packed documents or padding, not both: leave attention_mask or document out")
        itself = torch.eye(length, dtype=torch.bool, device=position.device)
        itself = torch.nn.functional.pad(itself, (past, 0))  # a row that sees nothing has no softmax
        mask = visible[:, None, None, :] & _causal(position, past) | itself
    return mask


def _causal(position: Tensor, past: int) -> Tensor:
    """[L, past + L]."""
    length = position.shape[1]
    return torch.ones(length, past + length, dtype=torch.bool, device=position.device).tril(past)


def _within(mask: Tensor | None, window: int | None, position: Tensor, past: int) -> Tensor | None:
    """The mask, less what is further back than the window; one token alone finds no more than that in its cache."""
    length = position.shape[1]
    if window is None or past + length <= window or (mask is None and length == 1):
        return mask
    mask = _causal(position, past) if mask is None else mask
    return mask & torch.ones_like(mask).triu(past - window + 1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotary embedding of the first W values of [..., D]; the others pass.

    Pairs are (i, i + W / 2), or (2 i, 2 i + 1), which come out in the order of the former: products do not see it.
    """
    width = cos.shape[-1]
    turning, passing = x[..., :width], x[..., width:]
    if interleaved:
        turning = turning.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    first, second = turning.chunk(2, dim=-1)
    turned = turning * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned, passing.to(turned.dtype)), -1) if passing.shape[-1] else turned
