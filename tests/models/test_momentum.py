"""Momentum across layers against a loop over layers that keeps its own sums."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moeforge.models import Cache, Decoder
from moeforge.models.attention import locate
from moeforge.models.momentum import Moments, Momentum
from tests.models.test_decoder import LENGTH, decoder, ids
from tests.moe import brute_force

SETTINGS = [{"decay": 0.7, "step": 0.9}, {"decay": 0.6, "step": 0.5, "second": 0.9}]


def by_loop(model: Decoder, input_ids: Tensor, settings: dict[str, Any]) -> Tensor:
    """Logits of a model whose layers are run one by one, experts by brute force."""
    mu, gamma, beta = settings["decay"], settings["step"], settings.get("second")
    x, p, m = model.embedding(input_ids), torch.zeros(()), torch.zeros(())
    position = torch.arange(input_ids.shape[1]).expand_as(input_ids)
    positions = locate(model.config, position, None, 0)
    for block in model.blocks:
        x = x + block.attention(block.attention_norm(x), positions)
        rows = block.mlp_norm(x)
        if block.moe is None:
            x = x + block.mlp(rows)
            continue
        f = brute_force.layer(block.moe, rows.flatten(0, 1)).view_as(x)
        if beta is None:
            p = mu * p + f
            x = x + gamma * p
        else:
            p, m = mu * p + (1 - mu) * f, beta * m + (1 - beta) * f * f
            x = x + gamma * p / torch.sqrt(m + 1e-8)
    return torch.nn.functional.linear(model.norm(x), model.embedding.weight)


@pytest.mark.parametrize("settings", SETTINGS, ids=["heavy-ball", "adam"])
@pytest.mark.parametrize("shape", ["moe", "pyramid"])
def test_momentum_is_a_loop_over_layers(shape: str, settings: dict[str, Any]) -> None:
    model, input_ids = decoder(shape, momentum=settings), ids()
    logits, expected = model(input_ids).logits, by_loop(model, input_ids, settings)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    towards, weights = torch.randn_like(logits), list(model.parameters())
    ours, theirs = (torch.autograd.grad((out * towards).sum(), weights) for out in (logits, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))


def test_neither_memory_nor_another_step_is_the_plain_stream_bit_for_bit() -> None:
    plain, neutral, input_ids = decoder(), decoder(momentum={"decay": 0.0, "step": 1.0}), ids()
    neutral.load_state_dict(plain.state_dict())
    assert torch.equal(plain(input_ids).logits, neutral(input_ids).logits)
    moving = decoder(momentum={"decay": 0.5})
    moving.load_state_dict(plain.state_dict())
    assert not torch.allclose(plain(input_ids).logits, moving(input_ids).logits, atol=1e-2)


@torch.no_grad()
def test_momentum_runs_over_depth_so_cached_decoding_is_the_full_pass() -> None:
    model, input_ids = decoder(momentum=SETTINGS[1]), ids()
    cache = Cache(model, 2, LENGTH)
    logits = [model(part, cache=cache).logits for part in input_ids.split([4, 1, 4], dim=1)]
    torch.testing.assert_close(torch.cat(logits, 1), model(input_ids).logits, rtol=1e-4, atol=1e-4)


def test_a_token_that_no_expert_took_has_a_gradient() -> None:
    added = torch.zeros(3, 4, requires_grad=True)
    out, _ = Momentum(decay=0.5, second=0.9)(added, Moments())
    out.sum().backward()
    assert added.grad is not None and bool(torch.isfinite(added.grad).all())
