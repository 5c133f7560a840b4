"""Sparse to dense: equal experts are one MLP exactly, the strongest units stay, and what fits none is refused."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from moeforge.compress.dense import shares, to_dense
from moeforge.config import build
from moeforge.data.packing import Batch
from moeforge.errors import UserError
from moeforge.models import Decoder, ModelConfig

IDS = torch.arange(24).view(2, 12) % 30


def model(branch: bool = True, **moe: Any) -> Decoder:
    """Two layers, the upper one with four experts of which a token takes two."""
    torch.manual_seed(0)
    experts = {
        "experts": {"num_experts": 4, "d_expert": 6},
        "router": {"select": {"k": 2}, "weigh": {"type": "scores"}},
    }
    experts["router"]["weigh"] |= {"normalize_weights": True}
    tree: dict[str, Any] = {"vocab_size": 30, "d_model": 8, "num_layers": 2, "num_heads": 2, "d_ff": 10}
    tree |= {"first_dense_layers": 1, "init": {"type": "normal", "std": 0.3}}
    tree["moe"] = {**experts, **({"shared": {"d_expert": 5}} if branch else {}), **moe}
    return Decoder(build(ModelConfig, tree)).eval()


def batch() -> Batch:
    """All of ``IDS``, one document a row."""
    place = torch.arange(12).expand(2, 12)
    return Batch(
        input_ids=IDS,
        labels=IDS,
        position=place,
        document=torch.zeros_like(IDS),
        num_bytes=24,
        domain=torch.zeros_like(IDS),
    )


@pytest.mark.parametrize("shared", [True, False])
@torch.no_grad()
def test_equal_experts_are_one_mlp(shared: bool) -> None:
    sparse = model(shared)
    bank = sparse.blocks[1].moe.banks[0]
    for expert in range(1, 4):
        order = torch.randperm(6)
        bank.gate_up_proj[expert] = bank.gate_up_proj[0].unflatten(0, (2, 6))[:, order].flatten(0, 1)
        bank.down_proj[expert] = bank.down_proj[0][:, order]
    found = shares(sparse, [batch()])
    torch.testing.assert_close(found[1].sum(), torch.tensor(1.0))
    dense = to_dense(sparse, "mean", found)
    assert not dense.moe_layers and dense.config.all_layers[1].d_ff == 6 + 5 * shared
    torch.testing.assert_close(dense(IDS).logits, sparse(IDS).logits)
    assert dense.embedding.weight.data_ptr() != sparse.embedding.weight.data_ptr()


@torch.no_grad()
def test_the_strongest_units_stay() -> None:
    sparse = model(branch=False)
    share = torch.tensor([0.6, 0.0, 0.3, 0.1])
    mlp = to_dense(sparse, "units", {1: share}).blocks[1].mlp
    bank = sparse.blocks[1].moe.banks[0]
    gate, up = bank.gate_up_proj.unflatten(1, (2, 6)).unbind(1)
    units = []
    for expert, weight in enumerate(share.tolist()):
        for unit in range(6):
            column = weight * bank.down_proj[expert, :, unit]
            strength = float(gate[expert, unit].norm() * up[expert, unit].norm() * column.norm())
            units.append((strength, gate[expert, unit], up[expert, unit], column))
    best = sorted(units, key=lambda unit: -unit[0])[:6]
    x = torch.randn(3, 8)
    wanted = sum((F.silu(x @ g) * (x @ u))[:, None] * column for _, g, u, column in best)
    torch.testing.assert_close(mlp(x), wanted)


@pytest.mark.parametrize(
    "change",
    [
        {"shared": {"d_expert": 5, "mix": "gated"}},
        {"experts": {"num_experts": 4, "d_expert": 6, "bias": True}},
        {"router": {"select": "auxiliary"}},
    ],
)
def test_other_layers_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="layer 1: only one stack of plain MLPs, and a branch added to it"):
        to_dense(model(**change), "mean", {1: torch.ones(4)})


def test_a_dense_model_is_refused() -> None:
    dense = to_dense(model(), "units", {1: torch.ones(4) / 4})
    with pytest.raises(UserError, match="it is dense already"):
        to_dense(dense, "mean", {})
