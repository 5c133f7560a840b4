"""What every selector is, and what a choice is before it has weights."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from moeforge.config import Config
from moeforge.moe.context import Context
from moeforge.moe.merge import MergedRoute
from moeforge.moe.route import Route, SoftRoute


@dataclass(frozen=True)
class Selection:
    """Chosen (token, expert) pairs before they have weights: either ids, K per token, or a mask."""

    ids: Tensor | None = None
    """[T, K] int64, distinct per token."""
    mask: Tensor | None = None
    """[T, E] bool."""
    most: int | None = None
    """With a mask, how many experts a token may have; None: all of them."""
    among: Tensor | None = None
    """[T, K, E] bool: which experts each of the ids was chosen among, where that differs."""

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
        return Route.from_mask(self._chosen(), weights, most=self.most)

    def _chosen(self) -> Tensor:
        assert self.mask is not None
        return self.mask


def check_k(k: int, num_experts: int) -> None:
    """Raises ValueError when a token cannot have ``k`` distinct experts."""
    if k > num_experts:
        raise ValueError(f"top_k = select.k = {k} is more than num_experts = {num_experts}")


def check_groups(num_experts: int, num_groups: int, name: str, what: str = "num_experts") -> None:
    """Raises ValueError when so many ``what`` cannot form ``num_groups`` equal groups; ``name`` is the setting."""
    if num_experts % num_groups:
        raise ValueError(f"{what} = {num_experts} is not divisible by {name} = {num_groups}")


class Selector(Config):
    """What every selector is. It also answers ``check(num_experts)`` and ``mean_experts(num_experts)``."""

    leaks: ClassVar[bool] = False
    """Whether a token's experts depend on other tokens outside training: decoding is then refused."""
    looks_back: ClassVar[bool] = False
    """Whether they depend on earlier tokens' rows, which a KV cache does not keep: decoding is refused as well."""
    reads_importance: ClassVar[bool] = False
    """Whether ``context.importance`` must be there: a decoder then looks at its attention once more."""
    compares_sizes: ClassVar[bool] = False
    """Whether ratios or sums of scores matter, so that scores must not be negative."""
    auxiliary: ClassVar[int] = 0
    """Chosen experts of a token that do not run, but are vectors which what others read is multiplied with."""
    own_softmax: ClassVar[bool] = False
    """Whether it takes a softmax itself, so that scores must be logits."""

    scores_experts: ClassVar[bool] = True
    """Whether the gate gives one logit per expert, which balance losses and biases need."""

    def columns(self, num_experts: int) -> int:
        """How many logits per token the gate gives."""
        return num_experts

    def facts(self, context: Context, num_rows: int) -> Context:
        """What the gate is told: the context, and what the selector itself decides before it."""
        return context

    def route(
        self, scores_TE: Tensor, biased_TE: Tensor, weigh: Callable[..., Tensor], context: Context
    ) -> Route | SoftRoute | MergedRoute:
        """Chooses by the biased scores, weighs by the scores."""
        selection = self(biased_TE, context)
        return selection.route(weigh(scores_TE, selection, context), scores_TE.shape[1])

    def __call__(self, scores_TE: Tensor, context: Context) -> Selection:
        """[T, E] scores, without gradient -> who was chosen."""
        raise TypeError(f"{type(self).__name__} is a Selector without __call__")


class PerToken(Selector):
    """What selectors with a number of experts per token have in common."""

    k: int = Field(2, ge=1)
    """Experts per token."""

    def check(self, num_experts: int) -> None:
        """Raises ValueError when no such choice exists among ``num_experts``."""
        check_k(self.k, num_experts)

    def mean_experts(self, num_experts: int) -> float:
        """Experts a token uses on average, for counting active parameters."""
        return self.k


def top_k(scores_TE: Tensor, k: int) -> Tensor:
    """Indices [T, k] of the best entries, best first. ``torch.topk`` leaves ties open; argmax, stable sort do not."""
    if k == 1:
        return scores_TE.argmax(1, keepdim=True)
    return scores_TE.sort(dim=1, descending=True, stable=True).indices[:, :k]


def mask_of(ids_TK: Tensor, keep_TK: Tensor, like_TE: Tensor) -> Tensor:
    """[T, E] bool: true at each id that is kept."""
    return torch.zeros_like(like_TE, dtype=torch.bool).scatter(1, ids_TK, keep_TK)
