"""Rotary frequencies that were stretched to a longer context: what is set, and transformers' functions for the rest."""

import math
from functools import lru_cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from moeforge.config import Config, slot
from moeforge.errors import UserError

if TYPE_CHECKING:
    from moeforge.models.config import ModelConfig


class Linear(Config):
    """Every frequency is divided by ``factor`` (arXiv:2306.15595)."""

    type: Literal["linear"] = "linear"
    factor: float = Field(gt=0)
    """How much longer the context is."""


class Dynamic(Config):
    """Past ``max_seq_len`` the base grows with the longest position of the row (NTK-aware scaling)."""

    type: Literal["dynamic"] = "dynamic"
    factor: float = Field(gt=0)
    """How fast it grows."""

    def stage(self, length: int, max_seq_len: int) -> int | None:
        """Rows of one stage rotate alike; None: as in training."""
        return length if length > max_seq_len else None


class Yarn(Config):
    """Fast frequencies stay, slow ones are divided by ``factor``, between them a ramp (YaRN, arXiv:2309.00071)."""

    type: Literal["yarn"] = "yarn"
    factor: float = Field(gt=0)
    """How much longer the context is."""
    original_max_seq_len: int = Field(ge=1)
    """What it was in training."""
    attention_factor: float | None = Field(None, gt=0)
    """Multiplies rotated queries and keys; null: follows from the others."""
    beta_fast: float = Field(32.0, gt=0)
    """Turns within the original context from which a frequency stays."""
    beta_slow: float = Field(1.0, gt=0)
    """Turns below which it is divided by all of ``factor``."""
    mscale: float | None = None
    """With ``mscale_all_dim``: weighs the logarithm of ``factor`` in ``attention_factor``."""
    mscale_all_dim: float | None = None
    """The same, as its divisor; latent attention multiplies all its products by that square instead."""
    truncate: bool = True
    """Whether the ramp starts and ends at whole dimensions."""

    @property
    def all_dim_gain(self) -> float:
        """What ``mscale_all_dim`` comes to."""
        return 0.1 * self.mscale_all_dim * math.log(self.factor) + 1 if self.mscale_all_dim and self.factor > 1 else 1.0


class ByWavelength(Config):
    """Waves longer than ``original_max_seq_len / low_freq_factor`` are stretched, short ones stay, a ramp between."""

    type: Literal["by_wavelength"] = "by_wavelength"
    factor: float = Field(gt=0)
    """How much long waves are stretched."""
    low_freq_factor: float = Field(gt=0)
    """Where the ramp ends, in waves per original context."""
    high_freq_factor: float = Field(gt=0)
    """Where it starts."""
    original_max_seq_len: int = Field(ge=1)
    """The context in training."""


class LongRope(Config):
    """Every frequency has a divisor of its own, and another in rows past the original context (arXiv:2402.13753)."""

    type: Literal["longrope"] = "longrope"
    short_factor: tuple[float, ...]
    """Divisors in rows that keep within ``original_max_seq_len``."""
    long_factor: tuple[float, ...]
    """Divisors in longer rows."""
    original_max_seq_len: int = Field(ge=1)
    """The context in training."""
    factor: float | None = Field(None, gt=0)
    """How much longer the context is; null: max_seq_len / original_max_seq_len."""
    attention_factor: float | None = Field(None, gt=0)
    """Multiplies rotated queries and keys; null: follows from ``factor``."""
    short_mscale: float | None = Field(None, gt=0)
    """In place of ``attention_factor``, in short rows."""
    long_mscale: float | None = Field(None, gt=0)
    """In place of ``attention_factor``, in longer rows."""

    def stage(self, length: int, max_seq_len: int) -> int | None:
        """Rows of one stage rotate alike; None: as in training."""
        return self.original_max_seq_len + 1 if length > self.original_max_seq_len else None

    def check(self, width: int) -> None:
        """Raises ValueError unless there is a divisor for each of the frequencies."""
        for name in ("short_factor", "long_factor"):
            given = len(getattr(self, name))
            if given != width // 2:
                raise ValueError(f"rope.{name} has {given} divisors for the {width // 2} frequencies of {width} values")


Rope = slot(Linear, Dynamic, Yarn, ByWavelength, LongRope)

NAMES = {"original_max_seq_len": "original_max_position_embeddings"}
"""What transformers calls differently."""


def frequencies(config: "ModelConfig", position: Tensor) -> tuple[Tensor, Tensor | float]:
    """Positions [B, L] -> (radians per token [B or 1, W / 2] float32, what rotated values are multiplied by [B, 1, 1]).

    Raises UserError where a stretched rotation is asked for and transformers is not installed.
    """
    width, theta, rope = config.rotary_width, config.rope_theta, config.rope
    if rope is None:
        return 1.0 / theta ** (torch.arange(0, width, 2, device=position.device).float() / width)[None], 1.0
    stages: list[int | None] = [None]
    if hasattr(rope, "stage"):
        stages = [rope.stage(length, config.max_seq_len) for length in (position.amax(1) + 1).tolist()]
    rows = [stretched(rope, theta, width, config.max_seq_len, stage) for stage in stages]
    gains = torch.tensor([gain for _, gain in rows], device=position.device)
    return torch.stack([frequency for frequency, _ in rows]).to(position.device), gains[:, None, None, None]


@lru_cache(maxsize=64)
def stretched(rope: Any, theta: float, width: int, max_seq_len: int, stage: int | None) -> tuple[Tensor, float]:
    """(radians per token [W / 2] on the CPU, gain) of one stage, by transformers' own function."""
    try:
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    except ImportError as error:
        wanted = f"rope: {rope.type} needs transformers, which is not installed: pip install 'moeforge[hf]'"
        raise UserError(wanted) from error
    kind = {"by_wavelength": "llama3"}.get(rope.type, rope.type)
    fields = {NAMES.get(name, name): value for name, value in rope.model_dump().items() if value is not None}
    asked = SimpleNamespace(
        rope_parameters={**fields, "rope_type": kind, "rope_theta": theta},
        head_dim=width,
        hidden_size=width,  # these two are read, and then not used, where head_dim is there
        num_attention_heads=1,
        max_position_embeddings=max_seq_len,
        standardize_rope_params=lambda: None,
    )
    with torch.inference_mode(False):
        frequency, gain = ROPE_INIT_FUNCTIONS[kind](asked, torch.device("cpu"), seq_len=stage)
    return frequency, getattr(rope, "short_mscale" if stage is None else "long_mscale", None) or gain
