"""Merged experts against a loop over groups that sums parameters one by one."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from moeforge.moe import Context, MergedRoute, MLPExperts, MoE, MoEConfig
from moeforge.moe.bank import CopyExperts
from moeforge.moe.merge import runs
from tests.kernels.engines import ON_CPU
from tests.models.test_decoder import MERGED, decoder
from tests.moe import brute_force
from tests.moe.test_layer import D, assert_same, build

E = 6
POSITIONS = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 0, 1, 2], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]])
"""Two rows of ten: documents of 5, 2 and 3 tokens, and one that fills its row."""
DOCUMENTS = [[0, 1, 2, 3, 4], [5, 6], [7, 8, 9], list(range(10, 20))]


def layer(select: Any, **router: Any) -> MoE:
    """Experts that differ much, so that it shows which are merged."""
    moe = build(router=MERGED | {"select": {"type": "merged"} | select} | router)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter)
    return moe


def context(positions: Tensor = POSITIONS, **ids: Tensor) -> Context:
    return Context(batch_size=len(positions), positions=positions.flatten(), ids=ids)


def merged_mlp(moe: MoE, rows_TD: Tensor, weights: dict[int, Tensor]) -> Tensor:
    """Rows through one MLP whose matrices are summed in a loop."""
    bank = moe.banks[0]
    up, down = torch.zeros_like(bank.gate_up_proj[0]), torch.zeros_like(bank.down_proj[0])
    for expert, weight in weights.items():
        up, down = up + weight * bank.gate_up_proj[expert], down + weight * bank.down_proj[expert]
    return brute_force.mlp(rows_TD, up, down, bank.config.activation)


def softmax_of_best(logits_E: Tensor, k: int) -> dict[int, Tensor]:
    best = brute_force.ranked(logits_E.tolist())[:k]
    total = sum(torch.exp(logits_E[e]) for e in best)
    return {e: torch.exp(logits_E[e]) / total for e in best}


def groups_of(over: str, segment: int | None) -> list[tuple[list[int], list[int]]]:
    """(tokens that get an expert, tokens that decide which), group by group."""
    if segment is None:
        return [(tokens, tokens) for tokens in DOCUMENTS]
    found = []
    for tokens in DOCUMENTS:
        pieces = [tokens[first : first + segment] for first in range(0, len(tokens), segment)]
        found += list(zip(pieces, [[], *pieces], strict=False))
    return found


@pytest.mark.parametrize("engine", ON_CPU)
@pytest.mark.parametrize("k", [None, 1, 2])
@pytest.mark.parametrize(("over", "segment"), [("document", None), ("segment_before", 2), ("segment_before", 3)])
def test_merged_experts_are_a_loop_over_groups(over: str, segment: int | None, k: int | None, engine: Any) -> None:
    moe = layer({"over": over, "segment": segment, "k": k})
    moe.banks[0].config = moe.banks[0].config.replace(engine=engine)
    x_TD = torch.randn(20, D, requires_grad=True)
    expected = torch.zeros(20, D)
    for tokens, deciding in groups_of(over, segment):
        mean_D = sum(x_TD[t] for t in deciding) / len(deciding) if deciding else torch.zeros(D)
        weights = softmax_of_best(mean_D @ moe.router.gate.weight.T, k or E)
        expected = expected.index_copy(0, torch.tensor(tokens), merged_mlp(moe, x_TD[tokens], weights))
    y_TD, routing = moe(x_TD, context())
    assert_same(y_TD, expected, [x_TD, *moe.parameters()], rtol=1e-3, atol=1e-3)
    assert int(routing.choices.sum()) == 20 * (k or E)


def test_tokens_of_one_id_share_an_expert_whoever_stands_beside_them() -> None:
    gate = {"type": "lookup", "by": "domain", "num_ids": 3}
    moe, x_TD = layer({"over": "equal_scores", "k": 2}, gate=gate), torch.randn(20, D, requires_grad=True)
    domain_T = torch.tensor([2, 0] * 10)
    expected = torch.zeros(20, D)
    for domain in (0, 2):
        tokens = (domain_T == domain).nonzero()[:, 0]
        weights = softmax_of_best(moe.router.gate.table[domain], 2)
        expected = expected.index_copy(0, tokens, merged_mlp(moe, x_TD[tokens], weights))
    y_TD, routing = moe(x_TD, context(domain=domain_T))
    assert_same(y_TD, expected, [x_TD, *moe.parameters()], rtol=1e-3, atol=1e-3)
    assert isinstance(routing.route, MergedRoute) and len(routing.route.weight) == 2
    alone, _ = moe(x_TD[3:4], Context(positions=torch.tensor([7]), ids={"domain": domain_T[3:4]}))
    torch.testing.assert_close(alone, y_TD[3:4], rtol=1e-4, atol=1e-4)


def test_experts_that_differ_in_a_linear_part_alone_give_the_mixture_of_their_outputs() -> None:
    moe, x_TD = layer({}), torch.randn(10, D)
    bank = moe.banks[0]
    with torch.no_grad():
        bank.gate_up_proj.copy_(bank.gate_up_proj[:1].expand_as(bank.gate_up_proj))
    y_TD, routing = moe(x_TD, Context(batch_size=1))
    mixture = bank(x_TD, routing.route.edges)
    torch.testing.assert_close(y_TD, mixture, rtol=1e-3, atol=1e-3)
    torch.nn.init.normal_(bank.gate_up_proj)
    assert not torch.allclose(moe(x_TD)[0], bank(x_TD, routing.route.edges), atol=0.1)


def test_runs_never_straddle_documents_or_rows() -> None:
    run_T, goes_on_R = runs(context(), 20, 2, torch.device("cpu"))
    assert run_T.tolist() == [0, 0, 1, 1, 2, 3, 3, 4, 4, 5, 6, 6, 7, 7, 8, 8, 9, 9, 10, 10]
    assert goes_on_R.tolist() == [False, True, True, False, False, True, False, True, True, True, True]
    cached = Context(batch_size=2, positions=torch.tensor([5, 6, 7, 7, 8, 9]))  # rows that go on behind a cache
    run_T, goes_on_R = runs(cached, 6, 3, torch.device("cpu"))
    assert run_T.tolist() == [0, 1, 1, 2, 2, 3] and goes_on_R.tolist() == [False, True, False, True]
    run_T, goes_on_R = runs(Context(batch_size=2), 6, None, torch.device("cpu"))
    assert run_T.tolist() == [0, 0, 0, 1, 1, 1] and not goes_on_R.any()


@torch.no_grad()
def test_a_packed_document_is_merged_for_as_if_alone() -> None:
    router = MERGED | {"select": {"type": "merged", "over": "segment_before", "segment": 2}}
    model = decoder(moe={"experts": {"num_experts": 4, "d_expert": 8}, "router": router})
    ids = torch.randint(19, (2, 10))
    document = torch.tensor([[0] * 5 + [1] * 2 + [2] * 3, [0] * 10])
    packed = model(ids, position=POSITIONS, document=document).logits
    for row, number in ((0, 0), (0, 1), (0, 2), (1, 0)):
        inside = document[row] == number
        torch.testing.assert_close(
            packed[row, inside], model(ids[row : row + 1, inside]).logits[0], rtol=1e-4, atol=1e-4
        )


def test_a_merged_layer_runs_under_autocast_and_in_bf16() -> None:
    moe, x = build(router=MERGED | {"select": "merged"}), torch.randn(6, D)
    exact, _ = moe(x)
    with torch.autocast("cpu", torch.bfloat16):
        mixed, _ = moe(x)
    torch.testing.assert_close(mixed.float(), exact, rtol=0.05, atol=0.05)
    half, _ = moe.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), exact, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"router": {"select": "merged"}}, "select: merged routes no rows; set losses: \\[\\]"),
        ({"router": MERGED | {"select": "merged", "controller": "expert_bias"}}, "neither controller nor capacity"),
        ({"router": MERGED | {"select": {"type": "merged", "k": 7}}}, "k = 7 is more than num_experts = 6"),
        ({"router": MERGED | {"select": {"type": "merged", "over": "equal_scores"}}}, "needs a gate by ids alone"),
        ({"router": MERGED | {"select": {"type": "merged", "segment": 4}}}, "only there"),
        ({"router": MERGED | {"select": {"type": "merged", "over": "segment_before"}}}, "segment says how long"),
        (
            {"router": {"select": {"type": "merged", "over": "segment_before", "segment": 2}, "losses": []}},
            "segment_before needs score: logits and weigh: softmax",
        ),
        (
            {"router": MERGED | {"select": "merged"}, "experts": [MLPExperts(d_expert=4), CopyExperts()]},
            "needs one bank, of type mlp",
        ),
        (
            {"router": MERGED | {"select": "merged"}, "experts": {"type": "nested", "widths": [2, 3]}},
            "needs one bank, of type mlp",
        ),
    ],
)
def test_what_cannot_be_merged_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        MoEConfig.model_validate({"experts": {"num_experts": 6, "d_expert": 4}} | changes)


def test_banks_without_such_parameters_say_so() -> None:
    route = MergedRoute(torch.ones(1, 2), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(TypeError, match="CopyBank has no parameters that could be merged"):
        CopyExperts(num_experts=2).build(D)(torch.randn(3, D), route)
    with pytest.raises(ValueError, match="several banks"):
        route.split([1, 1])


WIDTHS: dict[str, Any] = {"over": "equal_scores", "widths": [2, 3, 5]}
BY_WIDTH = {"type": "lookup", "by": "width", "num_ids": 3}


@pytest.mark.parametrize("activation", ["swiglu", "relu"])
def test_a_drawn_width_is_the_explicit_sum_of_experts_cut_to_it(activation: Any) -> None:
    moe, x_TD = sub_networks(activation), torch.randn(4, D, requires_grad=True)
    bank, seen = moe.banks[0], set()
    for seed in range(12):
        torch.manual_seed(seed)
        y_TD, routing = moe.train()(x_TD)
        width = routing.route.width
        weight_E, gates = moe.router.gate.table[WIDTHS["widths"].index(width)].softmax(0), 1 + (activation == "swiglu")
        up = sum(weight_E[e] * bank.gate_up_proj[e] for e in range(E)).view(gates, 5, D)[:, :width].flatten(0, 1)
        down = sum(weight_E[e] * bank.down_proj[e] for e in range(E))[:, :width]
        expected = brute_force.mlp(x_TD, up, down, activation)
        assert_same(y_TD, expected, [x_TD, *moe.parameters()], rtol=1e-3, atol=1e-3)
        seen.add(width)
    assert seen == {2, 3, 5}
    assert moe.eval()(x_TD)[1].route.width == 5


def sub_networks(activation: Any = "swiglu", widths: Any = None, **bank: Any) -> MoE:
    select = {"type": "merged"} | WIDTHS | ({} if widths is None else {"widths": widths})
    experts = {"num_experts": E, "d_expert": 5, "activation": activation} | bank
    router = MERGED | {"select": select, "gate": BY_WIDTH}
    torch.manual_seed(0)
    return MoE(MoEConfig.model_validate({"experts": experts, "router": router}), D)


@pytest.mark.parametrize("widths", [[2, 3, 4], [3, 2, 5], [2, 2, 5], [0, 2, 5]], ids=str)
def test_widths_that_do_not_rise_to_the_whole_are_refused(widths: list[int]) -> None:
    with pytest.raises(ValidationError, match="to d_expert = 5"):
        sub_networks(widths=widths)
    with pytest.raises(ValidationError, match="without bias"):
        sub_networks(bias=True)


@pytest.mark.parametrize(
    "router",
    [
        {"select": {"type": "merged", "over": "equal_scores"}, "gate": BY_WIDTH},
        {"select": {"k": 2}, "gate": BY_WIDTH},
        {"select": {"type": "merged"} | WIDTHS, "gate": BY_WIDTH | {"by": "domain"}},
        {"select": {"type": "merged"} | WIDTHS, "gate": BY_WIDTH | {"num_ids": 4}},
    ],
    ids=str,
)
def test_a_gate_by_width_and_widths_need_each_other(router: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="need each other"):
        MoEConfig.model_validate({"experts": {"num_experts": E, "d_expert": 5}, "router": MERGED | router})


def test_a_decoder_trains_sub_networks_and_decodes_with_the_widest() -> None:
    model = decoder(moe=sub_networks().config)
    model(torch.randint(0, 19, (2, 6))).logits.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters()) and not model.cannot_write
