"""Chosen experts that are vectors (arXiv:2503.00634): against a loop over tokens, at the start, in bad company."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from moeforge.config import build
from moeforge.models import ModelConfig, measure
from moeforge.moe import MoE, MoEConfig
from tests.moe import brute_force

D, E = 6, 7
ROUTERS: dict[str, dict[str, Any]] = {
    "weights of all": {},
    "softmax of the chosen": {"score": "logits", "weigh": "softmax"},
    "normalised sigmoid": {"score": "sigmoid", "weigh": {"normalize_weights": True, "weight_scale": 2.0}},
    "ones": {"weigh": "ones"},
}
TWO_BANKS = [{"num_experts": 3, "d_expert": 4}, {"num_experts": 4, "d_expert": 5, "activation": "relu"}]


def layer(k: int, main: int | None, experts: Any = None, **router: Any) -> MoE:
    """Without ``main``, all k run."""
    torch.manual_seed(2)
    select = {"type": "auxiliary", "k": k, "main": main} if main else {"k": k}
    tree = {"experts": experts or {"num_experts": E, "d_expert": 4}, "router": {"select": select, **router}}
    return MoE(build(MoEConfig, tree), D).double()


@pytest.mark.parametrize("experts", [None, TWO_BANKS], ids=["one bank", "two banks"])
@pytest.mark.parametrize(("k", "main"), [(2, 1), (4, 2), (5, 1), (7, 6)])
@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
def test_it_is_a_loop_over_tokens(router: dict[str, Any], k: int, main: int, experts: Any) -> None:
    moe = layer(k, main, experts, **router)
    torch.nn.init.normal_(moe.router.auxiliary)
    x_TD, towards_TD = torch.randn(11, D, dtype=torch.double, requires_grad=True), torch.randn(11, D).double()
    y_TD, routing = moe(x_TD)
    expected_TD, inputs = brute_force.layer(moe, x_TD), [x_TD, *moe.parameters()]
    torch.testing.assert_close(y_TD, expected_TD)
    assert len(routing.route.token) == 11 * main and routing.dropped == 0, "only main experts run"
    for one, other in zip(
        *(torch.autograd.grad((y * towards_TD).sum(), inputs) for y in (y_TD, expected_TD)), strict=True
    ):
        torch.testing.assert_close(one, other)
    assert torch.autograd.grad((moe(x_TD)[0] * towards_TD).sum(), moe.router.auxiliary)[0].abs().max() > 1e-3


@pytest.mark.parametrize(("k", "main"), [(3, 1), (4, 2)])
def test_it_starts_as_the_main_experts_alone(k: int, main: int) -> None:
    moe, fewer = layer(k, main), layer(main, None)
    fewer.load_state_dict({name: value for name, value in moe.state_dict().items() if name != "router.auxiliary"})
    x_TD = torch.randn(20, D).double()
    assert torch.equal(moe(x_TD)[0], fewer(x_TD)[0]) and not moe.router.auxiliary.any()
    kept = layer(k, main, score="logits", weigh="softmax")(x_TD)[1]
    best_TK = kept.logits.topk(k).values.softmax(1)[:, :main]
    torch.testing.assert_close(kept.route.weight.sum(), best_TK.sum(), msg="weights are those among all k")


def test_weights_that_are_zero_leave_rows_as_they_are() -> None:
    moe = layer(3, 1, score="relu", losses=[])
    torch.nn.init.normal_(moe.router.auxiliary)
    moe.router.gate.weight.data.zero_()[2, 0] = 1  # where x is above zero one expert has a score, and no other
    x_TD = torch.randn(9, D).double().requires_grad_()
    y_TD, routing = moe(x_TD)
    assert not routing.route.auxiliary.any()
    y_TD.sum().backward()
    assert y_TD.any() and all(p.grad.isfinite().all() for p in [x_TD, *moe.parameters()])


def test_it_costs_what_the_main_experts_do_and_a_vector_for_each_of_the_others() -> None:
    def size(**select: Any) -> Any:
        moe = {"experts": {"num_experts": E, "d_expert": 5}, "router": {"select": select}}
        shape = {"vocab_size": 11, "d_model": D, "num_layers": 2, "num_heads": 1, "moe": moe}
        return measure(build(ModelConfig, shape))

    vectors, fewer, whole = size(type="auxiliary", k=5, main=2), size(k=2), size(k=5)
    assert vectors.total.all == whole.total.all + 2 * E * D
    assert vectors.active.all == fewer.active.all + 2 * 3 * D == whole.active.all + 2 * 3 * (D - 3 * D * 5)
    assert vectors.flops_per_token == fewer.flops_per_token


@pytest.mark.parametrize(
    ("router", "message"),
    [
        ({"select": {"type": "auxiliary", "main": 2}}, "main = 2 of k = 2 leaves none auxiliary; lower it"),
        ({"select": {"type": "auxiliary", "main": 0}}, "greater than or equal to 1"),
        ({"select": {"type": "auxiliary", "k": 8}}, "select.k = 8 is more than num_experts = 7"),
        ({"select": {"type": "top_k", "main": 1}}, "main"),
        (
            {"select": "auxiliary", "score": "logits"},
            "takes shares of weights, and weigh: scores here",
        ),
        ({"select": {"type": "auxiliary", "k": 4, "main": 2}, "weigh": "complement"}, "takes shares of weights"),
        ({"select": "auxiliary", "capacity": [{"type": "capacity", "overflow": "next"}]}, "overflow: next knows no"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(router: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        MoEConfig.model_validate({"experts": {"num_experts": E, "d_expert": 4}, "router": router})


def test_heads_are_no_vectors() -> None:
    shape = {"vocab_size": 11, "d_model": 8, "num_layers": 1, "num_heads": 2}
    heads = {"type": "routed", "num_experts": 4, "router": {"select": "auxiliary"}}
    with pytest.raises(ValidationError, match="no vectors for heads that do not run: not select: auxiliary"):
        ModelConfig.model_validate(shape | {"attention": heads})


def test_an_expert_that_overflows_is_left_out_and_rows_are_still_multiplied() -> None:
    moe = layer(3, 1, capacity=[{"type": "capacity", "capacity_factor": 0.5}])
    torch.nn.init.normal_(moe.router.auxiliary)
    x_TD = torch.randn(30, D).double()
    y_TD, routing = moe(x_TD)
    kept = routing.route.token
    assert 0 < routing.dropped == 30 - len(kept)
    torch.testing.assert_close(y_TD[kept], brute_force.layer(moe, x_TD)[kept])


def test_the_shared_branch_reads_rows_as_they_are() -> None:
    torch.manual_seed(3)
    tree = {"experts": {"num_experts": E, "d_expert": 4}, "router": {"select": "auxiliary"}, "shared": {"d_expert": 3}}
    moe, x_TD = MoE(build(MoEConfig, tree), D), torch.randn(9, D)
    torch.nn.init.normal_(moe.router.auxiliary)
    y_TD, branch_TD = moe(x_TD)[0], moe.shared.mlp(x_TD)
    moe.shared = None
    torch.testing.assert_close(y_TD, moe(x_TD)[0] + branch_TD)
