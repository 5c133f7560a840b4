"""Capacity: exactly the edges that a loop keeps, for each way of ranking, and nothing dropped unless asked."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moeforge.moe import Context, Route, Router, RouterConfig
from moeforge.moe.capacity import Capacity, Drop, Limit, keep_edges
from moeforge.moe.select import TopK
from tests.moe.brute_force import members

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


@given(tokens=st.integers(1, 30), factor=st.sampled_from([0.3, 0.5, 1.0, 1.25, 4.0]), seed=st.integers(0, 99))
@pytest.mark.parametrize("keep", KEYS)
def test_an_expert_keeps_what_a_loop_keeps(keep: Any, tokens: int, factor: float, seed: int) -> None:
    route = random_route(tokens, seed)
    limited = Capacity(capacity_factor=factor, keep=keep)(route, TRAINING)
    expected = kept_by_loop(route, math.ceil(factor * 2 * tokens / 4), KEYS[keep])
    assert {edge[:2] for edge in edges(limited)} == expected
    assert edges(limited) == [edge for edge in edges(route) if edge[:2] in expected], "order and weights are kept"
    assert limited.counts.tolist() == [sum(e == expert for e, _ in expected) for expert in range(4)]


def test_by_lot_keeps_as_many_and_others_each_time() -> None:
    route = random_route(200, seed=1)
    first, second = (Capacity(capacity_factor=0.5, keep="random")(route, TRAINING) for _ in range(2))
    assert first.counts.tolist() == second.counts.tolist() == [50] * 4
    assert edges(first) != edges(second)


def test_room_outside_training_may_differ_and_enough_room_drops_nothing() -> None:
    route, limit = random_route(40, seed=2), Capacity(capacity_factor=0.5, eval_capacity_factor=4.0)
    assert max(limit(route, TRAINING).counts.tolist()) == 10
    assert edges(limit(route, Context())) == edges(route)
    assert max(limit.replace(eval_capacity_factor=None)(route, Context()).counts.tolist()) == 10


@pytest.mark.parametrize("what", ["edge", "token"])
def test_drops_by_lot_at_the_rate_and_only_while_training(what: Any) -> None:
    route, limit = random_route(5000, seed=3), Drop(rate=0.2, what=what)
    assert limit(route, Context()) is route
    left = limit(route, TRAINING)
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


def test_gradients_reach_the_weights_that_stay_and_no_others() -> None:
    route = random_route(10, seed=4)
    weight_N = route.weight.clone().requires_grad_()
    keep_N = torch.arange(20) % 3 == 0
    keep_edges(replace(route, weight=weight_N), keep_N).weight.sum().backward()
    assert torch.equal(weight_N.grad, keep_N.float())


def test_parts_that_compare_tokens_say_so() -> None:
    assert {member for member in members(Limit) if member.leaks} == {Capacity}
    assert RouterConfig(capacity=(Capacity(),)).leaks and not RouterConfig(capacity=(Drop(),)).leaks
