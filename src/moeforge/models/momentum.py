"""Momentum across layers: what the experts of earlier layers added goes on acting in later ones."""

from typing import NamedTuple

from pydantic import Field
from torch import Tensor

from moeforge.config import Config


class Moments(NamedTuple):
    """What one layer with experts hands to the next."""

    velocity: Tensor | float = 0.0
    """[B, L, D]; 0 below the first one."""
    square: Tensor | float = 0.0
    """[B, L, D]; stays 0 without ``second``."""


class Momentum(Config):
    """p <- decay p + f(x), x <- x + step p, f the experts of each layer in turn (arXiv:2410.14574).

    With ``second`` as Adam has it: p <- decay p + (1 - decay) f, m <- second m + (1 - second) f^2, and p is divided by
    the root of m. Layers without experts add to x as ever.
    """

    decay: float = Field(0.0, ge=0, lt=1)
    """Memory of p; 0, with ``step`` 1, is the plain residual stream."""
    step: float = Field(1.0, gt=0)
    """Factor of p."""
    second: float | None = Field(None, ge=0, lt=1)
    """Memory of the running square; null: p is not divided."""
    eps: float = Field(1e-8, gt=0)
    """Added to m inside the root: an output of zero, as a skipped token has it, then still has a gradient."""

    def __call__(self, added: Tensor, before: Moments) -> tuple[Tensor, Moments]:
        """Any shape: the experts' output -> (what the stream gets, what the next layer is told)."""
        if self.second is None:
            velocity = added + self.decay * before.velocity
            return self.step * velocity, Moments(velocity)
        velocity = self.decay * before.velocity + (1 - self.decay) * added
        square = self.second * before.square + (1 - self.second) * added.square()
        return self.step * velocity * (square + self.eps).rsqrt(), Moments(velocity, square)
