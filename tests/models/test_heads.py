"""Routed attention heads against loops over tokens, experts and heads, and through the whole decoder."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from moeforge.config import build
from moeforge.errors import UserError
from moeforge.models import Cache, Decoder, ModelConfig, dense_twin, measure
from moeforge.models.attention import Attention, locate, places
from moeforge.models.heads import RoutedHeads
from moeforge.moe import Context, MoEConfig, Route
from tests.models.test_attention import normed, turned
from tests.models.test_decoder import LAYERS, LENGTH, assert_close, decoder, ids, step

D, B, L, E = 16, 2, 7, 5
TOP_2 = {"type": "routed", "num_experts": E, "router": {"select": {"k": 2}}}
TOP_P = {"type": "routed", "num_experts": E, "router": {"select": {"type": "top_p", "p": 0.5}}}
OWN = TOP_2 | {"keys": "own"}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one key head": (TOP_2, {"num_kv_heads": 1}),
    "two key heads": (TOP_2, {"num_kv_heads": 2, "qk_norm": True}),
    "any number": (TOP_P, {"num_kv_heads": 2}),
    "dropped": (TOP_2 | {"router": {"capacity": [{"type": "capacity", "capacity_factor": 0.6}]}}, {"num_kv_heads": 1}),
    "own keys": (OWN, {"num_heads": E, "head_dim": 4}),
    "own keys, three heads each": (OWN, {"num_heads": 3 * E, "head_dim": 4}),
    "frozen": (OWN | {"frozen_experts": 2}, {"num_heads": 2 * E, "head_dim": 4}),
}


def config_of(attention: dict[str, Any], **changes: Any) -> ModelConfig:
    tree = {"d_model": D, "num_heads": 4, "rope_theta": 100.0, "num_layers": 2, "vocab_size": 19, "max_seq_len": 32}
    return build(ModelConfig, tree | {"attention": attention} | changes)


def routed(config: ModelConfig) -> Attention:
    torch.manual_seed(2)
    return Attention(config, config.attention)


def by_loop(attention: Attention, config: ModelConfig, x_LD: Tensor, weight_LE: Tensor, allowed_LL: Tensor) -> Tensor:
    """One sequence: every expert of every token by itself; weight zero where it was not chosen."""
    size, own = config.size_of_head, attention.heads.keys == "own"
    position_L = torch.arange(len(x_LD))
    y_LD = torch.zeros_like(x_LD)
    for expert in range(E):
        mixed = []
        own_heads = config.num_key_heads // E
        for head in range(own_heads if own else config.num_key_heads):
            rows, key_head = slice(head * size, (head + 1) * size), expert * own_heads + head if own else head
            key_rows = slice(key_head * size, (key_head + 1) * size)
            query = normed(x_LD @ whole(attention.q_proj)[expert, rows].T, attention.q_norm, config.norm_eps)
            key = normed(x_LD @ whole(attention.k_proj).reshape(-1, D)[key_rows].T, attention.k_norm, config.norm_eps)
            query, key = (turned(part, position_L, config) for part in (query, key))
            share = (query @ key.T / size**0.5).masked_fill(~allowed_LL, -torch.inf).softmax(1)
            mixed.append(share @ (x_LD @ whole(attention.v_proj).reshape(-1, D)[key_rows].T))
        y_LD = y_LD + weight_LE[:, expert, None] * (torch.cat(mixed, 1) @ whole(attention.o_proj)[expert].T)
    return y_LD


def whole(projection: torch.nn.Module) -> Tensor:
    """The weights of all experts, the frozen ones in front."""
    return torch.cat(
        [weight for weight in (getattr(projection, "prior", None), projection.weight) if weight is not None]
    )


def weights_of(route: Route) -> Tensor:
    """[T, E], zero where an expert was not chosen."""
    weight_TE = torch.zeros(route.num_tokens, route.num_experts)
    return weight_TE.index_put((route.token, route.expert), route.weight)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_routed_attention_is_a_loop_over_experts(case: str, packed: bool) -> None:
    heads, changes = CASES[case]
    config = config_of(heads, **changes)
    attention, x = routed(config), torch.randn(B, L, D, requires_grad=True)
    position = torch.arange(L).expand(B, L)
    document = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0] * L]) if packed else torch.zeros(B, L, dtype=torch.int64)
    where = locate(config, position, document if packed else None, past=0)
    route = attention.router(x.flatten(0, 1), Context(batch_size=B)).route
    y = attention(x, where, None, route)
    allowed = torch.tril(torch.ones(L, L)).bool() & (document[:, :, None] == document[:, None, :])
    weight_BLE = weights_of(route).view(B, L, E)
    expected = torch.stack([by_loop(attention, config, x[b], weight_BLE[b], allowed[b]) for b in range(B)])
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    towards = torch.randn(B, L, D)
    inputs = [x, *(weight for weight in attention.parameters() if weight.requires_grad)]
    ours, theirs = (torch.autograd.grad((out * towards).sum(), inputs, retain_graph=True) for out in (y, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    assert all(gradient.any() for gradient in ours)


def test_all_experts_with_even_weights_are_multi_query_attention_divided_by_their_number() -> None:
    everyone = {"type": "routed", "num_experts": 4, "router": {"select": {"k": 4}}}
    config = config_of(everyone, num_kv_heads=1)
    attention, plain = routed(config), Attention(config)
    torch.nn.init.zeros_(attention.router.gate.weight)
    plain.load_state_dict(
        {
            "q_proj.weight": attention.q_proj.weight.flatten(0, 1),
            "o_proj.weight": attention.o_proj.weight.transpose(0, 1).flatten(1),
            "k_proj.weight": attention.k_proj.weight,
            "v_proj.weight": attention.v_proj.weight,
        }
    )
    x, where = torch.randn(B, L, D), locate(config, torch.arange(L).expand(B, L), None, past=0)
    route = attention.router(x.flatten(0, 1), Context()).route
    torch.testing.assert_close(attention(x, where, None, route), plain(x, where) / 4, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("weigh", ["ones", "complement"])
def test_all_experts_with_own_keys_and_weights_of_one_are_multi_head_attention(weigh: str) -> None:
    everyone = {"type": "routed", "num_experts": 4, "keys": "own", "router": {"select": {"k": 4}, "weigh": weigh}}
    config = config_of(everyone)
    attention, plain = routed(config), Attention(config)
    torch.nn.init.zeros_(attention.router.gate.weight)
    plain.q_proj.weight.data = attention.q_proj.weight.data.flatten(0, 1)
    plain.o_proj.weight.data = attention.o_proj.weight.data.transpose(0, 1).flatten(1)
    plain.k_proj, plain.v_proj = attention.k_proj, attention.v_proj
    x, where = torch.randn(B, L, D), locate(config, torch.arange(L).expand(B, L), None, past=0)
    route = attention.router(x.flatten(0, 1), Context()).route
    torch.testing.assert_close(attention(x, where, None, route), plain(x, where), rtol=1e-4, atol=1e-6)


def test_places_are_distinct_and_inside_the_token() -> None:
    mask_TE = torch.rand(9, E) < 0.5
    mask_TE[3] = False
    place_N, width = places(route := Route.from_mask(mask_TE, torch.ones(9, E)))
    assert width == mask_TE.sum(1).max() and len(place_N.unique()) == len(place_N)
    assert torch.equal(place_N // width, route.token)
    assert places(Route.from_mask(mask_TE & False, torch.ones(9, E)))[1] == 1


@pytest.mark.parametrize("sizes", [[1] * LENGTH, [3, 1, 4, 1], [5, 4]], ids=repr)
@pytest.mark.parametrize("attention", [TOP_2, TOP_P, OWN | {"num_experts": 2}], ids=["top 2", "top p", "own keys"])
@torch.no_grad()
def test_cached_decoding_is_the_full_pass(attention: dict[str, Any], sizes: list[int]) -> None:
    model, input_ids = decoder(attention=attention).eval(), ids()
    cache = Cache(model, 2, LENGTH + 3)
    logits = [model(part, cache=cache).logits for part in input_ids.split(sizes, dim=1)]
    assert_close(torch.cat(logits, 1), model(input_ids).logits)
    changed = input_ids.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 19
    assert_close(model(changed).logits[:, :5], model(input_ids).logits[:, :5])


def on_heads(layer: MoEConfig) -> RoutedHeads | None:
    """The same router over heads; None when it is refused there."""
    try:
        return RoutedHeads(num_experts=layer.num_experts, router=layer.router)
    except ValidationError:
        return None


HEADS = {name: heads for name, layer in LAYERS.items() if layer and (heads := on_heads(layer))}


def test_most_routers_can_choose_heads() -> None:
    assert len(HEADS) > 0.8 * len(LAYERS)


@pytest.mark.parametrize("name", HEADS)
@torch.no_grad()
def test_heads_see_no_later_token_unless_their_router_says_so(name: str) -> None:
    torch.manual_seed(3)
    model, input_ids = decoder("dense", attention=HEADS[name]).eval(), ids(3, 32)
    changed = input_ids.clone()
    changed[:, 16:] = (changed[:, 16:] + 1) % 19
    one, other = model(input_ids).logits[:, :16], model(changed).logits[:, :16]
    assert torch.allclose(one, other, rtol=1e-4, atol=1e-4) != model.routers["attention_00"].config.leaks


def test_recomputed_activations_change_nothing() -> None:
    model, input_ids = decoder(attention=TOP_2), ids()
    loss, gradients = step(model, input_ids)
    model.recompute_activations = True
    again, recomputed = step(model, input_ids)
    assert torch.equal(loss, again)
    for name, gradient in gradients.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-5, atol=1e-6)


def test_routers_of_heads_and_experts_have_names_of_their_own() -> None:
    model = decoder("pyramid", attention=TOP_2, layers={0: {"attention": "all"}})
    names = ["layer_01", "layer_02", "attention_01", "attention_02"]
    assert list(model.routers) == list(model(ids()).by_name) == names
    assert list(model.moe_layers) == [1, 2]


def test_counts() -> None:
    head = 4
    config = config_of(TOP_2, num_kv_heads=1)
    size, total = measure(config), sum(p.numel() for p in Decoder(config).parameters())
    keys, mlp, table = 2 * head * D, 3 * D * 256, 19 * D
    layer = 2 * E * head * D + E * D + keys + mlp
    assert size.total.all == total == 2 * (layer + 2 * D) + table + D
    idle = 2 * (E - 2) * 2 * head * D
    assert size.active.all == total - idle
    attended = 2 * 2 * head * 32
    assert size.flops_per_token == 2 * (2 * layer - idle + table) + 2 * attended
    own = measure(config_of(OWN, num_heads=E, head_dim=head))
    layer = 2 * E * head * D + E * D + 2 * E * head * D + mlp
    assert own.flops_per_token == 2 * (2 * layer - idle + table) + 2 * 2 * E * head * 32


@pytest.mark.parametrize("moe", [None, {"experts": {"num_experts": 4, "d_expert": 64}}], ids=["dense", "experts"])
def test_the_dense_twin_has_plain_attention_and_is_just_not_cheaper(moe: dict[str, Any] | None) -> None:
    config = config_of(TOP_2 | {"router": {"select": {"k": 4}}}, moe=moe, num_kv_heads=2, layers={1: {"d_ff": 99}})
    twin = dense_twin(config)
    assert not any(layer.attention.router or layer.moe for layer in twin.all_layers)
    assert 1 <= measure(twin).flops_per_token / measure(config).flops_per_token < 1.01


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        ({"router": {"select": "soft", "score": "logits", "losses": []}}, "select: soft does not"),
        ({"router": {"select": "by_importance"}}, "cannot choose the heads by it"),
        ({"router": {"gate": "competition", "losses": ["gate_loss"]}}, "competition asks experts of a layer"),
        (
            {"keys": "own", "router": {"select": "product_keys", "score": "logits", "losses": []}},
            "keys: own computes every head",
        ),
        ({"router": {"gate": "recurrent"}}, "hands on no state, and gate: recurrent needs one"),
        ({"router": {"select": {"k": 9}}}, "k = 9 is more than num_experts = 8"),
        ({"router": {"gate": {"type": "lookup", "num_ids": 9}}}, "a decoder knows token and domain ids"),
        ({"frozen_experts": 2}, "with keys: shared others change their keys"),
        ({"keys": "own", "frozen_experts": 8}, "frozen_experts = 8 of num_experts = 8: none learns"),
        ({"keys": "own"}, "as many key heads for each expert: num_kv_heads is 4, num_experts 8"),
    ],
)
def test_heads_that_cannot_be_routed_are_refused(attention: dict[str, Any], message: str) -> None:
    with pytest.raises((ValidationError, ValueError), match=message):
        ModelConfig.model_validate({"attention": {"type": "routed"} | attention})


def test_frozen_experts_and_a_learned_norm_of_keys_are_refused() -> None:
    with pytest.raises(UserError, match="would share the learned norm of qk_norm"):
        config_of(OWN | {"frozen_experts": 2}, num_heads=E, head_dim=4, qk_norm=True)


def test_frozen_experts_take_no_gradient_and_the_others_do() -> None:
    config = config_of(OWN | {"frozen_experts": 2}, num_heads=2 * E, head_dim=4)
    model = Decoder(config)
    model(ids()).logits.square().mean().backward()
    for name, weight in model.named_parameters():
        assert (weight.grad is None) == name.endswith(".prior"), name
        assert weight.requires_grad or "attention" in name
