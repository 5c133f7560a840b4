"""Gates side by side, and centres as a codebook."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from moeforge.config import build, read_yaml, to_yaml
from moeforge.errors import UserError
from moeforge.moe import Context, MoEConfig, Router, RouterConfig
from moeforge.moe.gates import Distance, Linear, Paths
from tests.moe.test_gates import CONTEXT, X_TD, D, E, T

CODEBOOK = {"type": "distance", "commitment": 0.25}


def test_a_codebook_pulls_both_sides_of_the_nearest_centre() -> None:
    torch.manual_seed(0)
    gate, rows_TD = Distance(commitment=0.25).build(D, E), X_TD.clone().requires_grad_()
    signal = gate(rows_TD, CONTEXT)
    nearest_T = torch.stack([((x - gate.centre) ** 2).sum(1) for x in X_TD]).argmin(1)
    gap_TD = X_TD - gate.centre[nearest_T]
    torch.testing.assert_close(signal.loss, 1.25 * (gap_TD**2).mean(1))
    to_rows, to_centres = torch.autograd.grad(signal.loss.sum(), [rows_TD, gate.centre])
    torch.testing.assert_close(to_rows, 0.25 * 2 * gap_TD / D)
    expected = torch.zeros_like(gate.centre).index_add(0, nearest_T, -2 * gap_TD / D)
    torch.testing.assert_close(to_centres, expected)
    plain = Distance().build(D, E)
    plain.load_state_dict(gate.state_dict())
    assert torch.equal(plain(X_TD, CONTEXT).logits, signal.logits) and plain(X_TD, CONTEXT).loss is None


def test_every_row_takes_both_paths_and_their_weights_sum_below_one() -> None:
    torch.manual_seed(0)
    select = {"type": "top_per_group", "num_groups": 2}
    gate = Paths(parts=(Linear(), Distance(commitment=0.25)))
    router = Router(RouterConfig(gate=gate, select=select, losses=["gate_loss"]), D, E)
    routing = router(X_TD, Context())
    assert [sorted(e // 3 for e in row) for row in experts_of(routing)] == [[0, 1]] * T
    torch.testing.assert_close(routing.gate_loss, router.gate.parts[1](X_TD, Context()).loss)
    assert router.gate(X_TD, Context()).logits.exp().sum(1).allclose(torch.ones(T))


def experts_of(routing: Any) -> list[list[int]]:
    """Per token, its experts."""
    rows: list[list[int]] = [[] for _ in range(routing.route.num_tokens)]
    for token, expert in zip(routing.route.token.tolist(), routing.route.expert.tolist(), strict=True):
        rows[token].append(expert)
    return rows


def test_gates_inside_a_gate_are_read_and_written_like_any_slot(tmp_path: Path) -> None:
    router = {"gate": {"type": "paths", "parts": ["linear", CODEBOOK]}, "losses": ["gate_loss"]}
    config = build(MoEConfig, {"experts": {"num_experts": E, "d_expert": 4}, "router": router})
    (tmp_path / "layer.yaml").write_text(to_yaml(config))
    assert build(MoEConfig, read_yaml(tmp_path / "layer.yaml")) == config
    assert config.router.gate.parts == (Linear(), Distance(commitment=0.25))
    router["gate"] = {"type": "paths", "parts": ["linear", "distanc"]}
    with pytest.raises(UserError, match=r"there is no type 'distanc'\. Did you mean 'distance'"):
        build(MoEConfig, {"experts": {"num_experts": E, "d_expert": 4}, "router": router})


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        ({"type": "paths", "parts": ["linear"]}, "at least 2 items"),
        ({"type": "paths", "parts": [CODEBOOK] * 4}, "num_experts = 6 is not divisible by paths in gate.parts = 4"),
        ({"type": "paths", "parts": [CODEBOOK, {"type": "linear", "previous": True}]}, "hands no state on"),
        ({"type": "paths", "parts": ["linear", "distance"]}, "gate: paths as it is set has no loss of its own"),
        (CODEBOOK | {"frozen": True}, "has no codebook to learn"),
        ("linear", "gate: linear as it is set has no loss of its own"),
    ],
)
def test_gates_without_a_sense_are_refused(gate: Any, message: str) -> None:
    router = {"gate": gate, "losses": ["gate_loss"]}
    with pytest.raises(ValidationError, match=message):
        MoEConfig.model_validate({"experts": {"num_experts": E, "d_expert": 4}, "router": router})
