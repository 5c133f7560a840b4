"""Experts spelled in bits: the weights against loops over selectors and bits, slopes, and what entropy does."""

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from moeforge.moe import Context, MoEConfig, Router, RouterConfig
from moeforge.moe.gates import SmoothStep
from moeforge.moe.gates.codes import smooth_step as step_of
from tests.moe.test_gates import CONTEXT, X_TD, D, T, dot


def smooth_step(gate: Any, x: Tensor, e: int, t: int) -> Tensor:
    k, bits, inputs = gate.config.k, 3, torch.ones(1) if gate.config.static else x
    shares = torch.stack([torch.exp(dot(row, inputs)) for row in gate.share])
    total = torch.zeros(())
    for selector in range(k):
        chance = torch.ones(())
        for bit in range(bits):
            z = dot(gate.code[selector * bits + bit], inputs) / gate.config.width
            s = 0.0 * z if z <= -0.5 else 1 + 0.0 * z if z >= 0.5 else -2 * z**3 + 1.5 * z + 0.5
            chance = chance * (s if e >> bit & 1 else 1 - s)
        total = total + shares[selector] / shares.sum() * chance
    return total


@pytest.mark.parametrize("config", [SmoothStep(), SmoothStep(k=3, width=0.5), SmoothStep(k=1, static=True)], ids=repr)
def test_a_smooth_step_is_its_loop_and_its_slope_is_right_at_the_bounds(config: SmoothStep) -> None:
    torch.manual_seed(0)
    gate = config.build(D, 8).double()
    gate.code.data *= 8  # bits inside the step, and beyond it on both sides
    rows_TD = X_TD.double().requires_grad_()
    signal = gate(rows_TD, CONTEXT)
    with torch.no_grad():
        loop = torch.stack([smooth_step(gate, x, e, t) for t, x in enumerate(rows_TD) for e in range(8)])
    torch.testing.assert_close(signal.logits, loop.view(T, 8))
    torch.testing.assert_close(signal.logits.sum(1), torch.ones(T, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda code, share: gate_with(gate, code, share, rows_TD), (gate.code, gate.share))
    grads = torch.autograd.grad(signal.loss.sum(), [gate.code])
    assert all(bool(grad.isfinite().all()) for grad in grads)
    edge = torch.tensor([-0.25, 0.25, -0.3, 0.3], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda edge: step_of(edge, 0.5), edge)


def gate_with(gate: Any, code: Tensor, share: Tensor, rows_TD: Tensor) -> Tensor:
    """The gate's weights with these parameters."""
    return torch.func.functional_call(gate, {"code": code, "share": share}, (rows_TD, CONTEXT)).logits


def test_settled_bits_name_one_expert_per_selector_and_leave_no_entropy() -> None:
    gate = SmoothStep(k=2, static=True).build(D, 8)
    gate.code.data = torch.tensor([1.0, -1, 1, -1, 1, 1])[:, None]  # 0b101 and 0b110, lowest bit first
    signal = gate(X_TD, CONTEXT)
    assert (signal.logits > 0).nonzero()[:, 1].tolist() == [5, 6] * T
    torch.testing.assert_close(signal.loss, torch.zeros(T))
    gate.code.data.zero_()
    torch.testing.assert_close(gate(X_TD, CONTEXT).loss, torch.full((T,), 2 * math.log(8)))


def test_entropy_of_selectors_falls_until_each_token_has_few_experts() -> None:
    torch.manual_seed(0)
    config = RouterConfig(
        gate=SmoothStep(k=2), score="relu", select="threshold", losses=[{"type": "gate_loss", "weight": 1.0}]
    )
    router, x_TD = Router(config, D, 8), torch.randn(64, D)
    optimizer = torch.optim.Adam(router.parameters(), lr=0.05)
    assert router(x_TD, Context()).route.counts.sum() == 64 * 8, "all experts at the start"
    for _ in range(150):
        optimizer.zero_grad()
        router.balance_losses(router(x_TD, Context()), 1)["gate_loss"].backward()
        optimizer.step()
    assert router(x_TD, Context()).route.counts.sum() < 64 * 4


@pytest.mark.parametrize(
    ("experts", "router", "message"),
    [
        (6, {}, "in bits: 6 is none of 2, 4, 8"),
        (1, {}, "in bits: 1 is none of 2, 4, 8"),
        (8, {"score": "softmax"}, "needs score: relu and select: threshold"),
        (8, {"select": {"type": "top_k", "k": 2}}, "needs score: relu and select: threshold"),
    ],
)
def test_settings_under_which_it_would_mean_nothing_are_refused(experts: int, router: Any, message: str) -> None:
    router = {"gate": "smooth_step", "score": "relu", "select": "threshold", "losses": ["gate_loss"]} | router
    with pytest.raises(ValidationError, match=message):
        MoEConfig.model_validate({"experts": {"num_experts": experts, "d_expert": 4}, "router": router})
