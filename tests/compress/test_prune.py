"""Which experts go, against every other choice."""

from itertools import combinations
from typing import Any

import pytest
import torch

from moeforge.compress import prune
from moeforge.compress.plan import Row
from moeforge.compress.profile import Profile, Seen
from moeforge.compress.prune import ORDERS, drop
from moeforge.errors import UserError


def seen(outputs_ETD: torch.Tensor) -> Seen:
    """Of experts with such weighted outputs."""
    blank: dict[str, Any] = {name: torch.zeros(len(outputs_ETD)) for name in Seen.__dataclass_fields__}
    flat = outputs_ETD.flatten(1)
    return Seen(**blank | {"joint": flat @ flat.T / outputs_ETD.shape[1]})


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
    profile = Profile({layer: seen(torch.randn(8, 30, 4)) for layer in (1, 2)})
    rows = [Row(layer=layer, expert=expert) for layer in (1, 2) for expert in range(8)]
    dropped = [row.layer for row in drop(profile, rows, 0.25, order) if row.action == "drop"]
    assert dropped == [1, 1, 2, 2]
    with pytest.raises(UserError, match="drops no expert"):
        drop(profile, rows, 0.01, order)


def test_an_unknown_order_is_refused() -> None:
    with pytest.raises(UserError, match="one of frequency, weight, reap, router_norm, output_error, not by luck"):
        drop(Profile({}), [], 0.5, "luck")
