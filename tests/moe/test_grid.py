"""Product keys against the best of all sums, and a million experts without a matrix of tokens by experts."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch.utils._python_dispatch import TorchDispatchMode

from moeforge.moe import Context, MoE, MoEConfig
from tests.moe import brute_force
from tests.moe.brute_force import WEIGHS, ranked
from tests.moe.test_layer import D, assert_same

BANKS = [
    {"type": "neurons"},
    {"type": "values"},
    {"type": "mlp", "d_expert": 3},
]


def layer(bank: dict[str, Any], num_experts: int = 25, **router: Any) -> MoE:
    torch.manual_seed(4)
    router = {"score": "logits", "weigh": "softmax", "losses": []} | router
    return MoE(MoEConfig.model_validate({"experts": bank | {"num_experts": num_experts}, "router": router}), D)


@pytest.mark.parametrize("weigh", ["softmax", "scores"])
@pytest.mark.parametrize(("heads", "k"), [(1, 3), (3, 2), (2, 7), (1, 25)])
@pytest.mark.parametrize("bank", BANKS, ids=lambda bank: bank["type"])
def test_the_best_of_the_halves_hold_the_best_of_all_sums(bank: dict[str, Any], heads: int, k: int, weigh: str) -> None:
    moe = layer(bank, select={"type": "product_keys", "heads": heads, "k": k}, weigh=weigh)
    x_TD = torch.randn(6, D, requires_grad=True)
    logits = (x_TD @ moe.router.gate.weight.T).view(6, heads, 2, 5)
    weight_TE = [[torch.zeros(()) for _ in range(25)] for _ in range(6)]
    for token in range(6):
        for head in range(heads):
            rows, columns = logits[token, head]
            scores = [rows[e // 5] + columns[e % 5] for e in range(25)]
            chosen = ranked([score.item() for score in scores])[:k]
            weights = WEIGHS[weigh](moe.config.router.weigh, [scores[e] for e in chosen])
            for expert, weight in zip(chosen, weights, strict=True):
                weight_TE[token][expert] = weight_TE[token][expert] + weight
    expected = brute_force.mix_experts(moe, x_TD, torch.stack([torch.stack(row) for row in weight_TE]))
    assert_same(moe(x_TD)[0], expected, [x_TD, *moe.parameters()])


@pytest.mark.parametrize("k", [2, 5])
def test_a_core_scores_the_named_rows_and_columns(k: int) -> None:
    heads, rank, side, tokens = 2, 3, 5, 6
    gate = {"type": "query", "queries": heads * 2 * rank, "d_query": 4, "rank": rank, "key_sets": 2 * rank}
    select = {"type": "product_keys", "heads": heads, "k": k, "rank": rank}
    moe = layer({"type": "values", "tables": 5}, gate=gate, select=select, weigh="scores")
    own, x_TD = moe.router.gate, torch.randn(tokens, D, requires_grad=True)
    torch.nn.init.normal_(own.core)
    left, _, right = torch.linalg.svd(own.core.detach())
    left, right = left[:, 0], right[0]
    if left.sum() < 0:
        left, right = -left, -right
    weight_TE = torch.zeros(tokens, side * side)
    for token in range(tokens):
        for head in range(heads):
            halves = []
            for half in range(2):
                vectors = []
                for r in range(rank):
                    number = (head * 2 + half) * rank + r
                    query = own.query[number * 4 : number * 4 + 4] @ x_TD[token]
                    vectors.append(own.keys[half * rank + r] @ (query / query.square().mean().sqrt()))
                halves.append(torch.stack(vectors))
            rows, columns = (ranked((by @ half).tolist())[:k] for by, half in zip((left, right), halves, strict=True))
            grid = halves[0].T @ own.core @ halves[1]
            cells = [(i, j) for i in rows for j in columns]
            for i, j in [cells[n] for n in ranked([grid[cell].item() for cell in cells])[:k]]:
                chosen = torch.zeros_like(weight_TE)
                chosen[token, i * side + j] = 1
                weight_TE = weight_TE + chosen * grid[i, j]
            if k == side:  # every row and column is a candidate
                best = ranked(grid.flatten().tolist())[:k]
                assert all(weight_TE[token, expert] != 0 for expert in best)
    assert_same(moe(x_TD)[0], brute_force.mix_experts(moe, x_TD, weight_TE), [x_TD, *moe.parameters()])


class Largest(TorchDispatchMode):
    """The largest tensor that any operation gave."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("kind", ["neurons", "values"])
def test_a_million_experts_make_no_matrix_of_tokens_by_experts(kind: str) -> None:
    tokens, experts, width = 48, 1_000_000, 4
    gate = {"type": "query", "queries": 4, "d_query": 8, "key_sets": 2}
    router = {"gate": gate, "select": {"type": "product_keys", "k": 8, "heads": 2}}
    router |= {"score": "logits", "weigh": "softmax", "losses": []}
    config = MoEConfig.model_validate({"experts": {"type": kind, "num_experts": experts}, "router": router})
    moe, x_TD = MoE(config, width), torch.randn(tokens, width, requires_grad=True)
    with Largest() as largest:
        y_TD, routing = moe(x_TD)
        y_TD.sum().backward()
    assert routing.choices.sum() == tokens * 2 * 8
    assert experts <= largest.numel <= experts * width < tokens * experts
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in moe.parameters())


def test_a_row_has_the_same_experts_whatever_surrounds_it() -> None:
    moe, x_TD = layer({"type": "neurons"}, select={"type": "product_keys", "heads": 2, "k": 3}), torch.randn(9, D)
    torch.testing.assert_close(moe(x_TD)[0][4:5], moe(x_TD[4:5], Context())[0])


@pytest.mark.parametrize(
    ("queries", "select", "message"),
    [
        (4, {"heads": 2, "rank": 2}, "queries = heads . 2 . rank"),
        (6, {"heads": 1, "rank": 2}, "gate.queries = 6 is not divisible by 2 . gate.rank = 4"),
    ],
)
def test_a_core_needs_its_queries(queries: int, select: dict[str, Any], message: str) -> None:
    gate = {"type": "query", "queries": queries, "rank": 2}
    with pytest.raises(ValidationError, match=message):
        layer({"type": "values"}, gate=gate, select=select | {"type": "product_keys"})


@pytest.mark.parametrize(
    ("num_experts", "changes", "message"),
    [
        (24, {}, "needs a square: num_experts = 24 is none"),
        (4, {}, "k = 8 is more than num_experts = 4"),
        (25, {"losses": ["load_balancing_loss"]}, "no scores of all experts to balance"),
        (25, {"controller": "expert_bias"}, "no scores of all experts to balance"),
        (25, {"score": "softmax"}, "adds logits of two halves, not softmax"),
        (25, {"noise": [{"type": "visible", "common": 3}]}, "noise: visible and expert_dropout hide experts"),
        (25, {"gate": {"type": "query", "queries": 4}}, "num_experts = 10 is not divisible by gate.queries = 4"),
        (25, {"gate": {"type": "query", "queries": 4, "rank": 2}}, "need the same rank"),
        (25, {"gate": {"type": "query", "queries": 3, "rank": 1}}, "need the same rank"),
        (25, {"weigh": {"normalize_weights": True, "over": "computed"}}, "has no score of each"),
    ],
)
def test_keys_that_cannot_work_are_refused(num_experts: int, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        layer({"type": "neurons"}, num_experts, select="product_keys", **changes)


BY_CORE: dict[str, Any] = {
    "gate": {"type": "query", "queries": 6, "d_query": 4, "rank": 3},
    "select": {"type": "product_keys", "k": 4, "rank": 3},
    "weigh": "scores",
    "losses": [{"type": "core_loss", "margin": 0.5}],
}


def test_the_cores_loss_is_how_far_it_is_from_rank_one_and_takes_it_there() -> None:
    moe = layer({"type": "values"}, **BY_CORE)
    core, x_TD = moe.router.gate.core, torch.randn(5, D)
    left, right = (torch.linalg.qr(torch.randn(3, 3))[0] for _ in range(2))
    core.data = left @ torch.diag(torch.tensor([3.0, 1.5, 0.4])) @ right
    loss = moe.router.balance_losses(moe(x_TD)[1], 1)["core_loss"]
    torch.testing.assert_close(loss, torch.tensor((1.5 - 0.5) ** 2 / 2))
    optimizer = torch.optim.SGD([core], lr=0.2)
    for _ in range(60):
        optimizer.zero_grad()
        moe.router.balance_losses(moe(x_TD)[1], 1)["core_loss"].backward()
        optimizer.step()
    torch.testing.assert_close(torch.linalg.svdvals(core.detach()), torch.tensor([3.0, 0.5, 0.4]), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"losses": ["core_loss", "z_loss"]}, "no scores of all experts to balance"),
        (
            {
                "gate": {"type": "query", "queries": 2, "rank": 1},
                "select": {"type": "product_keys", "k": 4, "rank": 1},
            },
            "core_loss needs gate: query with rank of 2",
        ),
    ],
    ids=["beside others", "rank one"],
)
def test_a_loss_of_the_core_that_could_not_act_is_refused(parts: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        layer({"type": "values"}, **{**BY_CORE, **parts})
    with pytest.raises(ValidationError, match="core_loss needs gate: query"):
        MoEConfig.model_validate({"experts": {"d_expert": 4}, "router": {"losses": ["core_loss"]}})
