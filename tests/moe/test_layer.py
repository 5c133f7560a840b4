"""The layer against its brute-force twin: every part of every slot, forward and all gradients."""

import re
from typing import Any, Literal, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from moeforge.config import Activation, Config
from moeforge.moe import Context, MergedRoute, MLPExperts, MoE, MoEConfig, Route, RouterConfig
from moeforge.moe.bank import (
    Clamp,
    ConstantExperts,
    CopyExperts,
    Experts,
    FactorisedExperts,
    LowRankExperts,
    NestedExperts,
    NeuronExperts,
    ValueExperts,
    ZeroExperts,
)
from moeforge.moe.scores import Logits, Relu, Score, Sigmoid, Softmax
from moeforge.moe.select import (
    Auxiliary,
    ByImportance,
    Confident,
    Draw,
    ExpertChoice,
    Merged,
    ProductKeys,
    Random,
    Select,
    Sinkhorn,
    Soft,
    Threshold,
    TopK,
    TopP,
    TopPerGroup,
    Uncertain,
)
from moeforge.moe.shared import Coefficient, Gated, Interpolated, Mix, SharedConfig, Sum
from moeforge.moe.weigh import Complement, Drawn, Ones, Scores, SoftmaxChosen, Weigh
from tests.kernels.engines import ON_CPU
from tests.moe import brute_force
from tests.moe.brute_force import BANKS

D = 8
WEIGHTS = ((1.0, 1e-20), (2.5, 1e-20), (1.0, 0.6))
EXAMPLES: dict[type, list[Any]] = {
    TopK: [
        *(TopK(k=k) for k in (1, 2, 3)),
        TopK(k=1, num_groups=6),
        TopK(k=1, skip=1),
        TopK(k=2, skip=1),
        *(TopK(k=2, num_groups=3, top_groups=2, group_rank=rank) for rank in ("two_best", "best")),
    ],
    Auxiliary: [Auxiliary(), Auxiliary(k=4, main=2)],
    TopPerGroup: [TopPerGroup(num_groups=3), TopPerGroup(num_groups=2, k=2)],
    Confident: [Confident(k=3, max_gap=0.1), Confident(k=2, min_ratio=0.6)],
    TopP: [TopP(p=0.4), TopP(p=1.0), TopP(p=0.7, max_k=2)],
    Threshold: [Threshold(), Threshold(bar=0.3), Threshold(bar=0.3, at_least=2)],
    ExpertChoice: [ExpertChoice(k=2), ExpertChoice(k=0.5)],
    Uncertain: [Uncertain(k=2)],
    Random: [],  # chooses by lot: see test_select.py
    Sinkhorn: [Sinkhorn(k=2)],
    Draw: [Draw(k=2), Draw(k=3, margin=0.1)],
    Drawn: [],  # weighs what select: draw chooses: see test_drawn.py
    Softmax: [Softmax(), Softmax(temperature=0.5, standardize=True), Softmax(num_groups=2)],
    Sigmoid: [Sigmoid()],
    Relu: [Relu()],
    Logits: [Logits()],
    Ones: [Ones(), Ones(average=True)],
    Scores: [
        Scores(),
        *(Scores(normalize_weights=True, weight_scale=scale, min_total=least) for scale, least in WEIGHTS),
    ],
    Complement: [Complement()],
    SoftmaxChosen: [SoftmaxChosen(), SoftmaxChosen(weight_scale=0.5)],
    MLPExperts: [MLPExperts(num_experts=6, d_expert=4, activation=name) for name in get_args(Activation)]
    + [MLPExperts(num_experts=6, d_expert=4, bias=True, activation=name) for name in ("swiglu", "relu")]
    + [MLPExperts(num_experts=6, d_expert=4, bias=bias, clamp=Clamp(limit=0.7, alpha=1.3)) for bias in (True, False)],
    FactorisedExperts: [
        FactorisedExperts(num_experts=6, d_expert=4, rank=3),
        FactorisedExperts(d_expert=5, activation="relu"),
    ],
    LowRankExperts: [
        LowRankExperts(num_experts=6, d_expert=4, rank=3),
        LowRankExperts(d_expert=3, rank=9, activation="geglu"),
    ],
    NestedExperts: [NestedExperts(widths=(2, 3, 5, 5)), NestedExperts(widths=(1, 4, 4, 6), activation="gelu")],
    NeuronExperts: [NeuronExperts(num_experts=6), NeuronExperts(num_experts=5, activation="swiglu")],
    ValueExperts: [ValueExperts(num_experts=6), ValueExperts(num_experts=6, tables=3)],
    ZeroExperts: [ZeroExperts(num_experts=4)],
    CopyExperts: [CopyExperts(num_experts=4)],
    ConstantExperts: [ConstantExperts(num_experts=4)],
    Soft: [],
    Merged: [],  # mixes parameters, not outputs: see test_merge.py
    ByImportance: [],  # needs attention: see test_select.py
    ProductKeys: [],  # has no score of each expert: see test_grid.py
    Sum: [Sum()],
    Gated: [Gated()],
    Coefficient: [Coefficient()],
    Interpolated: [Interpolated()],
}


def examples(slot: Any) -> list[Any]:
    """Every example of every member of a slot: a member without one fails the collection of this file."""
    return [example for member in brute_force.members(slot) for example in EXAMPLES[member]]


def banks() -> list[list[Any]]:
    """Each bank alone that computes something, two of unequal width, and those with three kinds without much work."""
    pair = [MLPExperts(num_experts=2, d_expert=12), MLPExperts(num_experts=4, d_expert=4, activation="relu")]
    mixed = [*pair, ZeroExperts(num_experts=2), CopyExperts(), ConstantExperts()]
    return [*([bank] for bank in examples(Experts) if any(bank.costs(D)) or bank.type == "copy"), pair, mixed]


class NoSelector(Config):
    """Stands in a slot, but answers nothing."""

    type: Literal["tests.moe.test_layer:NoSelector"] = "tests.moe.test_layer:NoSelector"


def names(banks: list[Any]) -> str:
    """Kinds and activations, for the name of a test."""
    return "+".join(f"{bank.type}.{getattr(bank, 'activation', '')}" for bank in banks)


def build(seed: int = 0, **parts: Any) -> MoE:
    torch.manual_seed(seed)
    parts = {"experts": [EXAMPLES[MLPExperts][0]]} | parts
    moe = MoE(MoEConfig(**parts), D)
    for name, parameter in moe.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return moe


def assert_same(y: Tensor, expected: Tensor, inputs: list[Tensor], rtol: float = 1e-4, atol: float = 2e-5) -> None:
    """Equal values, and equal gradients of a random projection of them at every input."""
    torch.testing.assert_close(y, expected, rtol=rtol, atol=atol)
    towards = torch.randn(y.shape, generator=torch.Generator().manual_seed(9))
    ours = torch.autograd.grad((y * towards).sum(), inputs, allow_unused=True, materialize_grads=True)
    theirs = torch.autograd.grad((expected * towards).sum(), inputs, allow_unused=True, materialize_grads=True)
    for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol * 5, msg=lambda m, n=number: f"input {n}: {m}")


def assert_is_brute_force(moe: MoE, tokens: int = 7, seed: int = 1) -> None:
    moe.eval()
    x_TD = torch.randn(tokens, D, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    y_TD, _ = moe(x_TD)
    assert_same(y_TD, brute_force.layer(moe, x_TD), [x_TD, *moe.parameters()])


@pytest.mark.parametrize("score", examples(Score), ids=repr)
@pytest.mark.parametrize("select", examples(Select), ids=repr)
def test_every_router_is_brute_force(select: Any, score: Any) -> None:
    for weigh in examples(Weigh):
        if weigh.type == "complement" and select.mean_experts(6) <= 1:
            with pytest.raises(ValidationError, match="weigh: complement"):
                build(router={"select": select, "score": score, "weigh": weigh, "losses": ()})
            continue
        try:
            router = RouterConfig(select=select, score=score, weigh=weigh, losses=())
        except ValidationError as refusal:  # held by test_combinations.py
            assert re.search(
                "compares sizes|takes shares|own softmax|selects every expert|normalised over one expert", str(refusal)
            )
            continue
        assert_is_brute_force(build(router=router))


ROUTERS = [RouterConfig(select=TopK(k=1)), RouterConfig(select=TopK(k=3), score=Sigmoid(), weigh=EXAMPLES[Scores][1])]


@pytest.mark.parametrize("router", ROUTERS, ids=["top1", "top3"])
@pytest.mark.parametrize("mix", [None, *examples(Mix)], ids=lambda mix: mix.type if mix else "alone")
@pytest.mark.parametrize(
    "experts", banks(), ids=lambda banks: "+".join(getattr(bank, "activation", bank.type) for bank in banks)
)
@pytest.mark.parametrize("engine", ON_CPU)
def test_every_bank_on_every_engine_is_brute_force(engine: str, experts: list[Any], mix: Any, router: Any) -> None:
    biased = engine == "streaming"
    shared = SharedConfig(num_shared_experts=2, d_expert=3, activation="geglu", mix=mix, bias=biased) if mix else None
    plain = [isinstance(bank, MLPExperts) and not (bank.bias or bank.clamp) for bank in experts]
    experts = [bank.replace(engine=engine) if is_plain else bank for bank, is_plain in zip(experts, plain, strict=True)]
    assert_is_brute_force(build(experts=experts, router=router, shared=shared))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    tokens=st.integers(1, 20), width=st.integers(1, 9), experts=st.integers(1, 40), k=st.integers(1, 4), data=st.data()
)
def test_any_shape_is_brute_force(tokens: int, width: int, experts: int, k: int, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, experts - 1))
    sizes = [size for size in (cut, experts - cut) if size]
    banks = [MLPExperts(num_experts=size, d_expert=width + number) for number, size in enumerate(sizes)]
    moe = build(tokens, experts=banks, router=RouterConfig(select=TopK(k=min(k, experts))))
    assert_is_brute_force(moe, tokens, seed=width)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(mask=st.integers(1, 12).flatmap(lambda t: st.lists(st.integers(0, 63), min_size=t, max_size=t)))
@pytest.mark.parametrize("engine", ON_CPU)
def test_tokens_without_experts_and_experts_without_tokens(engine: str, mask: list[int]) -> None:
    mask_TE = torch.tensor([[bool(row >> e & 1) for e in range(6)] for row in mask])
    moe = build(experts=[MLPExperts(num_experts=size, d_expert=4, engine=engine) for size in (4, 2)])
    x_TD = torch.randn(len(mask), D, requires_grad=True)
    weights_TE = torch.randn(mask_TE.shape, requires_grad=True)
    carry_T = torch.randn(len(mask), requires_grad=True)
    y_TD = moe.experts(x_TD, Route.from_mask(mask_TE, weights_TE, carry_T))
    expected_TD = brute_force.mix_experts(moe, x_TD, weights_TE * mask_TE) + carry_T[:, None] * x_TD
    assert_same(y_TD, expected_TD, [x_TD, weights_TE, carry_T, *moe.banks.parameters()])


@pytest.mark.parametrize("group", ["sequence", "position"])
@pytest.mark.parametrize("slots", [1, 3])
def test_soft_slots_are_a_loop_over_groups(slots: int, group: Any) -> None:
    router = RouterConfig(select=Soft(slots=slots, group=group), score=Logits(), losses=())
    moe, x_BLD = build(router=router), torch.randn(2, 5, D, requires_grad=True)
    y_BLD, _ = moe(x_BLD, Context(batch_size=2))
    groups = [x_BLD[b] for b in range(2)] if group == "sequence" else [x_BLD[:, p] for p in range(5)]
    outputs = []
    for rows in groups:
        logits = torch.exp(rows @ moe.router.gate.weight.T)
        dispatch = logits / logits.sum(0)
        mix = dispatch if group == "position" else logits / logits.sum(1, keepdim=True)
        y = torch.zeros_like(rows)
        for expert in range(6):
            for column in range(expert * slots, (expert + 1) * slots):
                slot_input = (dispatch[:, column, None] * rows).sum(0, keepdim=True)
                y = y + mix[:, column, None] * BANKS["mlp"](moe.banks[0], slot_input)[expert]
        outputs.append(y)
    expected = torch.stack(outputs, 0 if group == "sequence" else 1)
    assert_same(y_BLD, expected, [x_BLD, *moe.parameters()])


def test_weights_over_experts_that_compute_something() -> None:
    weigh = Scores(normalize_weights=True, over="computed")
    experts = [MLPExperts(num_experts=3, d_expert=4), ZeroExperts(num_experts=3)]
    moe, x_TD = build(experts=experts, router=RouterConfig(select=TopK(k=3), weigh=weigh)), torch.randn(50, D)
    y_TD, routing = moe(x_TD)
    probs_TE = (x_TD @ moe.router.gate.weight.T).softmax(1)
    weights_TE = torch.zeros_like(probs_TE)
    for token, row in enumerate(probs_TE):
        real = [e for e in brute_force.ranked(row.tolist())[:3] if e < 3]
        for e in real:
            weights_TE[token, e] = row[e] / sum(row[other] for other in real)
    torch.testing.assert_close(y_TD, brute_force.mix_experts(moe, x_TD, weights_TE))
    assert 0 < (weights_TE > 0).sum(1).double().mean() < 3 and routing.choices.sum() == 150


def test_leading_dimensions_are_kept() -> None:
    moe, x = build(), torch.randn(2, 3, 5, D)
    y, routing = moe(x)
    assert y.shape == x.shape and routing.route.num_tokens == 30
    torch.testing.assert_close(y.flatten(0, 2), moe(x.flatten(0, 2))[0])


def test_forward_writes_nothing_to_the_layer() -> None:
    router = {"controller": {"type": "expert_bias"}, "losses": ["load_balancing_loss", "z_loss"]}
    moe = build(router=router, shared={"d_expert": 4, "mix": "gated"})
    state = {name: value.clone() for name, value in moe.state_dict().items()}
    before = {name: dict(module.__dict__) for name, module in moe.named_modules()}
    y, routing = moe(torch.randn(5, D, requires_grad=True))
    (y.sum() + sum(moe.router.balance_losses(routing, 1).values())).backward()
    assert before == {name: module.__dict__ for name, module in moe.named_modules()}
    assert state.keys() == moe.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in moe.state_dict().items())


@pytest.mark.parametrize("experts", banks(), ids=names)
def test_a_layer_runs_under_autocast_and_in_bf16(experts: list[Any]) -> None:
    moe, x = build(experts=experts, shared={"d_expert": 4}), torch.randn(6, D)
    exact, _ = moe(x)
    with torch.autocast("cpu", torch.bfloat16):
        mixed, _ = moe(x)
    torch.testing.assert_close(mixed.float(), exact, rtol=0.05, atol=0.05)
    half, _ = moe.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), exact, rtol=0.1, atol=0.1)


def test_one_bank_is_written_without_a_list() -> None:
    bank = {"num_experts": 4, "d_expert": 8}
    config = MoEConfig.model_validate({"experts": bank})
    assert config == MoEConfig.model_validate({"experts": [bank]}) and config.num_experts == 4
    assert isinstance(config.model_dump()["experts"], dict)
    two = MoEConfig.model_validate({"experts": [bank, bank]})
    assert two.num_experts == 8 and MoEConfig.model_validate(two.model_dump()) == two


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": []}, "experts is empty"),
        ({"experts": {"type": "nested", "widths": []}}, "at least 1 item"),
        ({"experts": {"type": "values", "num_experts": 6, "tables": 4}}, "not divisible by tables = 4"),
        ({"experts": {"type": "nested", "widths": [0]}}, "greater than or equal to 1"),
        ({"router": {"losses": ["z_loss", "z_loss"]}}, "losses: each type once"),
        ({"router": {"losses": [], "controller": "sparsity"}}, "moves the weight of the losses, and losses is empty"),
        ({"router": {"losses": [{"type": "load_balancing_loss", "prices": "cost"}]}}, "all experts cost the same"),
        ({"router": {"losses": [{"type": "load_balancing_loss", "free": "together"}]}}, "no expert is without work"),
        (
            {"router": {"losses": [{"type": "load_balancing_loss", "over": "sequence", "free": "together"}]}},
            "over: sequence does not know free: together",
        ),
        ({"router": {"weigh": {"normalize_weights": True, "over": "computed"}}}, "no expert is without work"),
        (
            {
                "router": {"losses": ["budget_loss"]},
                "shared": {"d_expert": 4, "mix": "coefficient"},
                "shortcut": True,
            },
            "with shortcut it reads another",
        ),
        ({"router": {"losses": ["budget_loss"]}}, "budget_loss needs shared: with mix: interpolated or coeff"),
        ({"router": {"losses": ["budget_loss"]}, "shared": {"d_expert": 4, "mix": "gated"}}, "budget_loss needs"),
        ({"router": {"gate": "hash", "losses": []}}, "gate: hash names one expert"),
        ({"router": {"gate": "hash", "losses": [], "select": {"k": 1}, "score": "logits"}}, "gate: hash names one"),
        ({"router": {"select": {"type": "tests.moe.test_layer:NoSelector"}}}, "does not inherit from"),
        ({"router": {"select": {"type": "top_k", "k": 7}}}, "k = 7 is more than num_experts = 6"),
        ({"router": {"select": {"type": "top_k", "num_groups": 4}}}, "not divisible by num_groups = 4"),
        ({"router": {"select": {"type": "top_k", "num_groups": 2, "top_groups": 3}}}, "more than num_groups=2"),
        ({"router": {"select": {"type": "top_k", "k": 4, "num_groups": 2}}}, "more than the 3 experts"),
    ],
)
def test_impossible_layers_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        MoEConfig.model_validate({"experts": {"num_experts": 6, "d_expert": 4}} | changes)


def test_merged_biases_are_those_of_the_merged_expert() -> None:
    bank = build(experts=[MLPExperts(num_experts=3, d_expert=4, bias=True, clamp=Clamp())]).banks[0]
    x_TD, group_T = torch.randn(8, D), torch.tensor([0, 1, 0, 1, 1, 0, 0, 1])
    merged = bank(x_TD, MergedRoute(torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]), group_T))
    routed = bank(x_TD, Route.from_top_k(torch.tensor([2, 0])[group_T][:, None], torch.ones(8, 1), 3))
    torch.testing.assert_close(merged, routed)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"clamp": {}, "activation": "gelu"}, "clamp limits the gate of activation: swiglu, not gelu"),
        ({"clamp": {"limit": 0.0}}, "greater than 0"),
        ({"bias": True, "engine": "grouped"}, "engine: grouped knows neither bias nor clamp"),
        ({"clamp": {}, "engine": "streaming"}, "engine: streaming knows neither bias nor clamp"),
    ],
    ids=str,
)
def test_experts_that_no_engine_computes_are_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        MLPExperts.model_validate({"d_expert": 4, **changes})


def test_settings_of_choice_and_weight_that_do_nothing_are_refused() -> None:
    with pytest.raises(ValidationError, match="group_rank does nothing where a token may use all groups"):
        TopK(k=2, group_rank="best")
    with pytest.raises(ValidationError, match="min_total does nothing without normalize_weights"):
        Scores(min_total=0.1)
