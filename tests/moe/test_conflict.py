"""Gradient conflicts: cosines by a backward pass per edge, and the gradient that the router gets for them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moeforge.models import Decoder, ModelConfig
from moeforge.moe import MoE, MoEConfig
from moeforge.moe.balance.conflict import agreement
from tests.moe.brute_force import mlp
from tests.moe.test_layer import D

EXPERTS = {"num_experts": 4, "d_expert": 6}


def build(watched: bool = True, shared: Any = None, select: Any = None) -> MoE:
    torch.manual_seed(3)
    losses = [{"type": "conflict_loss", "threshold": 0.1}] if watched else []
    router = {"select": select or {"k": 2}, "losses": losses}
    return MoE(MoEConfig.model_validate({"experts": EXPERTS, "router": router, "shared": shared}), D)


def loss_of(y_TD: Tensor) -> Tensor:
    """Any loss of the layer's output."""
    return (y_TD - 1).square().sum() + torch.tanh(y_TD).sum()


def cosines(moe: MoE, x_TD: Tensor) -> dict[tuple[int, int], float]:
    """By (token, expert): every edge has its own linear map beside the expert, at zero, and a backward pass to it."""
    probs_TE, bank = (x_TD @ moe.router.gate.weight.T).softmax(1).detach(), moe.banks[0]
    maps, rows = {}, []
    for token, x_D in enumerate(x_TD):
        y_D = torch.zeros(D)
        for expert in probs_TE[token].topk(2).indices.tolist():
            maps[token, expert] = torch.zeros(D, D, requires_grad=True)
            out_D = mlp(x_D[None], bank.gate_up_proj[expert], bank.down_proj[expert], "swiglu")[0]
            y_D = y_D + probs_TE[token, expert] * (out_D + maps[token, expert] @ x_D)
        rows.append(y_D)
    gradients = dict(zip(maps, torch.autograd.grad(loss_of(torch.stack(rows)), list(maps.values())), strict=True))
    found = {}
    for (token, expert), own in gradients.items():
        mean = torch.stack([g for (_, e), g in gradients.items() if e == expert]).mean(0)
        found[token, expert] = float((own * mean).sum() / own.norm() / mean.norm())
    return found


def test_the_agreement_of_edges_is_a_backward_pass_for_each() -> None:
    moe, x_TD = build(), torch.randn(12, D)
    y_TD, routing = moe(x_TD)
    (gradient_TD,) = torch.autograd.grad(loss_of(y_TD), y_TD)
    route = routing.route
    towards_ND = route.gather(gradient_TD) * route.weight.detach()[:, None]
    ours_N = agreement(towards_ND, route.gather(x_TD), route.ends)
    ours = dict(zip(zip(route.token.tolist(), route.expert.tolist(), strict=True), ours_N.tolist(), strict=True))
    assert ours == pytest.approx(cosines(moe, x_TD), abs=1e-5)


@pytest.mark.parametrize("scale", [0.0, 1.0, -3.0])
def test_the_router_gets_the_gradient_of_the_probabilities_in_conflict(scale: float) -> None:
    moe, x_TD = build(), torch.randn(12, D)
    y_TD, routing = moe(x_TD)
    value = moe.router.balance_losses(routing, 1)["conflict_loss"]
    assert float(value.detach()) == 0.0
    (ours,) = torch.autograd.grad(loss_of(y_TD) + scale * value, moe.router.gate.weight)
    opposed = [edge for edge, cosine in cosines(moe, x_TD).items() if cosine < 0.1]
    assert 2 < len(opposed) < 20
    moe = build(watched=False)
    y_TD, routing = moe(x_TD)
    assert routing.conflict is None and routing.route.probe is None
    unwanted = sum(routing.probs[token, expert] for token, expert in opposed) / 12
    (expected,) = torch.autograd.grad(loss_of(y_TD) + scale * unwanted, moe.router.gate.weight)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shared", [None, {"d_expert": 4, "mix": "interpolated"}], ids=["alone", "shared"])
def test_watching_changes_neither_outputs_nor_the_experts_gradients(shared: Any) -> None:
    moe, unwatched, x_TD = build(shared=shared), build(watched=False, shared=shared), torch.randn(12, D)
    y_TD, routing = moe(x_TD)
    value = moe.router.balance_losses(routing, 1)["conflict_loss"]
    watched = torch.autograd.grad(loss_of(y_TD) + value, moe.parameters())
    plain_TD, _ = unwatched(x_TD)
    assert torch.equal(y_TD, plain_TD)
    plain = torch.autograd.grad(loss_of(plain_TD), unwatched.parameters())
    with torch.no_grad():
        assert float(moe.router.balance_losses(moe(x_TD)[1], 1)["conflict_loss"]) == 0.0
    for (name, _), one, other in zip(moe.named_parameters(), watched, plain, strict=True):
        assert torch.equal(one, other) == ("router" not in name), name


def test_tokens_that_are_opposed_leave_their_expert() -> None:
    """Two kinds of rows with opposite targets and one expert that both prefer: the smaller kind goes elsewhere."""
    shares = []
    for weight in (0.0, 10.0):
        moe = build(select={"k": 1})
        x_TD = torch.randn(60, D) / 4 + 1
        x_TD[:20, 0] += 2
        target_TD = torch.where(torch.arange(60)[:, None] < 20, -1.0, 1.0)
        with torch.no_grad():
            moe.router.gate.weight.zero_()[0] = 0.1
        optimizer = torch.optim.SGD(moe.router.parameters(), lr=0.1)
        for _ in range(20):
            optimizer.zero_grad()
            y_TD, routing = moe(x_TD)
            away = moe.router.balance_losses(routing, 1)["conflict_loss"]
            ((y_TD - target_TD).square().mean() + weight * away).backward()
            optimizer.step()
        shares.append(float(moe(x_TD)[1].probs[:20, 0].mean().detach()))
    assert shares[1] < shares[0] - 0.1, shares


@pytest.mark.parametrize("autocast", [False, True])
def test_recomputed_activations_have_the_same_conflicts(autocast: bool) -> None:
    moe = {"experts": EXPERTS, "router": {"losses": [{"type": "conflict_loss", "threshold": 0.3}]}}
    config = ModelConfig.model_validate({"vocab_size": 11, "d_model": 16, "num_layers": 2, "moe": moe})
    model, ids, found = Decoder(config), torch.randint(11, (2, 9)), []
    for recompute in (False, True):
        model.recompute_activations = recompute
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = model(ids)
        loss = output.logits.float().square().mean()
        for index, layer in model.moe_layers.items():
            loss = loss + 10 * layer.router.balance_losses(output.routings[index], 2)["conflict_loss"]
        found.append(torch.autograd.grad(loss, model.parameters()))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
