"""Capacity: exactly the edges that a loop keeps, for each way of ranking, and nothing dropped unless asked."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from moeforge.moe import Context, MoEConfig, Route, Router, RouterConfig
from moeforge.moe.balance import ExpertBias
from moeforge.moe.capacity import Capacity, Drop, Limit, keep_edges, next_with_room
from moeforge.moe.select import TopK
from moeforge.moe.weigh import Scores
from tests.moe.brute_force import members, ranked

TRAINING = Context(training=True)
KEYS = {"first": lambda edge: edge[1], "heaviest": lambda edge: (-edge[2], edge[1])}


def edges(route: Route) -> list[tuple[int, int, float]]:
    """(expert, token, weight), in the route's order."""
    return list(zip(route.expert.tolist(), route.token.tolist(), route.weight.tolist(), strict=True))


def kept_by_loop(route: Route, room: int, key: Any) -> set[tuple[int, int]]:
    """What each expert keeps when its edges come in order of ``key``."""
    kept: set[tuple[int, int]] = set()
    for expert in range(route.num_experts):
        own = sorted((edge for edge in edges(route) if edge[0] == expert), key=key)
        kept |= {edge[:2] for edge in own[:room]}
    return kept


def random_route(tokens: int, seed: int, experts: int = 4, k: int = 2) -> Route:
    scores_TE = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(seed))
    ids_TK = scores_TE.topk(k).indices
    return Route.from_top_k(ids_TK, scores_TE.gather(1, ids_TK), experts)


def limited_by(limit: Any, route: Route, context: Context = TRAINING) -> Route:
    """The route after a limit that looks at nothing else."""
    return limit(route, torch.ones(route.num_tokens, route.num_experts), None, context)


@given(tokens=st.integers(1, 30), factor=st.sampled_from([0.3, 0.5, 1.0, 1.25, 4.0]), seed=st.integers(0, 99))
@pytest.mark.parametrize("keep", KEYS)
def test_an_expert_keeps_what_a_loop_keeps(keep: Any, tokens: int, factor: float, seed: int) -> None:
    route = random_route(tokens, seed)
    limited = limited_by(Capacity(capacity_factor=factor, keep=keep), route)
    expected = kept_by_loop(route, math.ceil(factor * 2 * tokens / 4), KEYS[keep])
    assert {edge[:2] for edge in edges(limited)} == expected
    assert edges(limited) == [edge for edge in edges(route) if edge[:2] in expected], "order and weights are kept"
    assert limited.counts.tolist() == [sum(e == expert for e, _ in expected) for expert in range(4)]


@pytest.mark.parametrize("factor", [0.5, 1.1])
@pytest.mark.parametrize("keep", KEYS)
def test_kinds_of_experts_have_room_by_their_shares(keep: Any, factor: float) -> None:
    route, shares = random_route(40, seed=5), (0.5, 0.5, 1.0, 3.0)
    limited = limited_by(Capacity(capacity_factor=factor, keep=keep, shares=shares), route)
    expected = set()
    for expert, share in enumerate(shares):
        room = math.ceil(factor * 80 * share / 5)
        expected |= {edge for edge in kept_by_loop(route, room, KEYS[keep]) if edge[0] == expert}
    assert {edge[:2] for edge in edges(limited)} == expected
    even = Capacity(capacity_factor=factor, keep=keep)
    assert edges(limited_by(even.replace(shares=(2.0,) * 4), route)) == edges(limited_by(even, route))


def test_overflow_goes_where_the_shares_leave_room() -> None:
    router = RouterConfig(select=TopK(k=1), capacity=(Capacity(capacity_factor=1.0, overflow="next", shares=(1, 3)),))
    counts = Router(router, 8, 2)(torch.randn(40, 8), Context()).route.counts
    assert counts.tolist() == [10, 30]


@pytest.mark.parametrize("shares", [(1.0, 1.0), (1.0, 1.0, 0.0)])
def test_shares_are_one_for_each_expert_above_zero(shares: tuple[float, ...]) -> None:
    router = {"capacity": [{"type": "capacity", "shares": shares}]}
    with pytest.raises(ValidationError, match=r"capacity\.shares wants 3 numbers above zero"):
        MoEConfig.model_validate({"experts": {"num_experts": 3, "d_expert": 4}, "router": router})


def test_by_lot_keeps_as_many_and_others_each_time() -> None:
    route = random_route(200, seed=1)
    first, second = (limited_by(Capacity(capacity_factor=0.5, keep="random"), route) for _ in range(2))
    assert first.counts.tolist() == second.counts.tolist() == [50] * 4
    assert edges(first) != edges(second)


def test_room_outside_training_may_differ_and_enough_room_drops_nothing() -> None:
    route, limit = random_route(40, seed=2), Capacity(capacity_factor=0.5, eval_capacity_factor=4.0)
    assert max(limited_by(limit, route).counts.tolist()) == 10
    assert edges(limited_by(limit, route, Context())) == edges(route)
    assert max(limited_by(limit.replace(eval_capacity_factor=None), route, Context()).counts.tolist()) == 10


@pytest.mark.parametrize("what", ["edge", "token"])
def test_drops_by_lot_at_the_rate_and_only_while_training(what: Any) -> None:
    route, limit = random_route(5000, seed=3), Drop(rate=0.2, what=what)
    assert limited_by(limit, route, Context()) is route
    left = limited_by(limit, route)
    assert len(left.token) / len(route.token) == pytest.approx(0.8, abs=0.02)
    per_token = torch.bincount(left.token, minlength=5000).unique().tolist()
    assert per_token == ([0, 1, 2] if what == "edge" else [0, 2])


def test_balance_is_judged_before_anything_is_dropped() -> None:
    plain = Router(RouterConfig(select=TopK(k=2)), 8, 4)
    limited = Router(RouterConfig(select=TopK(k=2), capacity=(Capacity(capacity_factor=0.5),)), 8, 4)
    limited.load_state_dict(plain.state_dict())
    x_TD = torch.randn(40, 8)
    free, tight = plain(x_TD, Context()), limited(x_TD, Context())
    assert 0.4 * 80 <= tight.dropped == 80 - len(tight.route.token) <= 0.6 * 80 and free.dropped == 0
    assert torch.equal(free.choices, tight.choices) and int(tight.route.counts.max()) <= 10
    assert plain.balance_losses(free, 1) == limited.balance_losses(tight, 1)


def rerouted_by_loop(probs_TE: Tensor, wanted: list[list[int]], room: int) -> list[set[int]]:
    """Per token, its experts when in each round those without enough ask their next best, in order of position."""
    num_tokens, num_experts = probs_TE.shape
    taken: list[set[int]] = [set() for _ in range(num_tokens)]
    order = [
        [*(e for e in ranked(p) if e in own), *(e for e in ranked(p) if e not in own)]
        for p, own in zip(probs_TE.tolist(), wanted, strict=True)
    ]
    for rank in range(num_experts):
        for token in range(num_tokens):
            expert = order[token][rank]
            full = sum(expert in others for others in taken) >= room
            seen = expert in wanted[token] or float(probs_TE[token, expert]) > 0
            if len(taken[token]) < len(wanted[token]) and seen and not full:
                taken[token].add(expert)
    return taken


@given(tokens=st.integers(1, 20), factor=st.sampled_from([0.5, 1.0, 1.5]), k=st.integers(2, 3), seed=st.integers(0, 99))
@pytest.mark.parametrize("normalize", [False, True])
def test_overflow_goes_to_the_next_best_expert_with_room(
    normalize: bool, tokens: int, factor: float, k: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    limit, weigh = Capacity(capacity_factor=factor, overflow="next"), Scores(normalize_weights=normalize)
    parts = {"select": TopK(k=k), "weigh": weigh, "controller": ExpertBias(), "losses": ()}
    plain, limited = Router(RouterConfig(**parts), 6, 5), Router(RouterConfig(**parts, capacity=(limit,)), 6, 5)
    torch.nn.init.normal_(plain.gate.weight, generator=generator)
    plain.expert_bias.copy_(torch.randn(5, generator=generator) / 4)  # so that the chosen are not the most probable
    limited.load_state_dict(plain.state_dict())
    x_TD = torch.randn(tokens, 6, generator=generator)
    with torch.no_grad():
        free, tight = plain(x_TD, Context()), limited(x_TD, Context())
    wanted = [free.route.expert[free.route.token == t].tolist() for t in range(tokens)]
    taken = rerouted_by_loop(free.probs, wanted, math.ceil(factor * k * tokens / 5))
    expected = {}
    for token, experts in enumerate(taken):
        total = sum(float(free.probs[token, e]) for e in experts) if normalize else 1.0
        expected |= {(e, token): float(free.probs[token, e]) / total for e in experts}
    found = {(expert, token): weight for expert, token, weight in edges(tight.route)}
    assert found == pytest.approx(expected, rel=1e-5)
    assert torch.equal(tight.choices, free.choices), "balance is judged by what tokens wanted"
    assert tight.dropped == k * tokens - len(expected)


def test_rerouted_tokens_teach_the_router_and_nothing_is_lost_while_there_is_room() -> None:
    parts = {"select": TopK(k=1), "capacity": (Capacity(capacity_factor=1.0, overflow="next"),)}
    router, x_TD = Router(RouterConfig(**parts), 6, 4), torch.randn(40, 6)
    routing = router(x_TD, Context())
    assert routing.dropped == 0 and routing.route.counts.tolist() == [10] * 4 != routing.choices.tolist()
    moved_N = routing.probs.argmax(1)[routing.route.token] != routing.route.expert
    (gradient_TE,) = torch.autograd.grad(routing.route.weight[moved_N].sum(), routing.probs)
    expected_TE = torch.zeros(40, 4)
    expected_TE[routing.route.token[moved_N], routing.route.expert[moved_N]] = 1.0
    assert torch.equal(gradient_TE, expected_TE) and bool(moved_N.any())


def test_an_expert_that_a_token_cannot_see_is_never_asked() -> None:
    probs_TE = torch.tensor([[1.0, 0.0, 0.0]] * 4)
    route = Route.from_top_k(torch.zeros(4, 1, dtype=torch.long), torch.ones(4, 1), 3)
    assert next_with_room(route, probs_TE, room=2).nonzero().tolist() == [[0, 0], [1, 0]]


@pytest.mark.parametrize(
    ("router", "message"),
    [
        ({"capacity": [{"type": "capacity", "overflow": "next", "keep": "heaviest"}]}, "keep: heaviest would not be"),
        (
            {
                "select": "draw",
                "score": "logits",
                "weigh": "drawn",
                "capacity": [{"type": "capacity", "overflow": "next"}],
            },
            "weigh: drawn cannot weigh what a capacity with overflow: next chooses",
        ),
    ],
)
def test_reroutes_that_make_no_sense_are_refused(router: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        MoEConfig.model_validate({"experts": {"num_experts": 4, "d_expert": 4}, "router": router})


def test_gradients_reach_the_weights_that_stay_and_no_others() -> None:
    route = random_route(10, seed=4)
    weight_N = route.weight.clone().requires_grad_()
    keep_N = torch.arange(20) % 3 == 0
    keep_edges(replace(route, weight=weight_N), keep_N).weight.sum().backward()
    assert torch.equal(weight_N.grad, keep_N.float())


def test_parts_that_compare_tokens_say_so() -> None:
    assert {member for member in members(Limit) if member.leaks} == {Capacity}
    assert RouterConfig(capacity=(Capacity(),)).leaks and not RouterConfig(capacity=(Drop(),)).leaks
