"""Attention against loops over heads, with rotations as complex numbers."""

import pytest
import torch
from torch import Tensor

from moeforge.config import build
from moeforge.errors import UserError
from moeforge.models import ModelConfig
from moeforge.models.attention import Attention, LatentAttention, LayerCache, locate, rotate
from moeforge.models.attention import build as build_attention


def config_of(**changes: object) -> ModelConfig:
    return build(ModelConfig, {"d_model": 16, "num_heads": 4, "rope_theta": 100.0} | changes)


def turned(x_LD: Tensor, position_L: Tensor, config: ModelConfig) -> Tensor:
    """Rotary embedding of one head, every pair as one complex number."""
    width = config.rotary_width
    half = width // 2
    frequency = torch.tensor([config.rope_theta ** (-i / half) for i in range(half)])
    turn = torch.polar(torch.ones(len(x_LD), half), position_L[:, None] * frequency)
    pairs = (
        (slice(0, width, 2), slice(1, width, 2)) if config.rope_interleaved else (slice(0, half), slice(half, width))
    )
    product, result = torch.complex(x_LD[:, pairs[0]], x_LD[:, pairs[1]]) * turn, x_LD.clone()
    result[:, pairs[0]], result[:, pairs[1]] = product.real, product.imag
    return result


def normed(x_LD: Tensor, norm: torch.nn.Module, eps: float) -> Tensor:
    if isinstance(norm, torch.nn.Identity):
        return x_LD
    return x_LD / (x_LD.square().mean(1, keepdim=True) + eps).sqrt() * norm.weight


def projected(x_LD: Tensor, linear: torch.nn.Linear) -> Tensor:
    return x_LD @ linear.weight.T + (0 if linear.bias is None else linear.bias)


def softmax(scores_LL: Tensor, allowed_LL: Tensor, sink: Tensor | None) -> Tensor:
    """Exponentials over their sum, and over the sink's, which takes what it gets out of the sum."""
    powers_LL = torch.where(allowed_LL, scores_LL.exp(), 0)
    return powers_LL / (powers_LL.sum(1, keepdim=True) + (0 if sink is None else sink.exp()))


def by_loop(
    attention: Attention, config: ModelConfig, x_LD: Tensor, position_L: Tensor, allowed_LL: Tensor
) -> tuple[Tensor, Tensor]:
    """Output, and the attention that each token gets on average from a head of a query that may look at it."""
    size, heads, received_L, own = config.size_of_head, [], torch.zeros(len(x_LD)), config.attention
    queries, keys, values = (projected(x_LD, part) for part in (attention.q_proj, attention.k_proj, attention.v_proj))
    if config.qk_norm == "whole":
        queries = normed(queries, attention.q_norm, config.norm_eps)
        keys = normed(keys, attention.k_norm, config.norm_eps)
    for head in range(config.num_heads):
        shared = head // (config.num_heads // config.num_key_heads)
        rows, key_rows = slice(head * size, (head + 1) * size), slice(shared * size, (shared + 1) * size)
        query, key, value = queries[:, rows], keys[:, key_rows], values[:, key_rows]
        if config.qk_norm is True:
            query = normed(query, attention.q_norm, config.norm_eps)
            key = normed(key, attention.k_norm, config.norm_eps)
        if own.clip:
            query, key, value = (part.clamp(-own.clip, own.clip) for part in (query, key, value))
        query, key = (turned(part, position_L, config) for part in (query, key))
        sink = attention.sinks[head] if own.sinks else None
        weights = softmax(query @ key.T * (own.scale or size**-0.5), allowed_LL, sink)
        received_L = received_L + weights.sum(0) / allowed_LL.sum(0) / config.num_heads
        heads.append(weights @ value)
    return projected(torch.cat(heads, 1), attention.o_proj), received_L


SHAPES = [
    {},
    {"num_kv_heads": 2},
    {"num_kv_heads": 1, "head_dim": 6},
    {"qk_norm": True, "norm_eps": 0.1, "num_kv_heads": 2},
    {"qk_norm": "whole", "norm_eps": 0.1, "num_kv_heads": 2},
    {"attention": {"qkv_bias": True, "o_bias": True, "clip": 0.5}, "num_kv_heads": 2},
    {"attention": {"scale": 0.9}, "rope_fraction": 0.5, "head_dim": 8},
    {"attention": {"sinks": True}, "num_kv_heads": 2},
    {"attention": {"sinks": True, "scale": 0.2}, "rope_interleaved": True, "num_kv_heads": 1, "head_dim": 6},
]
LATENT = {"type": "latent", "kv_lora_rank": 7, "qk_nope_head_dim": 3, "qk_rope_head_dim": 6, "v_head_dim": 5}


def places(packed: bool, window: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Positions and documents [2, 7], and who may see whom [2, 7, 7], by a loop."""
    position, document = torch.arange(7).expand(2, 7), torch.zeros(2, 7, dtype=torch.int64)
    if packed:
        position, document = torch.tensor([[0, 1, 2, 0, 1, 2, 3]] * 2), torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0] * 7])
    allowed = torch.zeros(2, 7, 7, dtype=torch.bool)
    for row in range(2):
        for query in range(7):
            for key in range(query + 1):
                near = window is None or query - key < window
                allowed[row, query, key] = near and document[row, query] == document[row, key]
    return position, document, allowed


def shake(module: torch.nn.Module) -> None:
    """Vectors away from the values they start with."""
    for weight in module.parameters():
        if weight.ndim == 1:
            torch.nn.init.normal_(weight)


@pytest.mark.parametrize("window", [None, 1, 3, 7])
@pytest.mark.parametrize("changes", SHAPES, ids=repr)
@pytest.mark.parametrize("packed", [False, True])
def test_attention_is_a_loop_over_heads(changes: dict[str, object], packed: bool, window: int | None) -> None:
    config = config_of(**changes, window=window)
    attention, x = Attention(config, config.attention, window), torch.randn(2, 7, 16)
    shake(attention)
    position, document, allowed = places(packed, window)
    positions = locate(config, position, document if packed else None, past=0)
    y, received = attention(x, positions), attention.received(x, positions)
    for row in range(2):
        expected, attended = by_loop(attention, config, x[row], position[row], allowed[row])
        torch.testing.assert_close(y[row], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(received[row], attended, rtol=1e-4, atol=1e-5)


def latent_by_loop(
    attention: LatentAttention, config: ModelConfig, x_LD: Tensor, position_L: Tensor, allowed_LL: Tensor
) -> Tensor:
    """Every head on its own, its keys and values written out."""
    own, outputs = config.attention, []
    plain, rank = own.qk_nope_head_dim, own.kv_lora_rank
    if own.q_lora_rank:
        narrow = normed(projected(x_LD, attention.q_a_proj), attention.q_a_norm, own.norm_eps)
        queries = narrow @ attention.q_b_proj.weight.T
    else:
        queries = x_LD @ attention.q_proj.weight.T
    rows = projected(x_LD, attention.kv_a_proj)
    latent, shared = (
        normed(rows[:, :rank], attention.kv_a_norm, own.norm_eps),
        turned(rows[:, rank:], position_L, config),
    )
    size, width = plain + own.qk_rope_head_dim, plain + own.v_head_dim
    for head in range(config.num_heads):
        query = queries[:, head * size : (head + 1) * size]
        query = torch.cat((query[:, :plain], turned(query[:, plain:], position_L, config)), 1)
        matrix = attention.kv_b_proj.weight[head * width : (head + 1) * width]
        key, value = torch.cat((latent @ matrix[:plain].T, shared), 1), latent @ matrix[plain:].T
        outputs.append(softmax(query @ key.T / size**0.5, allowed_LL, None) @ value)
    return projected(torch.cat(outputs, 1), attention.o_proj)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": 4}, {"bias": True, "norm_eps": 0.1}], ids=repr)
@pytest.mark.parametrize("packed", [False, True])
def test_latent_attention_is_a_loop_over_heads(changes: dict[str, object], packed: bool, window: int | None) -> None:
    config = config_of(attention=LATENT | changes, window=window, rope_interleaved=packed)
    attention, x = build_attention(config, config.all_layers[0]), torch.randn(2, 7, 16)
    shake(attention)
    position, document, allowed = places(packed, window)
    y = attention(x, locate(config, position, document if packed else None, past=0))
    for row in range(2):
        expected = latent_by_loop(attention, config, x[row], position[row], allowed[row])
        torch.testing.assert_close(y[row], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "changes", [*SHAPES, {"attention": LATENT}, {"attention": LATENT | {"q_lora_rank": 4}}], ids=repr
)
@pytest.mark.parametrize("window", [None, 1, 3, 40])
def test_what_a_cache_holds_is_as_if_passed_again(changes: dict[str, object], window: int | None) -> None:
    config = config_of(**changes, window=window)
    layer = config.all_layers[0]
    attention, x, past = build_attention(config, layer), torch.randn(2, 9, 16), 0
    shake(attention)
    position = torch.arange(9).expand(2, 9)
    cache, outputs = LayerCache(2, 12, layer.attention.cached(config), x, layer.window), []
    for part in x.split([4, 1, 1, 3], dim=1):
        here = position[:, past : past + part.shape[1]]
        outputs.append(attention(part, locate(config, here, None, past), cache))
        past += part.shape[1]
    expected = attention(x, locate(config, position, None, 0))
    torch.testing.assert_close(torch.cat(outputs, 1), expected, rtol=1e-4, atol=1e-5)
    kept = min(9, window - 1) if window and window <= 12 else 12
    assert all(tensor.shape[2] == kept for tensor in cache.tensors) and cache.length == 9
    sizes = [heads * width for heads, width in layer.attention.cached(config)]
    assert [tensor[0, :, 0].numel() for tensor in cache.tensors if kept] == (sizes if kept else [])


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


@torch.no_grad()
def test_latent_rows_of_a_cache_are_never_expanded() -> None:
    config = config_of(attention=LATENT)
    attention, x, expanded = build_attention(config, config.all_layers[0]), torch.randn(2, 9, 16), []
    attention.kv_b_proj.register_forward_hook(lambda *passed: expanded.append(passed[2].shape[2]))
    cache, position = LayerCache(2, 9, config.attention.cached(config), x, None), torch.arange(9).expand(2, 9)
    for start, end in ((0, 5), (5, 6), (6, 9)):
        attention(x[:, start:end], locate(config, position[:, start:end], None, start), cache)
    assert expanded == [5]


@pytest.mark.parametrize("sinks", [False, True])
def test_a_window_as_long_as_the_text_is_none_bit_for_bit(sinks: bool) -> None:
    config = config_of(attention={"sinks": sinks}, window=9, layers={1: {"window": None}})
    near, x = Attention(config, config.attention, 9), torch.randn(2, 9, 16)
    whole = Attention(config, config.attention)
    whole.load_state_dict(near.state_dict())
    positions = locate(config, torch.arange(9).expand(2, 9), None, past=0)
    assert torch.equal(near(x, positions), whole(x, positions))


REFUSED = {
    "head_dim does nothing": {"attention": LATENT, "head_dim": 8},
    "num_kv_heads does nothing": {"attention": LATENT, "num_kv_heads": 2},
    "qk_norm does nothing": {"attention": LATENT, "qk_norm": True},
    "rope_fraction does nothing": {"attention": LATENT, "rope_fraction": 0.5},
    "layers rotate 4 and 6 values": {"attention": LATENT, "layers": {1: {"attention": "all"}}},
    "qk_norm: whole is over all heads": {"attention": {"type": "routed", "num_experts": 2}, "qk_norm": "whole"},
    "rope_fraction = 0.3 of head_dim = 4 is 1": {"rope_fraction": 0.3},
    "sinks is not a setting": {"attention": {"type": "routed", "num_experts": 2, "sinks": True}},
    "multiple of 2": {"attention": LATENT | {"qk_rope_head_dim": 3}},
    "attention: latent keeps none": {
        "attention": LATENT,
        "moe": {"experts": {"num_experts": 4, "d_expert": 4}, "router": {"select": {"type": "by_importance", "k": 2}}},
    },
}


@pytest.mark.parametrize("reason", REFUSED)
def test_heads_that_make_no_sense_are_refused(reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        config_of(**REFUSED[reason])
