"""What each selector promises beyond being its loop (test_layer.py): limits, lots, training, and who looks at whom."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from moeforge.moe import Context, MoEConfig
from moeforge.moe.schedule import Ramp, at
from moeforge.moe.select import (
    ByImportance,
    Confident,
    ExpertChoice,
    Random,
    Select,
    Selection,
    Sinkhorn,
    Threshold,
    TopK,
    TopP,
    Uncertain,
)
from tests.moe.brute_force import members, ranked
from tests.moe.test_layer import EXAMPLES

TRAINING, OUTSIDE = Context(training=True), Context()
PROBS_TE = torch.randn(64, 6, generator=torch.Generator().manual_seed(2)).softmax(1)


def mask_of(selection: Selection, num_experts: int = 6) -> Tensor:
    """[T, E] bool."""
    if selection.mask is not None:
        return selection.mask
    assert selection.ids is not None
    return torch.nn.functional.one_hot(selection.ids, num_experts).sum(1).bool()


@pytest.mark.parametrize("select", [one for member in members(Select) for one in EXAMPLES[member]], ids=repr)
def test_only_selectors_that_say_so_look_at_other_tokens(select: Any) -> None:
    whole_TE = mask_of(select(PROBS_TE, OUTSIDE))
    first_TE = mask_of(select(PROBS_TE[:32], OUTSIDE))
    changed_TE = torch.cat([PROBS_TE[:32], PROBS_TE[32:].flip(1).square()])
    after_TE = mask_of(select(changed_TE, OUTSIDE))
    same = torch.equal(whole_TE[:32], first_TE) and torch.equal(whole_TE[:32], after_TE[:32])
    assert same != select.leaks


def test_top_p_goes_from_top_1_to_all() -> None:
    few_TE, all_TE = (mask_of(TopP(p=p)(PROBS_TE, OUTSIDE)) for p in (1e-6, 1.0))
    assert torch.equal(few_TE, mask_of(TopK(k=1)(PROBS_TE, OUTSIDE))) and all_TE.all()
    chosen_TE = mask_of(TopP(p=0.6)(PROBS_TE, OUTSIDE))
    mass_T = (PROBS_TE * chosen_TE).sum(1)
    weakest_T = PROBS_TE.masked_fill(~chosen_TE, 1.0).min(1).values
    assert (mass_T >= 0.6 - 1e-6).all() and (mass_T - weakest_T < 0.6).all(), "enough, and no expert too many"


def test_a_gap_goes_from_top_1_to_top_2() -> None:
    top_1, top_2 = (mask_of(TopK(k=k)(PROBS_TE, OUTSIDE)) for k in (1, 2))
    assert torch.equal(mask_of(Confident(k=2, max_gap=0.0)(PROBS_TE, OUTSIDE)), top_1)
    assert torch.equal(mask_of(Confident(k=2, max_gap=1.0)(PROBS_TE, OUTSIDE)), top_2)
    assert torch.equal(mask_of(Confident(k=2, min_ratio=1.0)(PROBS_TE, OUTSIDE)), top_1)
    numbers = [mask_of(Confident(k=2, max_gap=gap)(PROBS_TE, OUTSIDE)).sum().item() for gap in (0.05, 0.1, 0.2, 0.4)]
    assert numbers == sorted(set(numbers))


def test_a_token_without_any_score_above_the_bar_may_have_no_expert() -> None:
    assert mask_of(Threshold(bar=0.99)(PROBS_TE, OUTSIDE)).sum() == 0
    fallback_TE = mask_of(Threshold(bar=0.99, at_least=1)(PROBS_TE, OUTSIDE))
    assert torch.equal(fallback_TE, mask_of(TopK(k=1)(PROBS_TE, OUTSIDE)))


def test_expert_choice_loads_are_even() -> None:
    chosen_TE = mask_of(ExpertChoice(k=1.5)(PROBS_TE, OUTSIDE))
    assert chosen_TE.sum(0).tolist() == [16] * 6
    assert len(chosen_TE.sum(1).unique()) > 1, "and tokens have as many as experts wanted them"


def test_unsure_tokens_go_everywhere_only_while_training() -> None:
    scores_TE = torch.tensor([[0.9, 0.05, 0.03, 0.02], [0.26, 0.25, 0.25, 0.24]])
    select = Uncertain(k=1, max_entropy=0.9)
    assert mask_of(select(scores_TE, TRAINING), 4).sum(1).tolist() == [1, 4]
    assert mask_of(select(scores_TE, OUTSIDE), 4).sum(1).tolist() == [1, 1]
    assert mask_of(Uncertain(k=1, max_entropy=0.0)(scores_TE, TRAINING), 4).all()


@pytest.mark.parametrize(("k", "max_k"), [(1.1, None), (1.5, 2), (2.25, 4), (2.0, None), (6.0, None)])
def test_important_tokens_get_more_experts_one_claim_after_the_other(k: float, max_k: int | None) -> None:
    importance_T = torch.rand(64, generator=torch.Generator().manual_seed(4)) ** 3
    select = ByImportance(k=k, max_k=max_k)
    chosen_TE = mask_of(select(PROBS_TE, replace(OUTSIDE, importance=importance_T)))
    numbers = [1] * 64
    for _ in range(round((k - 1) * 64)):
        open_to = [t for t in range(64) if numbers[t] < (max_k or 6)]
        numbers[max(open_to, key=lambda t: float(importance_T[t] / numbers[t]))] += 1
    assert chosen_TE.sum(1).tolist() == numbers and chosen_TE.sum() == round(k * 64)
    for token, number in enumerate(numbers):
        assert chosen_TE[token].nonzero().flatten().tolist() == sorted(ranked(PROBS_TE[token].tolist())[:number])
    by_importance = [numbers[t] for t in importance_T.argsort()]
    assert by_importance == sorted(by_importance), "more importance, no fewer experts"


@pytest.mark.parametrize("spared", [0.0, 0.01, 0.25, 0.9])
def test_tokens_that_matter_keep_all_their_experts(spared: float) -> None:
    importance_T = torch.rand(64, generator=torch.Generator().manual_seed(4))
    select = Confident(k=3, min_ratio=0.8, spared=spared)
    chosen_TE = mask_of(select(PROBS_TE, replace(OUTSIDE, importance=importance_T)))
    matter = sorted(range(64), key=lambda t: -float(importance_T[t]))[: round(spared * 64)]
    for token, scores in enumerate(PROBS_TE.tolist()):
        best = ranked(scores)[:3]
        kept = best if token in matter else [e for e in best if scores[e] >= 0.8 * max(scores)]
        assert chosen_TE[token].nonzero().flatten().tolist() == sorted(kept)
    assert select.leaks == select.reads_importance == (spared > 0)


@pytest.mark.parametrize("select", [ByImportance(), Confident(min_ratio=0.5, spared=0.1)])
def test_importance_must_be_there(select: Any) -> None:
    with pytest.raises(ValueError, match="needs the attention that rows get"):
        select(PROBS_TE, OUTSIDE)


def test_lots_are_even_and_distinct() -> None:
    ids_TK = Random(k=2)(torch.zeros(6000, 6), OUTSIDE).ids
    assert (ids_TK[:, 0] != ids_TK[:, 1]).all()
    assert torch.bincount(ids_TK.flatten(), minlength=6).sub(2000).abs().max() < 200


def test_lots_outside_training_follow_from_token_and_position() -> None:
    ids_T, positions_T, scores_TE = torch.arange(3000) % 100, torch.arange(3000), torch.zeros(3000, 6)
    context = Context(token_ids=ids_T, positions=positions_T)
    first = Random(k=2)(scores_TE, context).ids
    assert torch.equal(first, Random(k=2)(scores_TE, context).ids)
    alone = Context(token_ids=ids_T[70:71], positions=positions_T[70:71])
    assert torch.equal(first[70:71], Random(k=2)(scores_TE[:1], alone).ids)
    assert not torch.equal(first, Random(k=2)(scores_TE, replace(context, training=True)).ids)
    assert torch.bincount(first.flatten(), minlength=6).sub(1000).abs().max() < 150
    assert (first[:, 0] != first[:, 1]).all() and len(first[ids_T == 7].unique(dim=0)) > 10


def test_a_plan_evens_out_loads_while_training() -> None:
    logits_TE = torch.randn(300, 6) + torch.tensor([3.0, 0, 0, 0, 0, 0])
    scores_TE = logits_TE.softmax(1)
    trained_E, outside_E = (mask_of(Sinkhorn(k=1)(scores_TE, context)).sum(0) for context in (TRAINING, OUTSIDE))
    assert outside_E.max() > 200 and trained_E.max() < 60
    plan_TE = torch.exp(logits_TE)  # the published plan: exp(logits) with rows, then columns, scaled in turn
    for _ in range(8):
        plan_TE = plan_TE / plan_TE.sum(1, keepdim=True)
        plan_TE = plan_TE / plan_TE.sum(0, keepdim=True)
    assert torch.equal(Sinkhorn(k=1)(scores_TE, TRAINING).ids[:, 0], plan_TE.argmax(1))


def test_k_may_differ_while_training_and_grow() -> None:
    select = TopK(k=2, train_k=Ramp(start=1, end=6, steps=10))
    counts = [select(PROBS_TE, replace(TRAINING, step=step)).ids.shape[1] for step in (0, 2, 4, 10, 99)]
    assert counts == [1, 2, 3, 6, 6]
    assert select(PROBS_TE, OUTSIDE).ids.shape[1] == 2
    assert TopK(k=2, train_k=6)(PROBS_TE, TRAINING).ids.shape[1] == 6


def test_ramps() -> None:
    line, curve = Ramp(start=1, end=3, steps=4), Ramp(start=1, end=16, steps=4, shape="geometric")
    assert [line.at(step) for step in (0, 1, 4, 9)] == [1, 1.5, 3, 3] and line.at(None) == 3
    assert [curve.at(step) for step in range(5)] == pytest.approx([1, 2, 4, 8, 16])
    assert at(0.5, None) == 0.5 and at(line, 2) == 2
    with pytest.raises(ValidationError, match="geometric needs both ends above zero"):
        Ramp(start=0, end=1, steps=4, shape="geometric")


@pytest.mark.parametrize(
    ("select", "message"),
    [
        ({"type": "top_per_group", "num_groups": 4}, "not divisible by num_groups = 4"),
        ({"type": "top_per_group", "num_groups": 3, "k": 3}, "k = 3 is more than num_experts = 2"),
        ({"type": "confident"}, "neither max_gap nor min_ratio is set: this is select: top_k"),
        ({"type": "top_p", "max_k": 7}, "k = 7 is more than num_experts = 6"),
        ({"type": "top_p", "p": 0}, "greater than 0"),
        ({"type": "threshold", "bar": 0.3, "at_least": 7}, "k = 7 is more than"),
        ({"type": "expert_choice", "k": 7}, "k = 7 is more than"),
        ({"type": "random", "k": 7}, "k = 7 is more than"),
        ({"type": "by_importance", "k": 2.5, "max_k": 2}, "k = 2.5 on average is more than 2 at most"),
        ({"type": "by_importance", "max_k": 7}, "k = 7 is more than"),
        ({"type": "soft"}, "select: soft has its own softmax"),
    ],
)
def test_choices_that_do_not_exist_are_refused(select: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        router = {"select": select, "losses": []}
        MoEConfig.model_validate({"experts": {"num_experts": 6, "d_expert": 4}, "router": router})
