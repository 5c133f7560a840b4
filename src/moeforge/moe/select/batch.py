"""Selectors that look at the tokens of a batch together, always or while training."""

import math
from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from moeforge.moe.context import Context
from moeforge.moe.route import SoftRoute
from moeforge.moe.select.selector import PerToken, Selection, Selector, check_k, mask_of, top_k


class ExpertChoice(Selector):
    """Each expert takes its best tokens, so loads are even by construction (arXiv:2202.09368).

    Whether a token is chosen depends on tokens after it and beside it: not for decoding.
    """

    type: Literal["expert_choice"] = "expert_choice"
    leaks: ClassVar[bool] = True
    k: float = Field(2.0, gt=0)
    """Experts per token on average: each of E experts takes k * T / E tokens, rounded up."""

    def check(self, num_experts: int) -> None:
        """Raises ValueError when no such choice exists among ``num_experts``."""
        check_k(math.ceil(self.k), num_experts)

    def mean_experts(self, num_experts: int) -> float:
        """Experts a token uses on average."""
        return self.k

    def __call__(self, scores_TE: Tensor, context: Context) -> Selection:
        """[T, E] -> mask [T, E]."""
        num_tokens, num_experts = scores_TE.shape
        tokens_EC = top_k(scores_TE.T, min(num_tokens, math.ceil(self.k * num_tokens / num_experts)))
        return Selection(mask=torch.zeros_like(scores_TE, dtype=torch.bool).T.scatter(1, tokens_EC, True).T)


class Sinkhorn(PerToken):
    """Top-k of a plan that is even over experts: scores scaled in turn to equal rows and columns.

    S-BASE, arXiv:2202.01169, which scales exp(logits): with softmax scores the same plan, as rows are scaled anyway. It
    is made over the whole batch, while training only; outside, the scores themselves decide.
    """

    type: Literal["sinkhorn"] = "sinkhorn"
    compares_sizes: ClassVar[bool] = True
    k: int = Field(1, ge=1)
    """Experts per token."""
    iterations: int = Field(8, ge=1)
    """Rounds of scaling rows, then columns."""

    def __call__(self, scores_TE: Tensor, context: Context) -> Selection:
        """[T, E] -> ids [T, K]."""
        if context.training:
            scores_TE = scores_TE.clamp_min(torch.finfo(scores_TE.dtype).tiny).log()
            for _ in range(self.iterations):
                scores_TE = scores_TE.log_softmax(1).log_softmax(0)
        return Selection(ids=top_k(scores_TE, self.k))


class Soft(Selector):
    """No choice: every slot of every expert takes a mixture of tokens, every token a mixture of slots.

    Over the tokens of a sequence as Soft MoE (arXiv:2308.00951) has it, or over the tokens at the same position of all
    sequences with one slot per expert (Mixture of Tokens, arXiv:2310.15961). Not for decoding.
    """

    type: Literal["soft"] = "soft"
    leaks: ClassVar[bool] = True
    own_softmax: ClassVar[bool] = True
    scores_experts: ClassVar[bool] = False
    slots: int = Field(1, ge=1)
    """Slots per expert and group of tokens."""
    group: Literal["sequence", "position"] = "sequence"
    """Which tokens are mixed with one another."""

    def check(self, num_experts: int) -> None:
        """Any number of experts will do."""

    def mean_experts(self, num_experts: int) -> float:
        """Rows computed per token, were a sequence as long as there are slots."""
        return 1.0

    def columns(self, num_experts: int) -> int:
        """One logit per slot."""
        return num_experts * self.slots

    def route(self, scores_TE: Tensor, biased_TE: Tensor, weigh: Callable[..., Tensor], context: Context) -> SoftRoute:
        """[T, E * slots] logits -> mixing weights over G groups; slots are in order of expert, then group."""
        num_tokens, columns = scores_TE.shape
        length = num_tokens // context.batch_size
        token_T = torch.arange(num_tokens, device=scores_TE.device)
        by_sequence = self.group == "sequence"
        group_T = token_T // length if by_sequence else token_T % length
        groups = context.batch_size if by_sequence else length
        other_TG = group_T[:, None] != torch.arange(groups, device=scores_TE.device)
        logits_TCG = scores_TE[:, :, None].masked_fill(other_TG[:, None], -torch.inf)
        experts = columns // self.slots
        ends_E = torch.arange(1, experts + 1, device=scores_TE.device, dtype=torch.int32) * (self.slots * groups)
        dispatch_TS = logits_TCG.softmax(0).flatten(1)
        mix_TS = dispatch_TS if self.group == "position" else logits_TCG.flatten(1).softmax(1)
        return SoftRoute(dispatch_TS, mix_TS, ends_E)


class ByImportance(Selector):
    """One expert for every token, and more for those that get much attention (DA-MoE, arXiv:2409.06669).

    What is left of ``k`` per token goes to the largest of importance / 1, importance / 2, ... of all tokens (d'Hondt's
    method): in proportion, and the mean is ``k``. Attention comes from later tokens: not for decoding.
    """

    type: Literal["by_importance"] = "by_importance"
    leaks: ClassVar[bool] = True
    reads_importance: ClassVar[bool] = True
    k: float = Field(2.0, gt=1)
    """Experts per token on average."""
    max_k: int | None = Field(None, ge=1)
    """Most experts of one token; null: all of them."""

    def check(self, num_experts: int) -> None:
        """Raises ValueError when no such choice exists among ``num_experts``."""
        check_k(self.max_k or 1, num_experts)
        if self.k > (self.max_k or num_experts):
            raise ValueError(f"select.k = {self.k} on average is more than {self.max_k or num_experts} at most")

    def mean_experts(self, num_experts: int) -> float:
        """Experts a token uses on average."""
        return self.k

    def __call__(self, scores_TE: Tensor, context: Context) -> Selection:
        """[T, E] -> mask [T, E]."""
        if context.importance is None:
            raise ValueError("select: by_importance needs the attention that rows get in the context")
        ids_TK = top_k(scores_TE, self.max_k or scores_TE.shape[1])
        place_K = torch.arange(ids_TK.shape[1], device=ids_TK.device)
        claim_TK = context.importance[:, None] / place_K[1:]
        granted = top_k(claim_TK.reshape(1, -1), round((self.k - 1) * len(ids_TK)))
        further_TK = torch.zeros_like(claim_TK, dtype=torch.long).flatten().scatter(0, granted[0], 1).view_as(claim_TK)
        return Selection(mask=mask_of(ids_TK, place_K <= further_TK.sum(1, keepdim=True), scores_TE))
