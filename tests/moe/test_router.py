"""The router: float32 whatever surrounds it, ties by index, and parts that somebody else brings."""

from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

from moeforge.config import build, read_yaml, to_yaml
from moeforge.errors import UserError
from moeforge.moe import Context, MoE, MoEConfig, Route, Router, RouterConfig
from moeforge.moe.balance import ExpertBias
from moeforge.moe.select import Selection, Selector, TopK
from moeforge.moe.weigh import Scores
from tests.moe import brute_force

THRESHOLD = "tests.moe.test_router:Threshold"


class Threshold(Selector):
    """Somebody else's selector: every expert whose score is above a bar, none included."""

    type: Literal["tests.moe.test_router:Threshold"] = THRESHOLD
    bar: float = 0.3

    def check(self, num_experts: int) -> None:
        if num_experts < 2:
            raise ValueError("a threshold needs two experts")

    def mean_experts(self, num_experts: int) -> float:
        return num_experts / 2

    def __call__(self, scores_TE: Tensor, context: Context) -> Selection:
        return Selection(mask=scores_TE > self.bar)


def test_decisions_are_float32_under_autocast() -> None:
    router, x_TD = Router(RouterConfig(), 32, 8), torch.randn(50, 32)
    plain = router(x_TD, Context())
    with torch.autocast("cpu", torch.bfloat16):
        mixed = router(x_TD, Context())
    assert torch.equal(mixed.logits, plain.logits) and mixed.logits.dtype == torch.float32
    assert torch.equal(mixed.route.token, plain.route.token) and torch.equal(mixed.route.weight, plain.route.weight)


def test_decisions_are_float32_in_a_bf16_model() -> None:
    router, x_TD = Router(RouterConfig(), 32, 8).bfloat16(), torch.randn(50, 32).bfloat16()
    routing = router(x_TD, Context())
    exact_TE = x_TD.float() @ router.gate.weight.float().T
    assert routing.logits.dtype == routing.route.weight.dtype == torch.float32
    torch.testing.assert_close(routing.logits, exact_TE)


def test_the_selection_bias_stays_float32_in_a_bf16_model() -> None:
    router, uneven = Router(RouterConfig(controller=ExpertBias(rate=0.001)), 32, 4), torch.tensor([5, 1, 1, 1])
    router.step(uneven, 8)
    router.bfloat16()
    for _ in range(300):
        router.step(uneven, 8)  # bf16 would stop moving at 0.25, where its spacing is 0.002
    assert router.expert_bias is not None and router.expert_bias.dtype == torch.float32
    torch.testing.assert_close(router.expert_bias, 0.301 * torch.tensor([-1.0, 1, 1, 1]))


def test_a_router_with_a_bias_can_be_made_without_memory_and_filled_later() -> None:
    with torch.device("meta"):
        router = Router(RouterConfig(controller=ExpertBias()), 32, 4)
    filled = router.to_empty(device="cpu").expert_bias
    assert filled is not None and filled.device.type == "cpu"


@pytest.mark.parametrize("k", [1, 2, 3])
def test_ties_go_to_the_lower_expert(k: int) -> None:
    assert TopK(k=k)(torch.zeros(4, 40), Context()).ids.tolist() == [list(range(k))] * 4
    scores_TE = torch.tensor([[0.1, 0.3, 0.2, 0.3, 0.3]])
    assert TopK(k=k)(scores_TE, Context()).ids.tolist() == [[1, 3, 4][:k]]


def test_ties_between_groups_go_to_the_lower_group() -> None:
    select = TopK(k=2, num_groups=4, top_groups=1)
    assert select(torch.zeros(3, 8), Context()).ids.tolist() == [[0, 1]] * 3
    assert select(torch.tensor([[0.0, 1.0, 0.9, 0.8, 0.1, 0.1, 0.9, 0.8]]), Context()).ids.tolist() == [[2, 3]]


def test_normalising_scores_that_underflowed_gives_zeros() -> None:
    scores_TE = torch.zeros(2, 3, requires_grad=True)
    weights_TK = Scores(normalize_weights=True)(scores_TE, TopK(k=2)(scores_TE, Context()), Context())
    weights_TK.sum().backward()
    assert torch.equal(weights_TK, torch.zeros(2, 2)) and bool(scores_TE.grad.isfinite().all())


def test_normalised_weights_sum_to_one_whatever_the_sign() -> None:
    scores_TE = torch.tensor([[-1.0, -3.0, -9.0], [4.0, 1.0, 0.0]])
    weights_TK = Scores(normalize_weights=True)(scores_TE, TopK(k=2)(scores_TE, Context()), Context())
    torch.testing.assert_close(weights_TK, torch.tensor([[0.25, 0.75], [0.8, 0.2]]))


def test_a_mask_selection_takes_what_ids_take() -> None:
    values_TE, ids_TK = torch.randn(6, 5), TopK(k=2)(torch.randn(6, 5), Context()).ids
    by_ids = Selection(ids=ids_TK)
    by_mask = Selection(mask=torch.zeros(6, 5, dtype=torch.bool).scatter(1, ids_TK, True))
    for verb in ("take", "softmax"):
        expected_TE = torch.zeros(6, 5).scatter(1, ids_TK, getattr(by_ids, verb)(values_TE))
        torch.testing.assert_close(getattr(by_mask, verb)(values_TE), expected_TE)
    assert torch.equal(Selection(mask=torch.zeros(1, 5, dtype=torch.bool)).softmax(values_TE[:1]), torch.zeros(1, 5))


def test_somebody_elses_selector_runs_in_a_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "layer.yaml"
    path.write_text(
        f"experts: {{num_experts: 4, d_expert: 8}}\nrouter: {{select: {{type: '{THRESHOLD}', bar: 0.26}}}}\n"
    )
    config = build(MoEConfig, read_yaml(path))
    path.write_text(to_yaml(config))
    assert build(MoEConfig, read_yaml(path)) == config and config.router.select == Threshold(bar=0.26)
    monkeypatch.setitem(
        brute_force.SELECTS, THRESHOLD, lambda own, scores: [e for e, s in enumerate(scores) if s > 0.26]
    )
    moe, x_TD = MoE(config, 8), torch.randn(9, 8)
    y_TD, routing = moe(x_TD)
    assert isinstance(routing.route, Route) and 0 < len(routing.route.token) < 36 and routing.route.top_k is None
    torch.testing.assert_close(y_TD, brute_force.layer(moe, x_TD), rtol=1e-4, atol=1e-5)
    short = build(MoEConfig, {"experts": {"num_experts": 4, "d_expert": 8}, "router": {"select": THRESHOLD}})
    assert short.router.select == Threshold()


@pytest.mark.parametrize(
    ("select", "message"),
    [
        ("no_such_package:Select", r"router.select: cannot import 'no_such_package:Select': No module named"),
        (
            "tests.moe.test_router:Gone",
            "router.select: cannot import 'tests.moe.test_router:Gone': .* no attribute 'Gone'",
        ),
        (
            "tests.moe.test_router:THRESHOLD",
            "router.select: 'tests.moe.test_router:THRESHOLD' is not a moeforge.config.Config",
        ),
        ({"type": THRESHOLD, "bar": "high"}, "router.select.bar = 'high': input should be a valid number"),
        ({"type": THRESHOLD, "baz": 1}, "router.select.baz is not a setting. Did you mean 'bar'"),
    ],
)
def test_a_part_that_cannot_be_imported_is_a_clear_line(select: object, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build(MoEConfig, {"experts": {"num_experts": 4, "d_expert": 8}, "router": {"select": select}})
    assert len(str(caught.value).splitlines()) == 2
