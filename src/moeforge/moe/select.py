"""Select: scores [T, E] -> which experts each token goes to. Ties go to the lower expert index, inside the row."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from moeforge.config import Config, slot
from moeforge.moe.context import Context, hashed
from moeforge.moe.merge import MergedRoute, mean_of_groups, runs
from moeforge.moe.route import Route, SoftRoute
from moeforge.moe.schedule import Scheduled, at


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


def check_k(k: int, num_experts: int) -> None:
    """Raises ValueError when a token cannot have ``k`` distinct experts."""
    if k > num_experts:
        raise ValueError(f"top_k = select.k = {k} is more than num_experts = {num_experts}")


def check_groups(num_experts: int, num_groups: int, name: str) -> None:
    """Raises ValueError when the experts cannot form ``num_groups`` equal groups; ``name`` is the setting."""
    if num_experts % num_groups:
        raise ValueError(f"num_experts = {num_experts} is not divisible by {name} = {num_groups}")


class Selector(Config):
    """What every selector is. It also answers ``check(num_experts)`` and ``mean_experts(num_experts)``."""

    leaks: ClassVar[bool] = False
    """Whether a token's experts depend on other tokens outside training: decoding is then refused."""
    looks_back: ClassVar[bool] = False
    """Whether they depend on earlier tokens' rows, which a KV cache does not keep: decoding is refused as well."""
    compares_sizes: ClassVar[bool] = False
    """Whether ratios or sums of scores matter, so that scores must not be negative."""

    def columns(self, num_experts: int) -> int:
        """How many logits per token the gate gives."""
        return num_experts

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


class TopK(PerToken):
    """The k best experts of each token; with groups, only inside the best groups (arXiv:2412.19437, section 2.1.2)."""

    type: Literal["top_k"] = "top_k"
    num_groups: int = Field(1, ge=1)
    """Experts form this many equal groups, in order."""
    top_groups: int = Field(1, ge=1)
    """Groups a token may use; a group's rank is the sum of its two best scores."""
    train_k: Scheduled | None = None
    """Experts per token while training, where that differs: all of them, or more and more (arXiv:2303.01610)."""

    @model_validator(mode="after")
    def _groups_exist(self) -> Self:
        if self.top_groups > self.num_groups:
            raise ValueError(f"top_groups={self.top_groups} is more than num_groups={self.num_groups}")
        return self

    def check(self, num_experts: int) -> None:
        """Raises ValueError when no such choice exists among ``num_experts``."""
        check_k(self.k, num_experts)
        check_groups(num_experts, self.num_groups, "num_groups")
        reachable = num_experts // self.num_groups * self.top_groups
        if self.k > reachable:
            raise ValueError(
                f"select.k = {self.k} is more than the {reachable} experts of top_groups = {self.top_groups}"
            )

    def __call__(self, scores_TE: Tensor, context: Context) -> Selection:
        """[T, E] scores (bias included) -> ids [T, K], best first."""
        if self.top_groups < self.num_groups:
            scores_TE = self._mask_groups(scores_TE)
        if context.training and self.train_k is not None:
            k = round(at(self.train_k, context.step))
            return Selection(ids=_top_k(scores_TE, min(max(k, 1), scores_TE.shape[1])))
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
        best_XK = _top_k(scores_TE.reshape(-1, size), self.k)
        first_G1 = torch.arange(self.num_groups, device=scores_TE.device)[:, None] * size
        return Selection(ids=(best_XK.view(-1, self.num_groups, self.k) + first_G1).flatten(1))


class Confident(PerToken):
    """Top-k without the choices that a token does not need: those far behind its best one.

    By difference as in arXiv:2310.07188, by ratio as in arXiv:2402.14800.
    """

    type: Literal["confident"] = "confident"
    compares_sizes: ClassVar[bool] = True
    max_gap: float = Field(math.inf, ge=0)
    """Further choices stay while the best score is ahead by no more than this."""
    min_ratio: float = Field(0.0, ge=0, le=1)
    """Further choices stay while their score is at least this share of the best."""
    typical: float = Field(1.5, ge=1)
    """Experts per token that sizes and FLOPs are counted with."""

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
        ids_TK = _top_k(scores_TE, self.k)
        chosen_TK = scores_TE.gather(1, ids_TK)
        best_T1 = chosen_TK[:, :1]
        keep_TK = (best_T1 - chosen_TK <= self.max_gap) & (chosen_TK >= self.min_ratio * best_T1)
        keep_TK[:, 0] = True
        return Selection(mask=_mask_of(ids_TK, keep_TK, scores_TE))


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
        ids_TE = _top_k(scores_TE, self.max_k or scores_TE.shape[1])
        sorted_TE = scores_TE.gather(1, ids_TE)
        before_TE = sorted_TE.cumsum(1) - sorted_TE  # an expert is needed while those ahead of it fall short
        keep_TE = before_TE < self.p * scores_TE.sum(1, keepdim=True)
        keep_TE[:, 0] = True
        return Selection(mask=_mask_of(ids_TE, keep_TE, scores_TE))


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
            best_TK = _top_k(scores_TE, self.at_least)
            mask_TE |= _mask_of(best_TK, ~mask_TE.any(1, keepdim=True).expand_as(best_TK), scores_TE)
        return Selection(mask=mask_TE)


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
        tokens_EC = _top_k(scores_TE.T, min(num_tokens, math.ceil(self.k * num_tokens / num_experts)))
        return Selection(mask=torch.zeros_like(scores_TE, dtype=torch.bool).T.scatter(1, tokens_EC, True).T)


class Uncertain(PerToken):
    """Top-k, but while training a token whose router is unsure goes to all experts (arXiv:2406.12375)."""

    type: Literal["uncertain"] = "uncertain"
    compares_sizes: ClassVar[bool] = True
    max_entropy: float = Field(0.9, ge=0, le=1)
    """Unsure is a higher entropy of the scores, divided by log E."""

    def __call__(self, scores_TE: Tensor, context: Context) -> Selection:
        """[T, E] -> ids [T, K], or a mask [T, E] while training."""
        ids_TK = _top_k(scores_TE, self.k)
        if not context.training:
            return Selection(ids=ids_TK)
        share_TE = scores_TE / scores_TE.sum(1, keepdim=True)
        entropy_T1 = torch.special.entr(share_TE).sum(1, keepdim=True) / math.log(max(2, scores_TE.shape[1]))
        everywhere = torch.ones_like(ids_TK, dtype=torch.bool)
        return Selection(mask=_mask_of(ids_TK, everywhere, scores_TE) | (entropy_T1 > self.max_entropy))


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
            return Selection(ids=_top_k(torch.rand_like(scores_TE), self.k))
        place_T = hashed(context.token_ids, 0) ^ hashed(context.positions, 1)
        expert_E = torch.arange(scores_TE.shape[1], device=scores_TE.device)
        return Selection(ids=_top_k(hashed(place_T[:, None] * scores_TE.shape[1] + expert_E, 2), self.k))


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
        return Selection(ids=_top_k(scores_TE, self.k))


class Soft(Selector):
    """No choice: every slot of every expert takes a mixture of tokens, every token a mixture of slots.

    Over the tokens of a sequence as Soft MoE (arXiv:2308.00951) has it, or over the tokens at the same position of all
    sequences with one slot per expert (Mixture of Tokens, arXiv:2310.15961). Not for decoding.
    """

    type: Literal["soft"] = "soft"
    leaks: ClassVar[bool] = True
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

    @model_validator(mode="after")
    def _cuts_where_it_looks_back(self) -> Self:
        if self.looks_back != (self.segment is not None):
            raise ValueError(
                f"over: {self.over}: segment says how long one is for over: segment_before, and only there"
            )
        return self

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
            _, group_T = scores_TE.detach().unique(dim=0, return_inverse=True)
            scores_GE = mean_of_groups(scores_TE, group_T, int(group_T.max()) + 1)
        else:
            group_T, goes_on_G = runs(context, len(scores_TE), self.segment, scores_TE.device)
            scores_GE = mean_of_groups(scores_TE, group_T, len(goes_on_G))
            if self.looks_back:
                scores_GE = torch.where(goes_on_G[:, None], scores_GE.roll(1, 0), 0)
        ids_GK = _top_k(scores_GE.detach(), self.k or scores_GE.shape[1])
        weights_GK = weigh(scores_GE, Selection(ids=ids_GK), context)
        return MergedRoute(torch.zeros_like(scores_GE).scatter(1, ids_GK, weights_GK), group_T)


def _mask_of(ids_TK: Tensor, keep_TK: Tensor, like_TE: Tensor) -> Tensor:
    """[T, E] bool: true at each id that is kept."""
    return torch.zeros_like(like_TE, dtype=torch.bool).scatter(1, ids_TK, keep_TK)


Select = slot(
    TopK, TopPerGroup, Confident, TopP, Threshold, ExpertChoice, Uncertain, Random, Sinkhorn, Soft, Merged, default=TopK
)
