"""Selectors that choose by lot in proportion to the scores."""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from moeforge.moe.context import Context
from moeforge.moe.select.selector import PerToken, Selection


class Draw(PerToken):
    """While training each choice is a draw from the softmax of the logits that are left; outside, the best of them.

    One choice as SparseMixer (arXiv:2310.00811) has it, several without repetition as GRIN
    (arXiv:2409.12136). The weights belong to it: ``weigh: drawn``.
    """

    type: Literal["draw"] = "draw"
    own_softmax: ClassVar[bool] = True
    margin: float | None = Field(None, gt=0)
    """Leave out logits behind the best one left by more than this share of the larger size; null: none."""

    def __call__(self, scores_TE: Tensor, context: Context) -> Selection:
        """[T, E] logits -> ids [T, K] in the order of choosing, and what each was chosen among."""
        left_TE, ids, among = scores_TE, [], []
        for _ in range(self.k):
            among.append(self.near(left_TE))
            odds_TE = left_TE.masked_fill(~among[-1], -torch.inf)
            if context.training:
                odds_TE = odds_TE - torch.empty_like(odds_TE).exponential_().log()  # Gumbel: its best is a draw
            ids.append(odds_TE.argmax(1, keepdim=True))
            left_TE = left_TE.scatter(1, ids[-1], -torch.inf)
        return Selection(ids=torch.cat(ids, 1), among=torch.stack(among, 1))

    def near(self, left_TE: Tensor) -> Tensor:
        """[T, E] bool: what a choice is made among."""
        if self.margin is None:
            return left_TE.isfinite()
        best_T1 = left_TE.max(1, keepdim=True).values
        size_TE = left_TE.abs().maximum(best_T1)
        return left_TE.isfinite() & (best_T1 - left_TE <= self.margin * size_TE)
