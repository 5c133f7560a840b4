"""Parts of a router that make no sense together, each with the reason: said when the config is made, not after a run.

A pair belongs here when one of its settings would have no effect, when it gives the gate no gradient, or when it
divides by zero. What single parts refuse of their own settings stands with the part.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from moeforge.moe.schedule import Ramp, Scheduled
from moeforge.moe.select import TopK
from moeforge.moe.weigh import Scores

if TYPE_CHECKING:
    from moeforge.moe.router import RouterConfig

EQUAL_NUMBERS = ("top_k", "auxiliary", "top_per_group", "random", "sinkhorn", "expert_choice")
"""Selectors whose number of experts per token does not follow from scores."""

NEVER_POSITIVE = ("two_level", "distance", "paths")
"""Gates whose logits are distances or log-probabilities."""


def objections(router: "RouterConfig") -> Iterator[str]:
    """Reasons why these parts cannot work together, or would do nothing."""
    yield from _to_gate(router)
    yield from _to_noise(router)
    yield from _to_choice(router)
    yield from _to_weights(router)
    yield from _to_balance(router)


def _to_gate(router: "RouterConfig") -> Iterator[str]:
    gate, score, select = router.gate, router.score, router.select
    if gate.type == "hash" and (score.type not in ("softmax", "sigmoid") or select != TopK(k=1)):
        yield "gate: hash names one expert: it needs select: {type: top_k, k: 1}, score: softmax or sigmoid"
    if gate.type == "hash" and router.noise:
        yield "gate: hash decides by the token id alone, so noise does nothing; set noise: []"
    blind = gate.type == "hash" or getattr(gate, "reads", "row") == "token" or not getattr(gate, "rows", True)
    widths = getattr(select, "widths", ())
    by_width = gate.type == "lookup" and gate.by == "width"
    if by_width != bool(widths) or (by_width and gate.num_ids != len(widths)):
        yield "gate: lookup by: width and select: merged with widths need each other, num_ids being how many there are"
    if router.input_jitter and blind:
        yield f"input_jitter does nothing: gate: {gate.type} does not look at the rows; set input_jitter: 0"
    if gate.type in NEVER_POSITIVE and score.type == "relu":
        yield f"gate: {gate.type} gives no logit above zero, so score: relu is zero everywhere; use softmax or sigmoid"


def _to_noise(router: "RouterConfig") -> Iterator[str]:
    score, hiding = router.score, [part for part in (router.gate, *router.noise) if part.type in ("hash", "visible")]
    if hiding and score.type == "softmax" and (score.standardize or score.num_groups > 1):
        yield (
            f"{hiding[0].type} hides experts by minus infinity, which has no mean, and no softmax over a group without "
            "others: leave score.standardize and score.num_groups alone"
        )
    for noise in router.noise:
        if noise.type == "gaussian" and noise.std != "learned" and noise.std <= 0:
            yield f"noise: gaussian with std = {noise.std} does nothing; use a deviation above zero"
        if noise.type != "visible":
            continue
        if noise.experts == 1:
            yield "noise: visible with experts: 1 leaves the gate nothing to decide; use gate: hash, or experts: 2"
        if score.type == "logits" and (router.weigh.type not in ("softmax", "drawn") or router.select.type == "soft"):
            yield "noise: visible hides experts by minus infinity, which is no weight: use score: softmax or sigmoid"


def _to_choice(router: "RouterConfig") -> Iterator[str]:
    select, score = router.select, router.score
    if select.compares_sizes and score.type == "logits":
        yield f"select: {select.type} compares sizes: logits may be negative, name another score"
    if select.type == "threshold":
        yield from _to_bar(router)
    if select.type == "confident" and select.k == 1:
        yield "select: confident with k: 1 has no further choice to leave out: use select: {type: top_k, k: 1}"
    if select.type == "top_p" and select.max_k == 1:
        yield "select: top_p with max_k: 1 takes the best expert whatever p is: use select: {type: top_k, k: 1}"
    if select.type == "top_k" and select.num_groups > 1 and select.top_groups == select.num_groups:
        yield f"select: top_k may use all {select.num_groups} groups, so num_groups does nothing; lower top_groups"
    if select.auxiliary:
        yield from _to_auxiliary(router)
    if select.own_softmax and score.type != "logits":
        yield f"select: {select.type} has its own softmax; score: {score.type} would come before it: use score: logits"
    if select.type == "soft":
        if router.losses or router.controller or router.capacity:
            yield "select: soft fills every slot; set losses: [] and neither controller nor capacity"
        if router.weigh != Scores():
            yield "select: soft has its own weights, so weigh does nothing: leave it at weigh: scores"
    if select.type == "merged":
        yield from _to_merging(router)
    if not select.scores_experts:
        yield from _to_many(router)
    cored = router.gate.rank if router.gate.type == "query" else 0
    if getattr(select, "rank", 0) != cored or (cored and router.gate.heads != getattr(select, "heads", 0)):
        yield "gate: query and select: product_keys need the same rank and queries = heads * 2 * rank"
    if score.type == "softmax" and min(_ends(score.temperature)) <= 0:
        yield "score.temperature divides the logits: it must stay above zero"


def _to_auxiliary(router: "RouterConfig") -> Iterator[str]:
    weigh = router.weigh.type
    if weigh == "complement" or (weigh == "scores" and router.score.type == "logits"):
        yield f"select: auxiliary takes shares of weights, and weigh: {weigh} here has none; use weigh: softmax"
    if any(getattr(limit, "overflow", "drop") == "next" for limit in router.capacity):
        yield "capacity: overflow: next knows no expert that does not run; with select: auxiliary use overflow: drop"


def _to_bar(router: "RouterConfig") -> Iterator[str]:
    """A bar that no score passes, or every score."""
    gate, score, bar = router.gate, router.score, router.select.bar
    never_positive = gate.type in NEVER_POSITIVE
    most = {"softmax": 1.0, "sigmoid": 0.5 if never_positive else 1.0, "logits": 0.0 if never_positive else None}
    highest, lowest = most.get(score.type), {"softmax": 0.0, "sigmoid": 0.0, "relu": 0.0}.get(score.type)
    where = f"select: threshold with bar = {bar:g} and score: {score.type}"
    if highest is not None and bar >= highest:
        yield f"{where} selects nobody: such a score is never above {highest:g}; lower the bar, or use select: top_k"
    hides = any(noise.type == "visible" for noise in router.noise)  # hidden experts score exactly zero
    if lowest is not None and (bar < lowest or (bar == lowest and score.type != "relu" and not hides)):
        yield f"{where} selects every expert for every token: set bar above {lowest:g}, or score: relu and bar: 0"


def _to_many(router: "RouterConfig") -> Iterator[str]:
    """What needs a logit of each expert, where there is none."""
    select = router.select
    if any(noise.type in ("visible", "expert_dropout") for noise in router.noise):
        yield f"noise: visible and expert_dropout hide experts, and select: {select.type} has no logit of each"
    if getattr(router.weigh, "over", "chosen") != "chosen":
        yield f"weigh: over: computed tells experts apart, and select: {select.type} has no score of each"
    if any(getattr(limit, "overflow", "drop") == "next" for limit in router.capacity):
        yield f"capacity: overflow: next asks for the next best expert, and select: {select.type} has no score of each"
    if select.type != "product_keys":
        return
    if router.controller or any(loss.type != "core_loss" for loss in router.losses):
        yield "select: product_keys has no scores of all experts to balance; set losses: [], no controller"
    if router.score.type != "logits":
        yield f"select: product_keys adds logits of two halves, not {router.score.type} scores"


def _to_merging(router: "RouterConfig") -> Iterator[str]:
    gate, over = router.gate, router.select.over
    if router.losses or router.controller or router.capacity:
        yield "select: merged routes no rows; set losses: [] and neither controller nor capacity"
    if any(noise.type == "visible" for noise in router.noise):
        yield "select: merged takes means of logits, and noise: visible hides experts by minus infinity; leave one out"
    if over == "segment_before" and (router.score.type, router.weigh.type) != ("logits", "softmax"):
        yield (
            "select: merged over: segment_before needs score: logits and weigh: softmax: "
            "they make equal weights for a document's first segment, which has nothing before it"
        )
    if over == "equal_scores" and not (gate.type == "lookup" and not gate.rows):
        yield "select: merged over: equal_scores needs a gate by ids alone; rows have scores of their own"


def _to_weights(router: "RouterConfig") -> Iterator[str]:
    weigh = router.weigh
    normalised = weigh.type == "softmax" or getattr(weigh, "normalize_weights", False)
    if normalised and _chooses_one(router) and getattr(router.gate, "learns", True):
        yield (
            "weigh: a weight normalised over one expert is always one, so the gate learns nothing from the text: use "
            "weigh: {type: scores, normalize_weights: false}, or weigh: ones"
        )
    if weigh.type == "complement" and router.score.type == "logits":
        yield "weigh: complement takes shares of scores: logits may be negative, name another score"
    if getattr(weigh, "weight_scale", 1.0) == 0:
        yield "weigh.weight_scale = 0 silences every expert; use a number other than zero"


def _to_balance(router: "RouterConfig") -> Iterator[str]:
    select, score, controller = router.select, router.score, router.controller
    types = [loss.type for loss in router.losses]
    if len(set(types)) < len(types):
        yield f"losses: each type once, not {types}"
    if not getattr(router.gate, "learns", True) and (router.losses or controller):
        yield f"gate: {router.gate.type} learns nothing, so nothing can balance it; set losses: []"
    if controller and controller.moves == "loss_scale" and not router.losses:
        yield f"controller: {controller.type} moves the weight of the losses, and losses is empty"
    if controller and controller.type == "sparsity" and select.type in EQUAL_NUMBERS:
        yield f"controller: sparsity cannot change how many experts select: {select.type} takes; use select: threshold"
    if controller and controller.type == "expert_bias" and select.type in ("random", "uncertain"):
        reason = "never looks at scores" if select.type == "random" else "needs shares, and a bias makes none"
        yield f"controller: expert_bias moves scores, and select: {select.type} {reason}; leave the controller out"
    if "gate_loss" in types and not getattr(router.gate, "hands_loss", False):
        yield f"losses: gate_loss, but gate: {router.gate.type} as it is set has no loss of its own"
    for loss in router.losses:
        if loss.type == "z_loss" and router.gate.type == "two_level" and not router.noise:
            yield "losses: z_loss is zero with gate: two_level, whose logits are log-probabilities; leave it out"
        if loss.type == "sparsity_loss" and not loss.even and score.type == "softmax":
            yield "losses: sparsity_loss with even: false is constant where scores sum to one; use score: relu"
        if loss.type == "entropy_loss" and loss.token == loss.batch == 0:
            yield "losses: entropy_loss with token: 0 and batch: 0 is zero; set one of them"
    if select.type == "expert_choice":
        even = [loss.type for loss in router.losses if getattr(loss, "choices", None) == "all"]
        if even or controller:
            idle = controller.type if controller else even[0]
            yield f"select: expert_choice has even loads by itself, so {idle} does nothing; set losses: []"
    for limit in router.capacity:
        equal = router.weigh.type == "ones" and (not router.weigh.average or select.type in EQUAL_NUMBERS)
        if limit.type == "capacity" and limit.keep == "heaviest" and equal:
            yield "capacity: keep: heaviest finds all weights equal with weigh: ones; use keep: first or random"


def _chooses_one(router: "RouterConfig") -> bool:
    """Whether every token has exactly one expert, also while training."""
    select = router.select
    if select.type == "top_k" and select.train_k is not None:
        return False
    if select.type == "top_per_group":
        return select.k * select.num_groups == 1
    if select.type == "product_keys":  # each head's weights are normalised by themselves
        return select.k == 1
    return select.type in ("top_k", "random", "sinkhorn") and select.k == 1


def _ends(setting: Scheduled) -> tuple[float, ...]:
    return (setting.start, setting.end) if isinstance(setting, Ramp) else (setting,)
