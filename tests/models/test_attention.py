"""Attention against loops over heads, with rotations as complex numbers."""

import pytest
import torch
from torch import Tensor

from moeforge.config import build
from moeforge.models import ModelConfig
from moeforge.models.attention import Attention, locate, rotate


def config_of(**changes: object) -> ModelConfig:
    return build(ModelConfig, {"d_model": 16, "num_heads": 4, "rope_theta": 100.0} | changes)


def turned(x_LD: Tensor, position_L: Tensor, theta: float) -> Tensor:
    """Rotary embedding of one head, pair (i, i + half) as one complex number."""
    half = x_LD.shape[1] // 2
    frequency = torch.tensor([theta ** (-i / half) for i in range(half)])
    turn = torch.polar(torch.ones(len(x_LD), half), position_L[:, None] * frequency)
    product = torch.complex(x_LD[:, :half], x_LD[:, half:]) * turn
    return torch.cat((product.real, product.imag), 1)


def normed(x_LD: Tensor, norm: torch.nn.Module, eps: float) -> Tensor:
    if isinstance(norm, torch.nn.Identity):
        return x_LD
    return x_LD / (x_LD.square().mean(1, keepdim=True) + eps).sqrt() * norm.weight


def by_loop(
    attention: Attention, config: ModelConfig, x_LD: Tensor, position_L: Tensor, allowed_LL: Tensor
) -> tuple[Tensor, Tensor]:
    """Output, and the attention that each token gets on average from a head of a query that may look at it."""
    size, heads, received_L = config.size_of_head, [], torch.zeros(len(x_LD))
    for head in range(config.num_heads):
        shared = head // (config.num_heads // config.num_key_heads)
        rows, key_rows = slice(head * size, (head + 1) * size), slice(shared * size, (shared + 1) * size)
        query = normed(x_LD @ attention.q_proj.weight[rows].T, attention.q_norm, config.norm_eps)
        key = normed(x_LD @ attention.k_proj.weight[key_rows].T, attention.k_norm, config.norm_eps)
        query, key = (turned(part, position_L, config.rope_theta) for part in (query, key))
        weights = (query @ key.T / size**0.5).masked_fill(~allowed_LL, -torch.inf).softmax(1)
        received_L = received_L + weights.sum(0) / allowed_LL.sum(0) / config.num_heads
        heads.append(weights @ (x_LD @ attention.v_proj.weight[key_rows].T))
    return torch.cat(heads, 1) @ attention.o_proj.weight.T, received_L


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_kv_heads": 2},
        {"num_kv_heads": 1, "head_dim": 6},
        {"qk_norm": True, "norm_eps": 0.1, "num_kv_heads": 2},
    ],
    ids=repr,
)
@pytest.mark.parametrize("packed", [False, True])
def test_attention_is_a_loop_over_heads(changes: dict[str, object], packed: bool) -> None:
    config = config_of(**changes)
    attention, x = Attention(config), torch.randn(2, 7, 16)
    for norm in (attention.q_norm, attention.k_norm):
        for weight in norm.parameters():
            torch.nn.init.normal_(weight)
    position, document = torch.arange(7).expand(2, 7), torch.zeros(2, 7, dtype=torch.int64)
    if packed:
        position, document = torch.tensor([[0, 1, 2, 0, 1, 2, 3]] * 2), torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0] * 7])
    allowed = torch.tril(torch.ones(7, 7)).bool() & (document[:, :, None] == document[:, None, :])
    positions = locate(config, position, document if packed else None, past=0)
    y, received = attention(x, positions), attention.received(x, positions)
    for row in range(2):
        expected, attended = by_loop(attention, config, x[row], position[row], allowed[row])
        torch.testing.assert_close(y[row], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(received[row], attended, rtol=1e-4, atol=1e-5)


def test_packed_documents_after_a_cache_are_refused() -> None:
    with pytest.raises(ValueError, match="its own cache"):
        locate(config_of(), torch.tensor([[3, 0]]), torch.tensor([[0, 1]]), past=3)


def test_rotations_depend_on_distance_alone() -> None:
    config, query, key = config_of(), torch.randn(4), torch.randn(4)

    def score(at: int, other: int) -> Tensor:
        where = locate(config, torch.tensor([[at, other]]), None, past=0)
        q, k = rotate(torch.stack((query, key))[None, None], where.cos, where.sin)[0, 0]
        return q @ k

    torch.testing.assert_close(score(9, 4), score(105, 100), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(score(9, 4), score(9, 5), atol=1e-3)
    torch.testing.assert_close(score(3, 3), query @ key, rtol=1e-4, atol=1e-5)
