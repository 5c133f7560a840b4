"""``torch.compile`` of the layer: one graph, forward and backward, with the same results as eager."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from moeforge.kernels.mlp import _gradients, _operator
from moeforge.moe import Context, MLPExperts, MoE, MoEConfig, Route, RouterConfig
from moeforge.moe.balance import ExpertBias
from moeforge.moe.bank import ConstantExperts, CopyExperts, FactorisedExperts, ZeroExperts
from moeforge.moe.capacity import Capacity
from moeforge.moe.gates import Recurrent
from moeforge.moe.scores import Logits, Relu, Sigmoid
from moeforge.moe.select import (
    Auxiliary,
    Confident,
    ExpertChoice,
    ProductKeys,
    Select,
    Soft,
    Threshold,
    TopK,
    TopP,
    TopPerGroup,
)
from moeforge.moe.weigh import Ones, Scores, SoftmaxChosen
from tests.kernels.engines import ON_CPU
from tests.moe.brute_force import members
from tests.moe.test_layer import EXAMPLES

D = 16
ROUTERS = [
    RouterConfig(select=TopK(num_groups=4, top_groups=2), weigh=Scores(normalize_weights=True, weight_scale=2.5)),
    RouterConfig(select=TopK(k=1), score=Sigmoid(), controller=ExpertBias()),
    RouterConfig(select=Auxiliary(k=4, main=2), score=Logits(), weigh=SoftmaxChosen()),
    RouterConfig(select=TopPerGroup(), score=Logits(), weigh=SoftmaxChosen()),
    RouterConfig(select=TopP(p=0.6, max_k=3), weigh=Scores(normalize_weights=True)),
    RouterConfig(select=TopP(p=0.5), capacity=(Capacity(capacity_factor=0.8, keep="heaviest"),)),
    RouterConfig(select=Confident(k=3, max_gap=0.1), weigh=Ones(average=True), gate=Recurrent()),
    RouterConfig(select=Threshold(), score=Relu(), weigh=SoftmaxChosen()),
    RouterConfig(capacity=(Capacity(capacity_factor=0.8),)),
    RouterConfig(select=ExpertChoice(), losses=()),
    RouterConfig(select=Soft(slots=2), score=Logits(), losses=()),
    RouterConfig(select=ProductKeys(k=3, heads=2), score=Logits(), weigh=SoftmaxChosen(), losses=()),
]
MIXED = [MLPExperts(num_experts=4, d_expert=8), ZeroExperts(), CopyExperts(), ConstantExperts(), MLPExperts(d_expert=4)]
MIXED += [FactorisedExperts(num_experts=2, d_expert=4, rank=3)]


def build(router: RouterConfig, experts: list[Any] | None = None) -> MoE:
    experts = experts or [MLPExperts(num_experts=9 if router.select.type == "product_keys" else 8, d_expert=8)]
    return MoE(MoEConfig(experts=tuple(experts), router=router, shared={"d_expert": 4, "mix": "gated"}), D)


def results(layer: Any, parameters: list[Tensor], x_TD: Tensor) -> list[Tensor]:
    """Output, counts, and gradients of x and all parameters; of an unused parameter, zeros."""
    y_TD, routing = layer(x_TD)
    inputs = [x_TD, *parameters]
    towards_TD = torch.linspace(-1, 1, y_TD.numel()).view_as(y_TD)
    gradients = torch.autograd.grad((y_TD * towards_TD).sum(), inputs, allow_unused=True, materialize_grads=True)
    return [y_TD, routing.choices, routing.route.counts, *gradients]


def assert_one_graph(moe: MoE, tokens: tuple[int, ...] = (12,), backend: str = "aot_eager") -> None:
    """Equal to eager, with one graph for the first number of tokens and one for all others."""
    torch._dynamo.reset()
    counter, tolerance = CompileCounterWithBackend(backend), 1e-5
    compiled, dtype = torch.compile(moe, fullgraph=True, backend=counter), next(moe.parameters()).dtype
    for count in tokens:
        x_TD = torch.randn(count, D, dtype=dtype, requires_grad=True)
        ours, theirs = (results(layer, list(moe.parameters()), x_TD) for layer in (compiled, moe))
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    assert counter.frame_count == min(2, len(tokens))


@pytest.mark.parametrize("router", ROUTERS, ids=lambda router: repr(router.model_dump(exclude_unset=True)))
def test_a_layer_is_one_graph(router: RouterConfig) -> None:
    assert_one_graph(build(router))


@pytest.mark.parametrize("select", [TopK(), TopP(p=0.5)], ids=repr)
def test_the_number_of_tokens_may_change(select: Any) -> None:
    assert_one_graph(build(RouterConfig(select=select)), tokens=(12, 7, 33))


@pytest.mark.parametrize("select", [TopK(), TopP(p=0.5)], ids=repr)
def test_banks_of_all_kinds_are_one_graph(select: Any) -> None:
    assert_one_graph(build(RouterConfig(select=select), MIXED))


@pytest.mark.parametrize("engine", [name for name in ON_CPU if name != "reference"])
@pytest.mark.parametrize("select", [TopK(), TopP(p=0.5)], ids=repr)
def test_engines_are_one_graph_in_bf16(select: Any, engine: Any) -> None:
    """Where segments are padded: see ``pad_segments``."""
    bank = MLPExperts(num_experts=8, d_expert=8, engine=engine)
    assert_one_graph(build(RouterConfig(select=select), [bank]).bfloat16(), tokens=(150,))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own
@pytest.mark.parametrize("select", [TopK(), TopP(p=0.5)], ids=repr)
def test_a_layer_is_one_graph_for_inductor(select: Any) -> None:
    # Its products of up to 16 rows on a CPU are other ones, with a graph of their own.
    assert_one_graph(build(RouterConfig(select=select)), (33, 21, 40), backend="inductor")


class Edges:
    """What a compiled region makes of a mask."""

    def __init__(self, most: int | None) -> None:
        self.most = most

    def __call__(self, mask_TE: Tensor, weights_TE: Tensor) -> Route:
        return Route.from_mask(mask_TE, weights_TE, most=self.most)


@pytest.mark.parametrize("most", [None, 3])
def test_padding_sorts_behind_all_experts_and_weighs_nothing(most: int | None) -> None:
    mask_TE = torch.zeros(20, 5, dtype=torch.bool).scatter(1, torch.rand(20, 5).argsort(1)[:, :3], True)
    mask_TE &= torch.rand(20, 5) < 0.6
    mask_TE[:, 2], mask_TE[3] = False, False
    weights_TE = torch.rand(20, 5) + 0.1
    exact = Route.from_mask(mask_TE, weights_TE)
    assert len(exact.token) == int(exact.ends[-1]) == int(mask_TE.sum()), "eager routes have no padding"
    padded = torch.compile(Edges(most), fullgraph=True, backend="aot_eager")(mask_TE, weights_TE)
    live = len(exact.token)
    assert len(padded.token) == 20 * (most or 5) > live and torch.equal(padded.ends, exact.ends)
    assert torch.equal(padded.token[:live], exact.token) and torch.equal(padded.weight[:live], exact.weight)
    assert not padded.weight[live:].any() and (padded.expert[live:] == 5).all()
    for one, other in zip(padded.split([2, 3]), exact.split([2, 3]), strict=True):
        assert torch.equal(one.token, other.token) and torch.equal(one.weight, other.weight)
    assert torch.equal(Route.cat([padded, padded]).token, Route.cat([exact, exact]).token)


@pytest.mark.parametrize("member", members(Select), ids=lambda member: member.__name__)
def test_no_selector_has_more_than_it_promises(member: type) -> None:
    for select in EXAMPLES[member]:
        for training in (False, True):
            selection = select(torch.randn(64, 6).softmax(1), Context(training=training))
            if selection.mask is not None:
                assert int(selection.mask.sum(1).max()) <= (selection.most or 6)


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("engine", [name for name in ON_CPU if name != "reference"])
def test_the_operators_are_well_made(engine: str, padding: int) -> None:
    """Schema, shapes for tracing, autograd and dynamic sizes, with edges that belong to nobody and without."""
    ends = torch.tensor([4, 4, 9 - padding], dtype=torch.int32)
    weight_N = torch.cat([torch.rand(9 - padding), torch.zeros(padding)]).requires_grad_()
    matrices = [torch.randn(3, 16, 8, requires_grad=True), torch.randn(3, 8, 8, requires_grad=True)]
    x_TD = torch.randn(5, 8, requires_grad=True)
    inputs = (x_TD, weight_N, *matrices, torch.randint(5, (9,)), ends, None, 5, None, "swiglu", engine)
    torch.library.opcheck(_operator, inputs)
    y_TD, z_NH = (tensor.detach() for tensor in _operator(*inputs))
    plain = [tensor.detach() if isinstance(tensor, Tensor) else tensor for tensor in inputs]
    assert len(z_NH) == 9 - padding, "padding has no rows"
    torch.library.opcheck(_gradients, (y_TD, z_NH, *plain))
    assert not _gradients(y_TD, z_NH, *plain)[1][9 - padding :].any()
