"""A selector that chooses parameters, not rows: experts are merged for groups of tokens."""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from moeforge.moe.context import Context
from moeforge.moe.merge import MergedRoute, mean_of_groups, runs
from moeforge.moe.select.selector import Selection, Selector, check_k, top_k


class Merged(Selector):
    """No token goes to an expert: those that a group of tokens chooses are merged into one MLP, which the group takes.

    The group's score is the mean of its tokens' scores (with a linear gate and ``score: logits``, the gate's answer to
    their mean row); ``weigh`` makes merging weights of it. MEO, arXiv:2310.09832; SMEAR, arXiv:2306.03745; per segment
    Lory, arXiv:2405.03133. Experts that differ in one linear map alone give what mixing their outputs would.
    """

    type: Literal["merged"] = "merged"
    k: int | None = Field(None, ge=1)
    """Experts that are merged for a group; null: all."""
    over: Literal["document", "segment_before", "equal_scores"] = "document"
    """A token's group decides by all tokens of its document; by the segment before its own (a document's first one gets
    all experts alike, or the first k); or by the scores that it shares with the group, for gates that look up an id."""
    segment: int | None = Field(None, ge=1)
    """Tokens in a segment, counted from the start of the document."""
    widths: tuple[int, ...] = ()
    """Sub-networks: of every merged expert so many hidden units, its first ones, run. A width is drawn for each pass in
    training, the last one is taken otherwise, and ``gate: {type: lookup, by: width}`` has a mixture for each
    (arXiv:2306.04845). Empty: all."""

    @model_validator(mode="after")
    def _cuts_where_it_looks_back(self) -> Self:
        if self.looks_back != (self.segment is not None):
            raise ValueError(
                f"over: {self.over}: segment says how long one is for over: segment_before, and only there"
            )
        return self

    def facts(self, context: Context, num_rows: int) -> Context:
        """With widths, the id of the one that is drawn."""
        if not self.widths:
            return context
        drawn = int(torch.randint(len(self.widths), ())) if context.training else len(self.widths) - 1
        return replace(context, ids={**context.ids, "width": torch.full((num_rows,), drawn)})

    @property
    def leaks(self) -> bool:  # type: ignore[override]
        """Whether tokens after a token have a say."""
        return self.over == "document"

    @property
    def looks_back(self) -> bool:  # type: ignore[override]
        """Whether tokens that a KV cache no longer shows have a say."""
        return self.over == "segment_before"

    def check(self, num_experts: int) -> None:
        """Raises ValueError when no such choice exists among ``num_experts``."""
        check_k(self.k or 1, num_experts)

    def mean_experts(self, num_experts: int) -> float:
        """The one that all are merged into; the work of merging is shared by a group, and not counted."""
        return 1.0

    def route(
        self, scores_TE: Tensor, biased_TE: Tensor, weigh: Callable[..., Tensor], context: Context
    ) -> MergedRoute:
        """[T, E] -> parameters' weights for each of G groups."""
        if self.over == "equal_scores":
            own_GE, group_T = scores_TE.detach().unique(dim=0, return_inverse=True)
            mean_GE = mean_of_groups(scores_TE, group_T, len(own_GE))
            # The mean of equal numbers, rounded, is not always theirs: it only passes the gradient on.
            scores_GE = mean_GE + (own_GE - mean_GE.detach())
        else:
            group_T, goes_on_G = runs(context, len(scores_TE), self.segment, scores_TE.device)
            scores_GE = mean_of_groups(scores_TE, group_T, len(goes_on_G))
            if self.looks_back:
                scores_GE = torch.where(goes_on_G[:, None], scores_GE.roll(1, 0), 0)
        ids_GK = top_k(scores_GE.detach(), self.k or scores_GE.shape[1])
        weights_GK = weigh(scores_GE, Selection(ids=ids_GK), context)
        width = self.widths[int(context.ids["width"][0])] if self.widths else None
        return MergedRoute(torch.zeros_like(scores_GE).scatter(1, ids_GK, weights_GK), group_T, width)
