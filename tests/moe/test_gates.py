"""Every gate against loops over tokens and experts, and what each one promises."""

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from moeforge.moe import Context, MLPExperts, MoE, MoEConfig, Router, RouterConfig
from moeforge.moe.bank import LowRankExperts
from moeforge.moe.context import hashed
from moeforge.moe.gates import (
    MLP,
    ActivationNorm,
    Competition,
    Cosine,
    Distance,
    Gate,
    Hash,
    Linear,
    Lookup,
    Paths,
    Query,
    Recurrent,
    SmoothStep,
    Spline,
    TwoLevel,
)
from moeforge.moe.select import TopK
from tests.moe.brute_force import members

D, E, T = 8, 6, 5
X_TD = torch.randn(T, D, generator=torch.Generator().manual_seed(3))
EMBEDDED_TD = torch.randn(T, D, generator=torch.Generator().manual_seed(4))
BANKS = (LowRankExperts(num_experts=2, d_expert=4, rank=3), LowRankExperts(num_experts=4, d_expert=5, rank=2))
CONTEXT = Context(
    token_ids=torch.tensor([3, 1, 3, 900, 7]),
    embedded=EMBEDDED_TD,
    ids={"task": torch.tensor([0, 1, 1, 0, 2])},
    banks=tuple(bank.build(D) for bank in BANKS),
)


def dot(a: Tensor, b: Tensor) -> Tensor:
    return sum((p * q for p, q in zip(a, b, strict=True)), torch.zeros(()))


def cosine(gate: Any, x: Tensor, e: int, t: int) -> Tensor:
    rows = x if gate.project is None else torch.stack([dot(row, x) for row in gate.project])
    w = gate.weight[e]
    value = dot(rows, w) / (dot(rows, rows).sqrt() * dot(w, w).sqrt())
    return (value - (0 if gate.bar is None else gate.bar[e])) * torch.exp(gate.scale)


def mlp(gate: Any, x: Tensor, e: int, t: int) -> Tensor:
    hidden = [dot(row, x) for row in gate.up]
    return dot(torch.stack([h / (1 + torch.exp(-h)) for h in hidden]), gate.weight[e])


def two_level(gate: Any, x: Tensor, e: int, t: int) -> Tensor:
    def log_share(rows: Tensor, which: int) -> Tensor:
        values = torch.stack([dot(row, x) for row in rows])
        return torch.log(torch.exp(values[which]) / torch.exp(values).sum())

    return log_share(gate.group, e // len(gate.place)) + log_share(gate.place, e % len(gate.place))


def recurrent(gate: Any, x: Tensor, e: int, t: int) -> Tensor:
    cell, rows = gate.cell, torch.stack([dot(row, x) for row in gate.project])
    ours = (cell.weight_ih @ rows + cell.bias_ih).chunk(3)
    below = cell.bias_hh.chunk(3)  # the first layer's state is zero
    update = torch.sigmoid(ours[1] + below[1])
    return dot((1 - update) * torch.tanh(ours[2] + torch.sigmoid(ours[0] + below[0]) * below[2]), gate.weight[e])


def lookup(gate: Any, x: Tensor, e: int, t: int) -> Tensor:
    ids = CONTEXT.token_ids if gate.by == "token" else CONTEXT.ids["task"]
    return gate.table[ids[t], e] + (0 if gate.weight is None else dot(x, gate.weight[e]))


def linear(gate: Any, x: Tensor, e: int, t: int) -> Tensor:
    token = EMBEDDED_TD[t]
    logit = dot(token / (dot(token, token) / D).sqrt() if gate.of_token else x, gate.weight[e])
    return logit if gate.bias is None else logit + gate.bias[e]


def bump(u: Tensor, degree: int) -> Tensor:
    """The spline of this degree whose pieces start at 0, by its definition in powers."""
    terms = [(-1) ** i * math.comb(degree + 1, i) * torch.relu(u - i) ** degree for i in range(degree + 2)]
    return sum(terms) / math.factorial(degree)


def spline(gate: Any, x: Tensor, e: int, t: int) -> Tensor:
    config, count = gate.config, gate.config.intervals + gate.config.degree

    def layer(inputs: list[Tensor], weight: Tensor, activate: Any) -> Tensor:
        features = []
        for value in inputs:
            place = (value + config.reach) * config.intervals / (2 * config.reach) + config.degree
            features += [activate(value), *(bump(place - j, config.degree) for j in range(count))]
        return torch.stack([dot(row, torch.stack(features)) for row in weight])

    hidden = layer(list(layer(list(x), gate.inner, torch.nn.functional.elu)), gate.outer, torch.nn.functional.silu)
    halves = [(dot(gate.gated[i], hidden), dot(gate.gated[E + i], hidden)) for i in range(E)]
    raw = [dot(row, x) + value * torch.sigmoid(by) for row, (value, by) in zip(gate.skip, halves, strict=True)]
    mean = sum(raw) / E
    variance = sum((value - mean) ** 2 for value in raw) / E
    return (raw[e] - mean) / torch.sqrt(variance + 1e-5) * gate.norm.weight[e] + gate.norm.bias[e]


def activation_norm(gate: Any, x: Tensor, e: int, t: int) -> Tensor:
    first = [expert for bank in CONTEXT.banks for expert in bank.gate_in][e]
    return torch.sqrt(sum(dot(row, x) ** 2 for row in first))


def paths(gate: Any, x: Tensor, e: int, t: int) -> Tensor:
    size = E // len(gate.parts)
    part, shares = gate.parts[e // size], torch.stack([torch.exp(dot(row, x)) for row in gate.share])
    if hasattr(part, "centre"):
        inside = torch.stack([torch.exp(-dot(x - c, x - c) / math.sqrt(D)) for c in part.centre])
    else:
        inside = torch.stack([torch.exp(dot(x, w)) for w in part.weight])
    return torch.log(shares[e // size] / shares.sum() * inside[e % size] / inside.sum())


def query(gate: Any, x: Tensor, e: int, t: int) -> Tensor:
    size = E // gate.config.queries
    group, width = e // size, gate.config.d_query
    rows = torch.stack([dot(row, x) for row in gate.query[group * width : (group + 1) * width]])
    if gate.config.norm:
        rows = rows / (dot(rows, rows) / width).sqrt()
    return dot(rows, gate.keys[group % len(gate.keys), e % size])


LOGITS: dict[str, Any] = {
    "spline": spline,
    "activation_norm": activation_norm,
    "competition": lambda gate, x, e, t: dot(x, gate.weight[e]),  # as outside training
    "paths": paths,
    "linear": linear,
    "cosine": cosine,
    "mlp": mlp,
    "two_level": two_level,
    "recurrent": recurrent,
    "distance": lambda gate, x, e, t: -dot(x - gate.centre[e], x - gate.centre[e]) / math.sqrt(D),
    "lookup": lookup,
    "query": query,
}
EXAMPLES: dict[type, list[Any]] = {
    Linear: [
        *(Linear(), Linear(bias=True), Linear(orthogonal=True)),
        *(Linear(frozen=True), Linear(previous=True), Linear(reads="token")),
    ],
    Cosine: [Cosine(), Cosine(d_route=3, thresholds=True)],
    MLP: [MLP(width=7)],
    TwoLevel: [TwoLevel(num_groups=2), TwoLevel(num_groups=3)],
    Recurrent: [Recurrent(d_route=4)],
    Distance: [Distance(), Distance(commitment=0.25)],
    Spline: [Spline(width=4), Spline(width=3, intervals=2, degree=1, reach=1.0)],
    SmoothStep: [],  # needs a power of two of experts: see below
    ActivationNorm: [ActivationNorm()],
    Competition: [Competition(share=1.0)],
    Paths: [Paths(parts=(Linear(), Distance(commitment=0.25)))],
    Lookup: [Lookup(num_ids=3), Lookup(num_ids=3, rows=True), Lookup(by="token", num_ids=901, rows=True)],
    Query: [Query(queries=3, d_query=4), Query(queries=6, d_query=5, key_sets=2, norm=False), Query(queries=1)],
    Hash: [],  # has no logits to compare: see below
}


@pytest.mark.parametrize("config", [example for member in members(Gate) for example in EXAMPLES[member]], ids=repr)
def test_every_gate_is_its_loop(config: Any) -> None:
    torch.manual_seed(1)
    gate = config.build(D, E)
    if getattr(gate, "bias", None) is not None:
        torch.nn.init.normal_(gate.bias)
    logits_TE = gate(X_TD, CONTEXT).logits
    logits = LOGITS[config.type]
    expected = torch.stack([logits(gate, x, e, t) for t, x in enumerate(X_TD) for e in range(E)]).view(T, E)
    torch.testing.assert_close(logits_TE, expected, rtol=1e-4, atol=1e-5)
    learned = [p for p in gate.parameters() if p.requires_grad]
    if not learned:
        assert getattr(config, "frozen", config.type == "activation_norm")
        return
    towards_TE = torch.randn(T, E)
    ours = torch.autograd.grad((logits_TE * towards_TE).sum(), learned, allow_unused=True, materialize_grads=True)
    theirs = torch.autograd.grad((expected * towards_TE).sum(), learned, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("config", [example for member in members(Gate) for example in EXAMPLES[member]], ids=repr)
def test_every_gate_decides_in_float32_in_a_bf16_model(config: Any) -> None:
    signal = config.build(D, E).bfloat16()(X_TD.bfloat16(), CONTEXT)
    assert {part.dtype for part in signal if part is not None} == {torch.float32}


def test_a_hash_sends_a_token_id_to_one_expert_whatever_surrounds_it() -> None:
    router = Router(RouterConfig(gate=Hash(), select=TopK(k=1), losses=()), D, E)
    ids_T = torch.arange(3000)
    route = router(torch.randn(3000, D), Context(token_ids=ids_T)).route
    assert torch.equal(route.weight, torch.ones(3000))
    assert route.counts.min() > 350, "a hash that leaves an expert without ids is none"
    expert_T = torch.empty(3000, dtype=torch.long)
    expert_T[route.token] = route.expert
    alone = router(torch.randn(1, D), Context(token_ids=torch.tensor([1234]))).route
    assert alone.expert.tolist() == [expert_T[1234].item()]


def test_common_ids_have_an_expert_each_and_others_share_the_rest() -> None:
    def experts(hashing: Hash) -> list[int]:
        return hashing.build(D, E)(torch.randn(3000, D), Context(token_ids=torch.arange(3000)))[0].argmax(1).tolist()

    plain, some = experts(Hash(seed=5)), experts(Hash(seed=5, common=4))
    assert plain == experts(Hash(seed=5, common=0)) == [int(hashed(torch.tensor(i), 5)) % E for i in range(3000)]
    assert some[:4] == [0, 1, 2, 3]
    assert some[4:] == [4 + int(hashed(torch.tensor(i), 5)) % (E - 4) for i in range(4, 3000)]


def test_a_frozen_gate_stays_and_its_experts_learn() -> None:
    router = RouterConfig(gate=Linear(frozen=True), losses=())
    layer = MoE(MoEConfig(experts=(MLPExperts(num_experts=E, d_expert=4),), router=router), D)
    layer(X_TD)[0].sum().backward()
    assert layer.router.gate.weight.grad is None
    assert layer.banks[0].down_proj.grad.abs().sum() > 0


def test_the_state_of_a_gate_reaches_the_next_layer() -> None:
    for config in (Recurrent(d_route=4), Linear(previous=True)):
        first, second = config.build(D, E), config.build(D, E)
        state = first(X_TD, CONTEXT).state
        with_state = second(X_TD, Context(router_state=state)).logits
        without = second(X_TD, Context()).logits
        assert not torch.allclose(with_state, without)
        changed = state.clone()
        changed[3] += 1  # another token's state: nothing else may move
        moved_T = (second(X_TD, Context(router_state=changed))[0] != with_state).any(1)
        assert moved_T.tolist() == [False, False, False, True, False]


def test_orthogonal_rows_and_the_weights_of_two_levels() -> None:
    weight = Linear(orthogonal=True).build(D, E).weight
    torch.testing.assert_close(weight @ weight.T, torch.eye(E), rtol=1e-5, atol=1e-5)
    assert sum(p.numel() for p in TwoLevel(num_groups=4).build(D, 32).parameters()) == D * (4 + 8)


def test_cosine_does_not_see_the_length_of_a_row() -> None:
    gate = Cosine().build(D, E)
    torch.testing.assert_close(gate(X_TD, CONTEXT)[0], gate(X_TD * 7, CONTEXT)[0])


@pytest.mark.parametrize(
    ("router", "message"),
    [
        ({"gate": {"type": "two_level", "num_groups": 4}}, "not divisible by gate.num_groups = 4"),
        (
            {"gate": "hash", "select": {"k": 1}},
            r"gate: hash learns nothing, .*; set losses: \[\]",
        ),
        ({"gate": {"type": "hash", "common": E}, "select": {"k": 1}, "losses": []}, "gate.common = 6 leaves none of"),
        ({"gate": {"type": "linear", "frozen": True}}, "gate: linear learns nothing"),
        ({"gate": {"type": "query", "queries": 4}}, "not divisible by gate.queries = 4"),
        ({"gate": {"type": "query", "queries": 3, "key_sets": 2}}, "not divisible by gate.key_sets = 2"),
        ({"score": {"type": "softmax", "num_groups": 4}}, "not divisible by score.num_groups = 4"),
    ],
)
def test_gates_that_cannot_work_are_refused(router: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        MoEConfig.model_validate({"experts": {"num_experts": E, "d_expert": 4}, "router": router})


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        (Hash(), "needs the token ids"),
        (Linear(reads="token"), "needs the tokens' embeddings"),
        (Lookup(num_ids=2, by="domain"), "needs domain ids in the context; it has none"),
    ],
)
def test_what_a_gate_misses_is_named(gate: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gate.build(D, E)(X_TD, Context())
