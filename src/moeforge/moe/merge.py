"""Experts merged before they run: one weighted sum of parameters for a whole group of tokens, then one pass."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from moeforge.moe.context import Context
from moeforge.moe.route import Route


@dataclass(frozen=True)
class MergedRoute:
    """Every token belongs to one of G groups, every group to its own mixture of all experts' parameters."""

    weight: Tensor
    """[G, E] float32: how much of each expert's parameters a group's expert has. The differentiable field."""
    group: Tensor
    """[T] int64."""
    width: int | None = None
    """Hidden units of the merged experts that run, the first ones; None: all."""

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.group)

    @cached_property
    def to_groups(self) -> Route:
        """The tokens' way to the G merged experts, one edge of weight one each."""
        ones_T1 = torch.ones(len(self.group), 1, device=self.group.device)
        return Route.from_top_k(self.group[:, None], ones_T1, len(self.weight))

    @cached_property
    def edges(self) -> Route:
        """Token to expert wherever the expert has a part in what the token's group gets."""
        weight_TE = self.weight[self.group]
        return Route.from_mask(weight_TE != 0, weight_TE)

    @property
    def counts(self) -> Tensor:
        """[E] int64: tokens that each expert has a part for."""
        return self.edges.counts

    def merge(self, stacked: Tensor, hidden: int | None = None, parts: int = 1) -> Tensor:
        """[E, ...] parameters -> [G, ...]: each group's weighted sum.

        ``hidden`` is the dimension of hidden units, of which the first ``width`` are taken, from each of ``parts``
        equal parts side by side.
        """
        if self.width is not None and hidden is not None:
            apart = stacked.unflatten(hidden, (parts, -1))
            stacked = apart.narrow(hidden + 1, 0, self.width).flatten(hidden, hidden + 1)
        return torch.einsum("ge,e...->g...", self.weight.to(stacked.dtype), stacked)

    def split(self, sizes: Sequence[int]) -> list["MergedRoute"]:
        """Itself: parameters of different banks cannot be summed, so there is only one."""
        if list(sizes) != [self.weight.shape[1]]:
            raise ValueError(f"experts of sizes {list(sizes)} are several banks: their parameters cannot be merged")
        return [self]


def runs(context: Context, num_tokens: int, length: int | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Consecutive tokens of one document, ``length`` at most: (run of each token [T], whether one goes on [R]).

    A run goes on when the one before it is of the same document. A row of the batch starts a document.
    """
    column_T = torch.arange(num_tokens, device=device) % (num_tokens // context.batch_size)
    position_T = column_T if context.positions is None else context.positions
    into_T = position_T if length is None else position_T % length
    starts_T = (into_T == 0) | (column_T == 0)
    return starts_T.cumsum(0) - 1, ((position_T > 0) & (column_T > 0))[starts_T]


def mean_of_groups(rows: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """[T, E] -> [G, E]."""
    sums = rows.new_zeros(num_groups, rows.shape[1]).index_add(0, group, rows)
    return sums / torch.bincount(group, minlength=num_groups)[:, None]
