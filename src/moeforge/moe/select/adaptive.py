"""Selectors that give a token as many experts as its scores call for."""

import math
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from moeforge.moe.context import Context
from moeforge.moe.select.selector import PerToken, Selection, Selector, check_k, mask_of, top_k


class Confident(PerToken):
    """Top-k without the choices that a token does not need: those far behind its best one.

    By difference as in arXiv:2310.07188, by ratio as in arXiv:2402.14800; the tokens that matter most may be spared
    (arXiv:2410.06270).
    """

    type: Literal["confident"] = "confident"
    compares_sizes: ClassVar[bool] = True
    max_gap: float = Field(math.inf, ge=0)
    """Further choices stay while the best score is ahead by no more than this."""
    min_ratio: float = Field(0.0, ge=0, le=1)
    """Further choices stay while their score is at least this share of the best."""
    spared: float = Field(0.0, ge=0, lt=1)
    """Share of the tokens, those that get most attention, that keep all k. Attention comes from later tokens: not for
    decoding."""
    typical: float = Field(1.5, ge=1)
    """Experts per token that sizes and FLOPs are counted with."""

    @property
    def reads_importance(self) -> bool:  # type: ignore[override]
        """Where some are spared."""
        return self.spared > 0

    @property
    def leaks(self) -> bool:  # type: ignore[override]
        """Where some are spared, by what later tokens look at."""
        return self.spared > 0

    @model_validator(mode="after")
    def _does_something(self) -> Self:
        if self.max_gap == math.inf and self.min_ratio == 0.0:
            raise ValueError("neither max_gap nor min_ratio is set: this is select: top_k")
        return self

    def mean_experts(self, num_experts: int) -> float:
        """``typical``."""
        return min(self.typical, self.k)

    def __call__(self, scores_TE: Tensor, context: Context) -> Selection:
        """[T, E] -> mask [T, E]."""
        ids_TK = top_k(scores_TE, self.k)
        chosen_TK = scores_TE.gather(1, ids_TK)
        best_T1 = chosen_TK[:, :1]
        keep_TK = (best_T1 - chosen_TK <= self.max_gap) & (chosen_TK >= self.min_ratio * best_T1)
        keep_TK[:, 0] = True
        if self.spared:
            if context.importance is None:
                raise ValueError("select: confident with spared needs the attention that rows get in the context")
            keep_TK[top_k(context.importance[None], round(self.spared * len(keep_TK)))[0]] = True
        return Selection(mask=mask_of(ids_TK, keep_TK, scores_TE), most=self.k)


class TopP(Selector):
    """The fewest experts whose scores sum to ``p``, one at least (arXiv:2403.07652)."""

    type: Literal["top_p"] = "top_p"
    compares_sizes: ClassVar[bool] = True
    p: float = Field(0.4, gt=0, le=1)
    """Share of the scores' sum that must be reached."""
    max_k: int | None = Field(None, ge=1)
    """At most this many experts per token."""
    typical: float = Field(2.0, ge=1)
    """Experts per token that sizes and FLOPs are counted with."""

    def check(self, num_experts: int) -> None:
        """Raises ValueError when no such choice exists among ``num_experts``."""
        check_k(self.max_k or 1, num_experts)

    def mean_experts(self, num_experts: int) -> float:
        """``typical``."""
        return min(self.typical, self.max_k or num_experts)

    def __call__(self, scores_TE: Tensor, context: Context) -> Selection:
        """[T, E] -> mask [T, E]."""
        ids_TE = top_k(scores_TE, scores_TE.shape[1])
        sorted_TE = scores_TE.gather(1, ids_TE)
        reached_TE = sorted_TE.cumsum(1)  # its end is the sum to compare with: another order would round otherwise
        keep_TE = reached_TE - sorted_TE < self.p * reached_TE[:, -1:]  # needed while those ahead fall short
        keep_TE[:, 0] = True
        return Selection(mask=mask_of(ids_TE[:, : self.max_k], keep_TE[:, : self.max_k], scores_TE), most=self.max_k)


class Threshold(Selector):
    """Every expert whose score is above ``bar``: any number per token."""

    type: Literal["threshold"] = "threshold"
    bar: float = 0.0
    """With relu scores 0 keeps what is positive; with softmax scores 1/E is the even share."""
    at_least: int = Field(0, ge=0)
    """A token below the bar everywhere goes to this many of its best experts."""
    typical: float = Field(2.0, gt=0)
    """Experts per token that sizes and FLOPs are counted with."""

    def check(self, num_experts: int) -> None:
        """Raises ValueError when no such choice exists among ``num_experts``."""
        check_k(self.at_least, num_experts)

    def mean_experts(self, num_experts: int) -> float:
        """``typical``."""
        return min(self.typical, num_experts)

    def __call__(self, scores_TE: Tensor, context: Context) -> Selection:
        """[T, E] -> mask [T, E]."""
        mask_TE = scores_TE > self.bar
        if self.at_least:
            best_TK = top_k(scores_TE, self.at_least)
            mask_TE |= mask_of(best_TK, ~mask_TE.any(1, keepdim=True).expand_as(best_TK), scores_TE)
        return Selection(mask=mask_TE)


class Uncertain(PerToken):
    """Top-k, but while training a token whose router is unsure goes to all experts (arXiv:2406.12375)."""

    type: Literal["uncertain"] = "uncertain"
    compares_sizes: ClassVar[bool] = True
    max_entropy: float = Field(0.9, ge=0, le=1)
    """Unsure is a higher entropy of the scores, divided by log E."""

    def __call__(self, scores_TE: Tensor, context: Context) -> Selection:
        """[T, E] -> ids [T, K], or a mask [T, E] while training."""
        ids_TK = top_k(scores_TE, self.k)
        if not context.training:
            return Selection(ids=ids_TK)
        share_TE = scores_TE / scores_TE.sum(1, keepdim=True)
        entropy_T1 = torch.special.entr(share_TE).sum(1, keepdim=True) / math.log(max(2, scores_TE.shape[1]))
        everywhere = torch.ones_like(ids_TK, dtype=torch.bool)
        return Selection(mask=mask_of(ids_TK, everywhere, scores_TE) | (entropy_T1 > self.max_entropy))
