"""Which experts go, against every other choice."""

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

from moeforge.compress import prune
from moeforge.compress.plan import Plan, Row, packable
from moeforge.compress.profile import Profile, Seen, profile
from moeforge.compress.prune import ORDERS, drop, since
from moeforge.compress.stream import Streamed
from moeforge.config import build
from moeforge.errors import UserError
from moeforge.hub import load, save
from moeforge.models import ModelConfig
from tests.compress.small import SHAPE, batches, model_folder


def seen(outputs_ETD: torch.Tensor) -> Seen:
    """Of experts with such weighted outputs."""
    blank: dict[str, Any] = {name: torch.zeros(len(outputs_ETD)) for name in Seen.__dataclass_fields__}
    flat = outputs_ETD.flatten(1)
    return Seen(**blank | {"joint": flat @ flat.T / outputs_ETD.shape[1], "router_norm": torch.ones(len(outputs_ETD))})


@pytest.mark.parametrize("tried", [prune.TRIED, 0])
def test_the_set_that_goes_changes_the_output_least(tried: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prune, "TRIED", tried)
    torch.manual_seed(1)
    outputs_ETD = torch.randn(7, 40, 5) * torch.linspace(1, 2, 7)[:, None, None]
    outputs_ETD[6] = 0.1 * outputs_ETD[6] - outputs_ETD[2]  # alone each is large, together they are nearly nothing

    def error(gone: tuple[int, ...]) -> float:
        return float(outputs_ETD[list(gone)].sum(0).square().sum())

    own = [0, 2, 3, 4, 6]
    found = tuple(sorted(ORDERS["output_error"](seen(outputs_ETD), own, 2)))
    best = min(combinations(own, 2), key=error)
    first = min(own, key=lambda one: error((one,)))
    second = min({*own} - {first}, key=lambda one: error((first, one)))
    assert best == (2, 6) != tuple(sorted((first, second)))
    assert found == (best if tried else tuple(sorted((first, second))))


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_drops_its_share_of_each_layer(order: str) -> None:
    found = Profile({layer: seen(torch.randn(8, 30, 4)) for layer in (1, 2)})
    rows = [Row(layer=layer, expert=expert) for layer in (1, 2) for expert in range(8)]
    dropped = [row.layer for row in drop(found, rows, 0.25, order) if row.action == "drop"]
    assert dropped == [1, 1, 2, 2]
    with pytest.raises(UserError, match="drops no expert"):
        drop(found, rows, 0.01, order)


def test_of_each_group_as_many_go() -> None:
    found = Profile({layer: seen(torch.randn(8, 30, 4)) for layer in (1, 2)})
    found.layers[1].count[:4] = 1  # alone, the last four would go
    rows = [Row(layer=layer, expert=expert) for layer in (1, 2) for expert in range(8)]
    dropped = {row.place for row in drop(found, rows, 0.5, "frequency", {1: 4, 2: 1}) if row.action == "drop"}
    assert dropped == {(1, 0), (1, 2), (1, 4), (1, 6), (2, 0), (2, 1), (2, 2), (2, 3)}
    router = {"select": {"k": 2, "num_groups": 2}}
    grouped = build(ModelConfig, SHAPE | {"layers": {2: {"moe": {"experts": {"num_experts": 6}, "router": router}}}})
    plan = Plan(rows=tuple(Row(layer=layer, expert=e) for layer, e in packable(grouped)))
    for gone, lost in (((0, 1), r"\[2, 0\]"), ((0, 5), None)):
        rows = [row.replace(action="drop") if row.layer == 2 and row.expert in gone else row for row in plan.rows]
        if lost is None:
            Plan(rows=tuple(rows)).check(grouped)
        else:
            with pytest.raises(UserError, match=f"layer 2: as many experts have to go .* 2 groups, not {lost}"):
                Plan(rows=tuple(rows)).check(grouped)


def test_an_order_that_the_router_says_nothing_of_is_refused() -> None:
    found = Profile({1: seen(torch.randn(4, 30, 4))})
    found.layers[1].router_norm.zero_()
    with pytest.raises(UserError, match="layer 1: its router has no row for each expert"):
        drop(found, [Row(layer=1, expert=expert) for expert in range(4)], 0.5, "router_norm")


def test_an_unknown_order_is_refused() -> None:
    with pytest.raises(
        UserError, match="one of frequency, weight, reap, router_norm, router_hint, output_error, not by luck"
    ):
        drop(Profile({}), [], 0.5, "luck")


def test_since_a_base_the_rows_that_grew_least_go(tmp_path: Path) -> None:
    """Experts that fine-tuning left alone, though their rows are long, against the order without a base."""
    folder = model_folder(tmp_path / "base", first_dense_layers=0, layers={})
    model, tokenizer = load(folder)
    with torch.no_grad():
        gate = model.moe_layers[1].router.gate.weight
        gate.div_(gate.norm(dim=1, keepdim=True)).mul_(torch.tensor([3.0, 4.0, 1.0, 2.0])[:, None])
        save(model, tokenizer, tmp_path / "base")
        gate[2].mul_(2.5)
        gate[3].mul_(2.5)
        save(model, tokenizer, tmp_path / "tuned")
    made = profile(Streamed(tmp_path / "tuned"), batches())
    grown = since(made, Streamed(tmp_path / "base"))
    torch.testing.assert_close(grown.layers[1].router_norm, torch.tensor([0.0, 0.0, 1.5, 3.0]))
    rows = [Row(layer=1, expert=expert) for expert in range(4)]
    for order, gone in ((made, {0, 2}), (grown, {0, 1})):
        only = Profile({1: order.layers[1]})
        assert {row.expert for row in drop(only, rows, 0.5, "router_norm") if row.action == "drop"} == gone
    with pytest.raises(UserError, match="another model"):
        since(made, Streamed(model_folder(tmp_path / "other")))
    gated = {"experts": {"num_experts": 4, "d_expert": 24}, "router": {"gate": "distance", "select": {"k": 2}}}
    with pytest.raises(UserError, match="has no row for each expert"):
        since(made, Streamed(model_folder(tmp_path / "distance", first_dense_layers=0, layers={}, moe=gated)))
