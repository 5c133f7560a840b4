"""Selectors that give every token the same number of experts."""

from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from moeforge.moe.context import Context, hashed
from moeforge.moe.schedule import Scheduled, at
from moeforge.moe.select.selector import PerToken, Selection, Selector, check_groups, check_k, top_k


class TopK(PerToken):
    """The k best experts of each token; with groups, only inside the best groups (arXiv:2412.19437, section 2.1.2)."""

    type: Literal["top_k"] = "top_k"
    skip: int = Field(0, ge=0)
    """Better experts that are passed over: with k = 1 the expert of one rank alone (arXiv:2405.14507, section 3)."""
    num_groups: int = Field(1, ge=1)
    """Experts form this many equal groups, in order."""
    top_groups: int = Field(1, ge=1)
    """Groups a token may use."""
    group_rank: Literal["two_best", "best"] = "two_best"
    """What groups are compared by: the sum of their two best scores, or the best (arXiv:2405.04434, section 2.2.2)."""
    train_k: Scheduled | None = None
    """Experts per token while training, where that differs: all of them, or more and more (arXiv:2303.01610)."""

    @model_validator(mode="after")
    def _groups_exist(self) -> Self:
        if self.top_groups > self.num_groups:
            raise ValueError(f"top_groups={self.top_groups} is more than num_groups={self.num_groups}")
        if self.group_rank == "best" and self.top_groups == self.num_groups:
            raise ValueError("group_rank does nothing where a token may use all groups: lower top_groups")
        return self

    def check(self, num_experts: int) -> None:
        """Raises ValueError when no such choice exists among ``num_experts``."""
        check_k(self.k, num_experts)
        check_groups(num_experts, self.num_groups, "num_groups")
        reachable = num_experts // self.num_groups * self.top_groups
        if self.k + self.skip > reachable:
            passed = f" after the {self.skip} of select.skip" if self.skip else ""
            raise ValueError(
                f"select.k = {self.k}{passed} is more than the {reachable} experts of top_groups = {self.top_groups}"
            )

    def __call__(self, scores_TE: Tensor, context: Context) -> Selection:
        """[T, E] scores (bias included) -> ids [T, K], best first."""
        if self.top_groups < self.num_groups:
            scores_TE = self._mask_groups(scores_TE)
        if context.training and self.train_k is not None:
            k = round(at(self.train_k, context.step))
            return Selection(ids=top_k(scores_TE, min(max(k, 1), scores_TE.shape[1])))
        return Selection(ids=top_k(scores_TE, self.skip + self.k)[:, self.skip :])

    def _mask_groups(self, scores_TE: Tensor) -> Tensor:
        grouped_TGE = scores_TE.unflatten(1, (self.num_groups, -1))
        ranking = 1 if self.group_rank == "best" else min(2, grouped_TGE.shape[-1])
        best = grouped_TGE.topk(ranking, dim=-1).values.sum(-1)
        allowed_TG = torch.zeros_like(best, dtype=torch.bool).scatter_(1, top_k(best, self.top_groups), True)
        return grouped_TGE.masked_fill(~allowed_TG[:, :, None], -torch.inf).flatten(1)


class TopPerGroup(Selector):
    """The ``k`` best experts of every group: k prototypes with a router each (M6-T, arXiv:2105.15082)."""

    type: Literal["top_per_group"] = "top_per_group"
    num_groups: int = Field(2, ge=1)
    """Experts form this many equal groups, in order."""
    k: int = Field(1, ge=1)
    """Experts per token and group."""

    def check(self, num_experts: int) -> None:
        """Raises ValueError when no such choice exists among ``num_experts``."""
        check_groups(num_experts, self.num_groups, "num_groups")
        check_k(self.k, num_experts // self.num_groups)

    def mean_experts(self, num_experts: int) -> float:
        """Experts a token uses."""
        return self.k * self.num_groups

    def __call__(self, scores_TE: Tensor, context: Context) -> Selection:
        """[T, E] -> ids [T, num_groups * k]."""
        size = scores_TE.shape[1] // self.num_groups
        best_XK = top_k(scores_TE.reshape(-1, size), self.k)
        first_G1 = torch.arange(self.num_groups, device=scores_TE.device)[:, None] * size
        return Selection(ids=(best_XK.view(-1, self.num_groups, self.k) + first_G1).flatten(1))


class Random(PerToken):
    """``k`` experts by lot (THOR, arXiv:2110.04260); scores are not read.

    Outside training the lot follows from token id and position, so that equal texts have equal experts.
    """

    type: Literal["random"] = "random"
    k: int = Field(1, ge=1)
    """Experts per token."""

    def __call__(self, scores_TE: Tensor, context: Context) -> Selection:
        """[T, E] -> ids [T, K]."""
        if context.training or context.token_ids is None or context.positions is None:
            return Selection(ids=top_k(torch.rand_like(scores_TE), self.k))
        place_T = hashed(context.token_ids, 0) ^ hashed(context.positions, 1)
        expert_E = torch.arange(scores_TE.shape[1], device=scores_TE.device)
        return Selection(ids=top_k(hashed(place_T[:, None] * scores_TE.shape[1] + expert_E, 2), self.k))
