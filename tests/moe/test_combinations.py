"""Parts that make no sense together are refused with the reason, and every pair that is accepted works."""

import itertools
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from moeforge.moe import Context, MLPExperts, MoE, MoEConfig, Router, RouterConfig
from moeforge.moe.balance import BalanceLoss, Controller, GateLoss
from moeforge.moe.bank import LowRankExperts
from moeforge.moe.capacity import Capacity, Drop, Limit
from moeforge.moe.gates import Cosine, Gate, Hash, Linear, Lookup, Paths, SmoothStep
from moeforge.moe.noise import ExpertDropout, Gaussian, Gumbel, Noise, Visible
from moeforge.moe.scores import Logits, Relu, Score
from moeforge.moe.select import Draw, ExpertChoice, Merged, ProductKeys, Random, Select, Soft, Threshold, TopK
from moeforge.moe.weigh import Drawn, SoftmaxChosen, Weigh
from tests.moe import test_gates, test_layer
from tests.moe.brute_force import members

D, E, T = 8, 6, 24

MERGED = {"select": "merged", "score": "logits", "weigh": "softmax", "losses": []}
KEYS = {"select": "product_keys", "score": "logits", "weigh": "softmax", "losses": []}
HOPELESS: list[tuple[dict[str, Any], str]] = [
    ({"gate": "hash", "losses": []}, "gate: hash names one expert"),
    ({"gate": "hash", "losses": [], "select": {"k": 1}, "noise": ["gumbel"]}, "so noise does nothing"),
    ({"gate": "hash", "losses": [], "select": {"k": 1}, "input_jitter": 0.1}, "does not look at the rows"),
    ({"gate": {"type": "linear", "reads": "token"}, "input_jitter": 0.1}, "does not look at the rows"),
    ({"gate": {"type": "lookup", "num_ids": 3}, "input_jitter": 0.1}, "does not look at the rows"),
    ({"gate": "two_level", "score": "relu"}, "no logit above zero"),
    ({"gate": "distance", "score": "relu"}, "no logit above zero"),
    ({"gate": "two_level", "losses": ["z_loss"]}, "z_loss is zero with gate: two_level"),
    ({"noise": [{"type": "gaussian", "std": 0}]}, "std = 0.0 does nothing"),
    ({"noise": [{"type": "visible", "common": 9, "experts": 1}]}, "leaves the gate nothing to decide"),
    ({"noise": [{"type": "visible", "common": 9}], "score": "logits"}, "which is no weight"),
    ({"noise": [{"type": "visible", "common": 9}], "score": {"standardize": True}}, "which has no mean"),
    ({"noise": [{"type": "visible", "common": 9}], "score": {"num_groups": 2}}, "no softmax over a group"),
    ({"gate": "hash", "losses": [], "select": {"k": 1}, "score": {"num_groups": 2}}, "no softmax over a group"),
    *(({"select": {"type": "threshold", "bar": bar}, "score": score}, "selects nobody: such a score is never above 1")
      for score in ("softmax", "sigmoid") for bar in (1, 1.5)),
    *(({"select": {"type": "threshold", "bar": bar}, "score": score}, "selects every expert")
      for score in ("softmax", "sigmoid") for bar in (0, -0.5)),
    ({"select": {"type": "threshold", "bar": -0.5}, "score": "relu"}, "selects every expert"),
    ({"select": {"type": "threshold", "bar": 1, "at_least": 1}}, "selects nobody"),
    ({"select": {"type": "threshold", "bar": 0.5}, "score": "sigmoid", "gate": "distance"}, "never above 0.5"),
    ({"select": "threshold", "score": "logits", "gate": "two_level"}, "never above 0"),
    ({"select": {"type": "confident", "k": 1, "max_gap": 0.1}}, "no further choice to leave out"),
    ({"select": {"type": "top_p", "max_k": 1}}, "whatever p is"),
    ({"select": {"type": "top_k", "num_groups": 2, "top_groups": 2}}, "so num_groups does nothing"),
    ({"select": "top_p", "score": "logits"}, "compares sizes"),
    ({"select": "soft", "score": "logits"}, "soft fills every slot"),
    ({"select": "soft", "score": "logits", "losses": [], "capacity": ["capacity"]}, "soft fills every slot"),
    ({"select": "soft", "score": "logits", "losses": [], "weigh": "ones"}, "weigh does nothing"),
    ({**MERGED, "noise": [{"type": "visible", "common": 9}]}, "takes means of logits"),
    ({**MERGED, "losses": ["z_loss"]}, "routes no rows"),
    ({**KEYS, "losses": ["z_loss"]}, "no scores of all experts to balance"),
    ({**KEYS, "select": {"type": "product_keys", "k": 1}}, "normalised over one expert"),
    ({"gate": {"type": "query", "queries": 4, "rank": 2}}, "need the same rank"),
    ({**KEYS, "score": "softmax"}, "adds logits of two halves"),
    ({**KEYS, "gate": {"type": "query", "queries": 4, "rank": 2}}, "need the same rank"),
    ({**KEYS, "noise": [{"type": "visible", "common": 9}]}, "has no logit of each"),
    ({**KEYS, "capacity": [{"type": "capacity", "overflow": "next"}]}, "has no score of each"),
    ({"weigh": "complement", "score": "logits"}, "takes shares of scores"),
    ({"score": {"temperature": 0}}, "it must stay above zero"),
    ({"score": {"temperature": {"start": 1, "end": 0, "steps": 9}}}, "it must stay above zero"),
    ({"select": {"k": 1}, "weigh": "softmax"}, "normalised over one expert"),
    ({"select": {"k": 1}, "weigh": {"normalize_weights": True}}, "normalised over one expert"),
    ({"select": {"type": "sinkhorn"}, "weigh": {"normalize_weights": True}}, "normalised over one expert"),
    ({"weigh": {"weight_scale": 0}}, "silences every expert"),
    ({"losses": ["z_loss", "z_loss"]}, "each type once"),
    ({"gate": {"type": "linear", "frozen": True}}, "learns nothing"),
    ({"losses": [], "controller": "overflow"}, "losses is empty"),
    ({"losses": ["sparsity_loss"], "controller": "sparsity"}, "cannot change how many experts select: top_k takes"),
    ({"select": "random", "controller": "expert_bias"}, "never looks at scores"),
    ({"select": "uncertain", "controller": "expert_bias"}, "a bias makes none"),
    ({"losses": [{"type": "sparsity_loss", "even": False}]}, "constant where scores sum to one"),
    ({"losses": [{"type": "entropy_loss", "token": 0}]}, "is zero; set one of them"),
    ({"select": "expert_choice"}, "even loads by itself, so load_balancing_loss does nothing"),
    ({"select": "expert_choice", "losses": [], "controller": "expert_bias"}, "so expert_bias does nothing"),
    ({"weigh": "ones", "capacity": [{"type": "capacity", "keep": "heaviest"}]}, "finds all weights equal"),
]  # fmt: skip


@pytest.mark.parametrize(("router", "reason"), HOPELESS, ids=lambda value: str(value))
def test_what_makes_no_sense_together_is_refused_with_the_reason(router: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        RouterConfig.model_validate(router)


@pytest.mark.parametrize(
    "router",
    [
        {"select": {"type": "threshold", "bar": 0.99}},
        {"select": "threshold", "score": "relu"},
        {"select": {"type": "threshold", "bar": -3}, "score": "logits"},
        {"select": "threshold", "noise": [{"type": "visible", "common": 9}]},
        {"select": {"type": "threshold", "bar": 5}, "score": "relu"},
        {"select": {"k": 1, "train_k": 3}, "weigh": "softmax"},
        {"select": {"k": 1}, "weigh": {"normalize_weights": True}, "gate": "hash", "losses": []},
        {"noise": [{"type": "visible", "common": 9}], "score": "logits", "weigh": "softmax"},
        {"select": "threshold", "score": "relu", "losses": ["sparsity_loss"], "controller": "sparsity"},
        {"select": "expert_choice", "losses": ["z_loss"]},
    ],
    ids=str,
)
def test_what_makes_sense_is_not_refused(router: dict[str, Any]) -> None:
    RouterConfig.model_validate(router)


def test_all_reasons_are_given_at_once() -> None:
    with pytest.raises(ValidationError, match=r"(?s)silences every expert.*each type once"):
        RouterConfig.model_validate({"losses": ["z_loss", "z_loss"], "weigh": {"weight_scale": 0}})


def test_a_router_made_by_hand_is_checked_like_one_in_a_layer() -> None:
    with pytest.raises(ValueError, match=r"num_experts = 5 is not divisible by gate\.num_groups = 2"):
        Router(RouterConfig.model_validate({"gate": "two_level"}), D, 5)


NOISES = [Gaussian(std=0.5), Gaussian(), Gumbel(), Visible(common=20, experts=3), ExpertDropout(at_least=3)]
SLOTS: dict[str, list[Any]] = {
    "gate": [Hash(), Lookup(by="token", num_ids=T, rows=True)]
    + [test_gates.EXAMPLES[member][0] for member in members(Gate) if member not in (Hash, Lookup, SmoothStep, Paths)]
    + [SmoothStep(k=2), Paths(parts=(Linear(), Cosine()))],
    "noise": [
        (),
        (Gaussian(std=0.5),),
        (Gaussian(),),
        (Gumbel(),),
        (Visible(common=20, experts=3),),
        (ExpertDropout(at_least=3),),
    ],
    "score": test_layer.examples(Score),
    "select": [one for one in test_layer.examples(Select) if one != ExpertChoice(k=0.5)]
    + [Random(k=2), Soft(), ProductKeys(k=2, heads=2), Merged(), Merged(over="segment_before", segment=6)],
    "weigh": [*test_layer.examples(Weigh), Drawn()],
    "capacity": [(), (Capacity(capacity_factor=0.7),), (Drop(rate=0.3),)],
    "losses": [(), *((member(),) for member in members(BalanceLoss))],
    "controller": [None, *(member() for member in members(Controller))],
}
ROWS = torch.randn(T, D, generator=torch.Generator().manual_seed(5))
CONTEXT = Context(
    batch_size=2,
    token_ids=torch.arange(T),
    embedded=ROWS,
    positions=torch.arange(T) % 12,
    importance=ROWS.square().mean(1),
    step=3,
)


def test_every_kind_is_walked() -> None:
    for name, slot in (("noise", Noise), ("capacity", Limit)):
        assert {type(part) for parts in SLOTS[name] for part in parts} == set(members(slot))


INSISTS: dict[str, dict[str, Any]] = {
    "hash": {"losses": (), "select": TopK(k=1)},
    "smooth_step": {"score": Relu(), "select": Threshold()},
    "competition": {"losses": (GateLoss(),)},
    "soft": {"losses": (), "score": Logits()},
    "product_keys": {"losses": (), "score": Logits(), "weigh": SoftmaxChosen()},
    "complement": {"select": TopK(k=2)},
    "merged": {"losses": (), "score": Logits(), "weigh": SoftmaxChosen()},
    "draw": {"score": Logits(), "weigh": Drawn()},
    "drawn": {"score": Logits(), "select": Draw()},
    "expert_choice": {"losses": ()},
}
"""What a part cannot do without."""
EXPERTS: dict[str, Any] = {
    "activation_norm": LowRankExperts(num_experts=E, d_expert=4),
    "smooth_step": MLPExperts(num_experts=8, d_expert=4),
    "product_keys": MLPExperts(num_experts=9, d_expert=4),
}
"""What a gate asks of the experts; a grid of keys wants a square."""


def config_of(parts: dict[str, Any]) -> MoEConfig | None:
    """A layer whose router has these parts, and what they insist on; None when they are refused."""
    for part in parts.values():
        parts = {**INSISTS.get(getattr(part, "type", ""), {}), **parts}
    if not getattr(parts.get("gate"), "learns", True):
        parts = {"losses": (), **parts}
    wanted = [EXPERTS[part.type] for part in parts.values() if getattr(part, "type", "") in EXPERTS]
    experts = wanted[0] if wanted else MLPExperts(num_experts=E, d_expert=4)
    try:
        return MoEConfig(experts=(experts,), router=RouterConfig(**parts))
    except ValidationError:
        return None


@pytest.mark.parametrize("pair", list(itertools.combinations(SLOTS, 2)), ids="-".join)
def test_every_pair_that_is_accepted_is_finite_and_teaches_the_gate(pair: tuple[str, str]) -> None:
    accepted = 0
    for first, second in itertools.product(*(SLOTS[name] for name in pair)):
        torch.manual_seed(1)
        config = config_of({pair[0]: first, pair[1]: second})
        if config is None:
            continue
        accepted, moe = accepted + 1, MoE(config, D)
        x_TD = ROWS.clone().requires_grad_()
        y_TD, routing = moe(x_TD, CONTEXT)
        losses = sum(moe.router.balance_losses(routing, 2).values())
        learned = [parameter for parameter in moe.router.gate.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad((y_TD * ROWS.flip(1)).sum() + losses, [x_TD, *learned], allow_unused=True)
        where = f"{first!r} with {second!r}"
        assert y_TD.isfinite().all(), where
        assert all(gradient is None or gradient.isfinite().all() for gradient in gradients), where
        ends_E = getattr(routing.route, "ends", torch.ones(1))  # a merged route has no rows: it has weights throughout
        if learned and len(ends_E) and int(ends_E[-1]):
            assert any(gradient is not None and gradient.abs().max() > 1e-7 for gradient in gradients[1:]), where
        moe.router.step(routing.choices, T)
        assert all(buffer.isfinite().all() for buffer in moe.router.buffers()), where
    assert accepted
