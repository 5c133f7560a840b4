"""Select: scores [T, E] -> which experts each token goes to. Ties go to the lower expert index, inside the row."""

from dataclasses import dataclass
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from moeforge.config import Config, slot
from moeforge.moe.route import Route, SoftRoute


@dataclass(frozen=True)
class Selection:
    """Chosen (token, expert) pairs before they have weights: either ids, K per token, or a mask."""

    ids: Tensor | None = None
    """[T, K] int64, distinct per token."""
    mask: Tensor | None = None
    """[T, E] bool."""

    def take(self, values_TE: Tensor) -> Tensor:
        """The chosen entries: [T, K] for ids; [T, E] with zero elsewhere for a mask."""
        if self.ids is not None:
            return values_TE.gather(1, self.ids)
        return torch.where(self._chosen(), values_TE, 0)

    def softmax(self, values_TE: Tensor) -> Tensor:
        """Softmax over the chosen entries of each token, in the shape of ``take``."""
        if self.ids is not None:
            return self.take(values_TE).softmax(-1)
        return values_TE.masked_fill(~self._chosen(), -torch.inf).softmax(-1).nan_to_num()

    def route(self, weights: Tensor, num_experts: int) -> Route | SoftRoute:
        """The route with these weights, given in the shape of ``take``."""
        if self.ids is not None:
            return Route.from_top_k(self.ids, weights, num_experts)
        return Route.from_mask(self._chosen(), weights)

    def _chosen(self) -> Tensor:
        assert self.mask is not None
        return self.mask


class TopK(Config):
    """The k best experts of each token; with groups, only inside the best groups (arXiv:2412.19437, section 2.1.2)."""

    type: Literal["top_k"] = "top_k"
    k: int = Field(2, ge=1)
    """Experts per token."""
    num_groups: int = Field(1, ge=1)
    """Experts form this many equal groups, in order."""
    top_groups: int = Field(1, ge=1)
    """Groups a token may use; a group's rank is the sum of its two best scores."""

    @model_validator(mode="after")
    def _groups_exist(self) -> Self:
        if self.top_groups > self.num_groups:
            raise ValueError(f"top_groups={self.top_groups} is more than num_groups={self.num_groups}")
        return self

    def check(self, num_experts: int) -> None:
        """Raises ValueError when no such choice exists among ``num_experts``."""
        if self.k > num_experts:
            raise ValueError(f"top_k = select.k = {self.k} is more than num_experts = {num_experts}")
        if num_experts % self.num_groups:
            raise ValueError(f"num_experts = {num_experts} is not divisible by num_groups = {self.num_groups}")
        reachable = num_experts // self.num_groups * self.top_groups
        if self.k > reachable:
            raise ValueError(
                f"select.k = {self.k} is more than the {reachable} experts of top_groups = {self.top_groups}"
            )

    def mean_experts(self, num_experts: int) -> float:
        """Experts a token uses on average, for counting active parameters."""
        return self.k

    def __call__(self, scores_TE: Tensor) -> Selection:
        """[T, E] scores (bias included) -> ids [T, K], best first."""
        if self.top_groups < self.num_groups:
            scores_TE = self._mask_groups(scores_TE)
        return Selection(ids=_top_k(scores_TE, self.k))

    def _mask_groups(self, scores_TE: Tensor) -> Tensor:
        grouped_TGE = scores_TE.unflatten(1, (self.num_groups, -1))
        best = grouped_TGE.topk(min(2, grouped_TGE.shape[-1]), dim=-1).values.sum(-1)
        allowed_TG = torch.zeros_like(best, dtype=torch.bool).scatter_(1, _top_k(best, self.top_groups), True)
        return grouped_TGE.masked_fill(~allowed_TG[:, :, None], -torch.inf).flatten(1)


def _top_k(scores_TE: Tensor, k: int) -> Tensor:
    """Indices [T, k] of the best entries, best first. ``torch.topk`` leaves ties open; argmax, stable sort do not."""
    if k == 1:
        return scores_TE.argmax(1, keepdim=True)
    return scores_TE.sort(dim=1, descending=True, stable=True).indices[:, :k]


Select = slot(TopK)
