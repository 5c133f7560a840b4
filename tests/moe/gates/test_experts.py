"""Gates that ask the experts: their norms, their competition, and what that costs."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from moeforge.config import build
from moeforge.models import ModelConfig, measure
from moeforge.moe import Context, MLPExperts, MoE, MoEConfig, RouterConfig
from moeforge.moe.bank import Experts, LowRankExperts
from moeforge.moe.gates import ActivationNorm, Competition
from moeforge.moe.select import TopK
from tests.moe import brute_force
from tests.moe.test_layer import D, assert_same, examples

X_TD = torch.randn(9, D, generator=torch.Generator().manual_seed(5))
SELF_CHOSEN = RouterConfig(gate=ActivationNorm(), score="logits", select=TopK(k=2), weigh="softmax")


def layer(experts: Any, router: RouterConfig) -> MoE:
    torch.manual_seed(0)
    return MoE(MoEConfig(experts=experts, router=router), D)


def test_experts_choose_themselves_by_the_norm_of_their_first_activation() -> None:
    moe = layer(
        [LowRankExperts(num_experts=3, d_expert=5, rank=2), LowRankExperts(num_experts=2, d_expert=3)], SELF_CHOSEN
    )
    x_TD = X_TD.clone().requires_grad_()
    y_TD, _ = moe(x_TD)
    first = [expert for bank in moe.banks for expert in bank.gate_in]
    norms_TE = torch.stack([torch.sqrt(((x_TD @ expert.T) ** 2).sum(1)) for expert in first], 1)
    rows = []
    for norms_E in norms_TE:
        best = brute_force.ranked(norms_E.tolist())[:2]
        total = sum(torch.exp(norms_E[e]) for e in best)
        rows.append(torch.stack([torch.exp(norms_E[e]) / total if e in best else 0 * norms_E[e] for e in range(5)]))
    assert_same(y_TD, brute_force.mix_experts(moe, x_TD, torch.stack(rows)), [x_TD, *moe.parameters()])


def test_at_full_rank_it_is_the_ordinary_gated_bank() -> None:
    router = RouterConfig(select=TopK(k=2))
    whole = layer([MLPExperts(num_experts=4, d_expert=6)], router)
    low = layer([LowRankExperts(num_experts=4, d_expert=6, rank=D)], router)
    low.router.load_state_dict(whole.router.state_dict())
    gate, up = whole.banks[0].gate_up_proj.detach().chunk(2, dim=1)
    low.banks[0].gate_in.data, low.banks[0].gate_out.data = torch.eye(D).expand(4, D, D).clone(), gate.clone()
    low.banks[0].up_proj.data, low.banks[0].down_proj.data = up.clone(), whole.banks[0].down_proj.detach().clone()
    torch.testing.assert_close(low(X_TD)[0], whole(X_TD)[0], rtol=1e-5, atol=1e-6)


def test_asking_every_expert_is_counted() -> None:
    experts = {"type": "low_rank", "num_experts": 8, "d_expert": 12, "rank": 3}
    router = {"select": {"type": "top_k", "k": 2}}
    tree = {"vocab_size": 11, "d_model": 16, "num_layers": 2, "max_seq_len": 32}
    linear, asked = (
        measure(build(ModelConfig, tree | {"moe": {"experts": experts, "router": router | {"gate": gate}}}))
        for gate in ("linear", "activation_norm")
    )
    without_gates = linear.flops_per_token - 2 * 2 * 16 * 8
    assert asked.flops_per_token == without_gates + 2 * 2 * 8 * 3 * 16  # two layers, A_e of all eight experts


EXPERTS = [MLPExperts(num_experts=3, d_expert=4), MLPExperts(num_experts=2, d_expert=6, activation="gelu")]


def competing(share: Any) -> MoE:
    return layer(EXPERTS, RouterConfig(gate=Competition(share=share), select=TopK(k=2), losses=["gate_loss"]))


@pytest.mark.parametrize("config", examples(Experts), ids=repr)
def test_every_bank_answers_for_every_row(config: Any) -> None:
    bank = config.build(D)
    expected = torch.stack(brute_force.BANKS[config.type](bank, X_TD))
    torch.testing.assert_close(bank.everywhere(X_TD), expected, rtol=1e-4, atol=1e-5)


def test_the_loudest_experts_win_and_the_router_is_taught() -> None:
    moe, x_TD = competing(1.0).train(), X_TD.clone().requires_grad_()
    y_TD, routing = moe(x_TD)
    outputs = [out for bank in moe.banks for out in brute_force.BANKS[bank.config.type](bank, x_TD)]
    norms_TE = torch.stack([torch.sqrt((out**2).sum(1)) for out in outputs], 1)
    scores_TE = torch.exp(norms_TE) / torch.exp(norms_TE).sum(1, keepdim=True)
    chosen_TE = torch.stack(
        [torch.tensor([e in brute_force.ranked(row.tolist())[:2] for e in range(5)]) for row in norms_TE]
    )
    assert_same(y_TD, brute_force.mix_experts(moe, x_TD, scores_TE * chosen_TE), [x_TD, *moe.banks.parameters()])
    guess_TE = torch.softmax(X_TD @ moe.router.gate.weight.T, 1)
    torch.testing.assert_close(routing.gate_loss, ((guess_TE - scores_TE) ** 2).sum(1))
    loss = moe.router.balance_losses(routing, 1)["gate_loss"]
    by_bank = torch.autograd.grad(loss, [moe.router.gate.weight, *moe.banks.parameters()], allow_unused=True)
    assert by_bank[0].abs().max() > 0 and all(grad is None for grad in by_bank[1:]), "experts are not taught"


def test_outside_competition_the_router_alone_decides() -> None:
    moe, plain = competing(1.0), layer(EXPERTS, RouterConfig(select=TopK(k=2)))
    plain.banks.load_state_dict(moe.banks.state_dict())
    plain.router.gate.weight.data = moe.router.gate.weight.detach().clone()
    for quiet in (moe.eval(), competing({"start": 1.0, "end": 0.0, "steps": 5}).train()):
        y_TD, routing = quiet(X_TD, Context(step=5))
        assert torch.equal(y_TD, plain(X_TD)[0]) and not routing.gate_loss.any()


def test_the_share_is_drawn_by_lot_and_may_end() -> None:
    moe = competing({"start": 0.6, "end": 0.0, "steps": 100}).train()

    def drawn(step: int) -> int:
        return sum(bool(moe(X_TD, Context(step=step))[1].gate_loss.any()) for _ in range(200))

    assert drawn(100) == 0 and 90 < drawn(0) < 150 and 30 < drawn(50) < 90


def test_the_router_learns_who_wins() -> None:
    moe = competing(1.0).train()
    optimizer = torch.optim.Adam(moe.router.parameters(), lr=0.05)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = moe.router.balance_losses(moe(X_TD)[1], 1)["gate_loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    "router", [SELF_CHOSEN, RouterConfig(gate=Competition(share=1.0), losses=["gate_loss"])], ids=["norm", "loud"]
)
def test_it_decides_under_autocast_and_in_bf16(router: RouterConfig) -> None:
    moe = layer([LowRankExperts(num_experts=4, d_expert=5, rank=2)], router)
    exact = moe(X_TD)[1].logits
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(moe(X_TD)[1].logits, exact)
    half = moe.bfloat16()(X_TD.bfloat16())[1].logits
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("experts", "router", "message"),
    [
        ({"type": "mlp"}, {"gate": "activation_norm"}, "asks experts of type low_rank; these are mlp"),
        (
            {"type": "low_rank"},
            {"gate": "activation_norm", "select": "soft", "score": "logits", "losses": []},
            "select: soft wants others",
        ),
        ({"type": "mlp"}, {"gate": {"type": "competition", "share": 0}}, "experts that never compete"),
        ({"type": "mlp"}, {"gate": "competition"}, "teaches its router by losses: gate_loss"),
        (
            {"type": "mlp"},
            {"gate": "competition", "select": "soft", "score": "logits", "losses": []},
            "select: soft wants others",
        ),
        ({"type": "low_rank", "activation": "relu"}, {}, "swiglu"),
    ],
)
def test_experts_that_cannot_answer_are_refused(experts: Any, router: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        MoEConfig.model_validate({"experts": experts | {"d_expert": 4}, "router": router})


def test_a_router_without_its_layer_says_what_it_misses() -> None:
    moe = competing(1.0).train()
    with pytest.raises(ValueError, match="gate: competition asks the experts, and the context has no banks"):
        moe.router(X_TD, Context())
