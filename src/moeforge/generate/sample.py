"""From logits to the next token: temperature and three ways to cut off the unlikely."""

from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from moeforge.config import Config, Count
from moeforge.errors import UserError


class Sampling(Config):
    """How tokens are drawn. The cuts apply in the order ``sample_k``, ``top_p``, ``min_p``, each to what is left."""

    temperature: float = Field(0.8, ge=0)
    """Logits are divided by it; 0 always takes the likeliest token."""
    sample_k: int | None = Field(None, ge=1)
    """Keep the so many likeliest tokens; null keeps all. (``top_k`` is the router's word for experts per token.)"""
    top_p: float = Field(1.0, gt=0, le=1)
    """Keep the fewest likeliest tokens that have this probability together (nucleus, arXiv:1904.09751)."""
    min_p: float = Field(0.0, ge=0, le=1)
    """Keep tokens at least this likely relative to the likeliest (arXiv:2407.01082)."""
    seed: int | None = Field(None, ge=0, lt=2**63)
    """Equal seeds give equal text; null draws one."""
    max_tokens: Count = Field(200, ge=1)
    """Stop after so many."""

    @model_validator(mode="after")
    def _acts(self) -> Self:
        if self.temperature == 0 and (self.sample_k, self.top_p, self.min_p) != (None, 1.0, 0.0):
            raise ValueError("temperature = 0 takes the likeliest token: sample_k, top_p and min_p would do nothing")
        return self

    def generator(self) -> torch.Generator:
        """A fresh source of randomness by ``seed``."""
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        return generator if self.seed is None else generator.manual_seed(self.seed)


def probabilities(logits_V: Tensor, sampling: Sampling) -> Tensor:
    """[V] float32 probabilities that the next token is drawn by; temperature must be above 0."""
    logits_V = logits_V.float()
    probs_V = ((logits_V - logits_V.max()) / sampling.temperature).softmax(-1)
    sorted_V, order_V = probs_V.sort(descending=True, stable=True)
    if sampling.sample_k is not None:
        sorted_V[sampling.sample_k :] = 0
    sorted_V = sorted_V / sorted_V.sum()
    before_V = sorted_V.cumsum(-1) - sorted_V
    if sampling.top_p < 1:
        sorted_V = sorted_V.masked_fill(before_V >= sampling.top_p, 0)
    sorted_V = sorted_V.masked_fill(sorted_V < sampling.min_p * sorted_V[0], 0)
    return torch.zeros_like(probs_V).scatter_(0, order_V, sorted_V / sorted_V.sum())


def next_token(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Draws one token id on the CPU. Raises UserError when a logit is not finite: the weights are broken."""
    logits_V = logits_V.detach().cpu()
    if not bool(torch.isfinite(logits_V).all()):
        raise UserError("the model's logits are not finite: its weights are damaged, or its training diverged")
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    return int(torch.multinomial(probabilities(logits_V, sampling), 1, generator=generator))
