"""Route and SoftRoute against dense [T, E] matrices."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moeforge.moe import MLPExperts, Route, SoftRoute
from tests.kernels.engines import ON_CPU
from tests.moe import brute_force


def dense(route: Route) -> Tensor:
    """[T, E]: the sum of the weights of the edges from t to e, walked edge by edge."""
    matrix_TE = torch.zeros(route.num_tokens, len(route.ends))
    low = 0
    for expert, high in enumerate(route.ends.tolist()):
        for edge in range(low, high):
            matrix_TE[int(route.token[edge]), expert] += route.weight[edge]
        low = high
    assert low == len(route.token)
    return matrix_TE


def assert_well_formed(route: Route) -> None:
    """Sorted by expert, tokens ascending inside each, types as promised, slots those of the tokens."""
    assert route.token.dtype == torch.int64 and route.ends.dtype == torch.int32
    edges = list(zip(route.expert.tolist(), route.token.tolist(), strict=True))
    assert edges == sorted(edges)
    assert route.counts.tolist() == [sum(e == expert for e, _ in edges) for expert in range(route.num_experts)]
    if route.slot is not None and route.top_k is not None:
        assert sorted(route.slot.tolist()) == list(range(route.num_tokens * route.top_k))
        assert torch.equal(route.slot // route.top_k, route.token)


shapes = st.tuples(st.integers(1, 9), st.integers(1, 6), st.integers(0, 10_000))


def some_mask(tokens: int, experts: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights_TE = torch.randn(tokens, experts, generator=generator)
    return torch.rand(tokens, experts, generator=generator) < 0.4, weights_TE


@given(shapes, st.integers(1, 6))
def test_from_top_k(shape: tuple[int, int, int], k: int) -> None:
    tokens, experts, seed = shape
    _, weights_TE = some_mask(tokens, experts, seed)
    ids_TK = weights_TE.argsort(1)[:, : min(k, experts)]
    route = Route.from_top_k(ids_TK, weights_TE.gather(1, ids_TK), experts)
    assert_well_formed(route)
    assert torch.equal(dense(route), torch.zeros_like(weights_TE).scatter(1, ids_TK, weights_TE.gather(1, ids_TK)))


@pytest.mark.parametrize("experts", [255, 256, 257, 300])
def test_from_top_k_with_many_experts(experts: int) -> None:
    ids_TK = torch.tensor([[experts - 1, 0], [experts - 2, experts - 1]])
    route = Route.from_top_k(ids_TK, torch.tensor([[1.0, 2.0], [3.0, 4.0]]), experts)
    assert_well_formed(route)
    assert torch.equal(dense(route)[:, -2:], torch.tensor([[0.0, 1.0], [3.0, 4.0]]))


@given(shapes)
def test_from_mask(shape: tuple[int, int, int]) -> None:
    mask_TE, weights_TE = some_mask(*shape)
    route = Route.from_mask(mask_TE, weights_TE)
    assert_well_formed(route)
    assert torch.equal(dense(route), weights_TE * mask_TE)


@given(shapes, st.integers(0, 5))
def test_from_expert_choice(shape: tuple[int, int, int], chosen: int) -> None:
    tokens, experts, seed = shape
    _, weights_TE = some_mask(tokens, experts, seed)
    token_EC = weights_TE.T.argsort(1, descending=True)[:, : min(chosen, tokens)]
    route = Route.from_expert_choice(token_EC, weights_TE.T.gather(1, token_EC), tokens)
    assert_well_formed(route)
    mask_TE = torch.zeros(experts, tokens).scatter(1, token_EC, 1.0).T
    assert torch.equal(dense(route), weights_TE * mask_TE)


@given(shapes)
def test_from_edges_in_any_order(shape: tuple[int, int, int]) -> None:
    mask_TE, weights_TE = some_mask(*shape)
    token_N, expert_N = mask_TE.nonzero(as_tuple=True)
    order_N = torch.randperm(len(token_N), generator=torch.Generator().manual_seed(shape[2]))
    token_N, expert_N = token_N[order_N], expert_N[order_N]
    route = Route.from_edges(token_N, expert_N, weights_TE[token_N, expert_N], shape[0], shape[1])
    assert_well_formed(route)
    assert torch.equal(dense(route), weights_TE * mask_TE)


@given(shapes)
def test_gather_and_combine(shape: tuple[int, int, int]) -> None:
    mask_TE, weights_TE = some_mask(*shape)
    x_TD, carry_T = torch.randn(shape[0], 3), torch.randn(shape[0])
    factor_E = torch.randn(shape[1])
    for carry in (None, carry_T):
        route = Route.from_mask(mask_TE, weights_TE, carry)
        y_TD = route.combine(route.gather(x_TD) * factor_E[route.expert, None], x_TD)
        expected_TD = ((weights_TE * mask_TE) @ factor_E)[:, None] * x_TD
        torch.testing.assert_close(y_TD, expected_TD if carry is None else expected_TD + carry[:, None] * x_TD)


def test_a_carry_needs_x() -> None:
    route = Route.from_mask(torch.ones(2, 1, dtype=torch.bool), torch.ones(2, 1), torch.ones(2))
    with pytest.raises(ValueError, match="combine needs x"):
        route.combine(torch.randn(2, 3))


@given(shapes, st.integers(0, 6), st.integers(0, 6))
def test_split_and_cat_are_inverse(shape: tuple[int, int, int], cut: int, other: int) -> None:
    mask_TE, weights_TE = some_mask(*shape)
    low, high = sorted((min(cut, shape[1]), min(other, shape[1])))
    route = Route.from_mask(mask_TE, weights_TE, torch.randn(shape[0]))
    parts = route.split([low, high - low, shape[1] - high])
    columns = (weights_TE * mask_TE).split([low, high - low, shape[1] - high], dim=1)
    for part, column in zip(parts, columns, strict=True):
        assert_well_formed(part)
        assert torch.equal(dense(part), column)
    assert [part.carry is not None for part in parts] == [True, False, False]
    joined = Route.cat(parts)
    assert_well_formed(joined)
    assert torch.equal(dense(joined), dense(route)) and joined.carry is not None and route.carry is not None
    assert torch.equal(joined.carry, route.carry)


def test_routes_that_do_not_fit_are_refused() -> None:
    route = Route.from_mask(torch.ones(2, 3, dtype=torch.bool), torch.ones(2, 3))
    with pytest.raises(ValueError, match="do not add up to 3 experts"):
        route.split([1, 1])
    longer = Route.from_mask(torch.ones(4, 3, dtype=torch.bool), torch.ones(4, 3))
    with pytest.raises(ValueError, match="different numbers of tokens"):
        Route.cat([route, longer])


def test_only_the_weight_is_differentiable() -> None:
    weights_TK = torch.rand(4, 2, requires_grad=True)
    route = Route.from_top_k(torch.tensor([[0, 1]] * 4), weights_TK, 2)
    route.combine(torch.ones(8, 1)).sum().backward()
    assert torch.equal(weights_TK.grad, torch.ones(4, 2))
    heavier = route.with_weight(route.weight * 2)
    assert torch.equal(dense(heavier.with_weight(heavier.weight.detach())), 2 * dense(route).detach())


def soft_route(tokens: int, slots_per_expert: list[int]) -> SoftRoute:
    logits_TS = torch.randn(tokens, sum(slots_per_expert))
    ends_E = torch.tensor(slots_per_expert).cumsum(0).to(torch.int32)
    return SoftRoute(logits_TS.softmax(0), logits_TS.softmax(1), ends_E)


@pytest.mark.parametrize("engine", ON_CPU)
@pytest.mark.parametrize("slots", [[2, 2, 2], [1, 0, 4]])
def test_a_soft_route_through_a_bank_is_einsum(slots: list[int], engine: str) -> None:
    bank, route = MLPExperts(num_experts=3, d_expert=4, engine=engine).build(8), soft_route(5, slots)
    x_TD = torch.randn(5, 8)
    inputs_SD = torch.einsum("ts,td->sd", route.dispatch, x_TD)
    expert_S = [expert for expert, count in enumerate(slots) for _ in range(count)]
    outputs_ESD = brute_force.BANKS["mlp"](bank, inputs_SD)
    rows_SD = torch.stack([outputs_ESD[expert][slot] for slot, expert in enumerate(expert_S)])
    torch.testing.assert_close(bank(x_TD, route), torch.einsum("ts,sd->td", route.mix, rows_SD), rtol=1e-4, atol=1e-5)
    assert route.counts.tolist() == slots and route.num_tokens == 5


def test_the_parts_of_a_soft_route_sum_to_it() -> None:
    route, x_TD = soft_route(5, [2, 2, 2]), torch.randn(5, 3)
    parts = route.split([1, 2])
    assert [part.counts.tolist() for part in parts] == [[2], [2, 2]]
    torch.testing.assert_close(torch.cat([part.gather(x_TD) for part in parts]), route.gather(x_TD))
    rows_SD = torch.randn(6, 3)
    summed = parts[0].combine(rows_SD[:2]) + parts[1].combine(rows_SD[2:])
    torch.testing.assert_close(summed, route.combine(rows_SD))
    with pytest.raises(ValueError, match="do not add up to 3 experts"):
        route.split([1, 1])
