"""Counts by hand, against real modules, and the dense twin."""

import pytest

from moeforge.config import build
from moeforge.models import Decoder, ModelConfig, dense_twin, measure

V, D, H, E, K = 11, 8, 6, 4, 2
MOE = {"experts": {"num_experts": E, "d_expert": H}}


def small(**changes: object) -> ModelConfig:
    tree = {"vocab_size": V, "d_model": D, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "max_seq_len": 32}
    return build(ModelConfig, tree | {"moe": MOE} | changes)


@pytest.mark.parametrize("tied", [True, False])
def test_by_hand(tied: bool) -> None:
    size = measure(small(tie_embeddings=tied))
    attention = D * D + 2 * (D * D // 2) + D * D
    layer, experts = attention + E * D + 2 * D, E * 3 * D * H
    inside = 2 * (layer + experts) + D
    tables = V * D if tied else 2 * V * D
    idle = 2 * (E - K) * 3 * D * H
    total, active = size.total, size.active
    assert total.all == inside + tables and active.all == total.all - idle
    assert total.without_input_embedding == total.all - V * D
    assert total.without_embeddings == inside and active.without_embeddings == inside - idle
    matrices = 2 * (attention + E * D + K * 3 * D * H) + V * D
    attended = 2 * 2 * 2 * D * 32 // 2
    assert size.flops_per_token == 2 * matrices + attended
    assert size.weight_bytes == 4 * total.all and size.optimizer_bytes == 16 * total.all
    assert size.kv_bytes_per_token == 2 * 2 * 4 * 4
    assert measure(small(tie_embeddings=tied), 2, 64).flops_per_token == 2 * matrices + 2 * attended
    assert measure(small(tie_embeddings=tied), 2, 64).weight_bytes == 2 * total.all


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": False, "qk_norm": True, "head_dim": 6},
        {
            "moe": {
                "experts": [{"num_experts": 2, "d_expert": 3}, {"num_experts": 2, "d_expert": 9, "activation": "relu"}]
            }
        },
        {"moe": MOE | {"shared": {"d_expert": 3, "mix": "coefficient"}}, "moe_every": 2},
        {"layers": {0: {"moe": None, "d_ff": 5}}},
    ],
)
def test_totals_are_those_of_the_real_model(changes: dict[str, object]) -> None:
    config = small(**changes)
    assert measure(config).total.all == sum(p.numel() for p in Decoder(config).parameters())


REALISTIC = {
    "vocab_size": 256,
    "d_model": 64,
    "num_layers": 6,
    "moe_every": 2,
    "d_ff": 256,
    "moe": {
        "experts": {"num_experts": 8, "d_expert": 256},
        "shared": {"d_expert": 256, "mix": "coefficient"},
        "router": {"select": {"type": "top_k", "k": 1}},
    },
    "layers": {3: {"moe": {"experts": {"num_experts": 16}}}, 5: {"moe": {"experts": {"num_experts": 32}}}},
}


def test_the_dense_twin_is_just_not_cheaper() -> None:
    config = build(ModelConfig, REALISTIC)
    twin = dense_twin(config)
    assert not any(layer.moe for layer in twin.all_layers)
    ratio = measure(twin).flops_per_token / measure(config).flops_per_token
    assert 1 <= ratio < 1.01
    assert measure(twin).total == measure(twin).active
    assert (twin.d_model, twin.num_layers, twin.all_layers[0].d_ff) == (64, 6, 256)


def test_the_dense_twin_keeps_dense_layers_and_an_open_vocabulary() -> None:
    layers = REALISTIC["layers"] | {1: {"moe": None, "d_ff": 99, "activation": "relu"}}
    config = build(ModelConfig, REALISTIC | {"layers": layers, "vocab_size": None})
    twin = dense_twin(config)
    assert twin.vocab_size is None and twin.all_layers[1] == config.all_layers[1]
    assert twin.all_layers[3].d_ff > 256


def test_a_look_up_is_no_multiplication_and_shared_factors_are_multiplied_with_for_each_expert() -> None:
    gate = {"gate": {"type": "lookup", "by": "token", "num_ids": V}}
    plain, looked_up = small(), small(moe=MOE | {"router": gate})
    assert measure(plain).flops_per_token - measure(looked_up).flops_per_token == 2 * 2 * E * D  # two layers' gates
    assert measure(looked_up).total.all == measure(plain).total.all + 2 * (V - D) * E
    assert measure(looked_up).active.all == measure(plain).active.all + 2 * (1 - D) * E, "a token reads one row"
    rank, bank = 3, {"type": "factorised", "num_experts": E, "d_expert": H, "rank": 3}
    work = K * rank * (D + 2 * H + H + D)
    factorised = measure(small(moe={"experts": bank}))
    assert factorised.flops_per_token == measure(plain).flops_per_token + 2 * 2 * (work - K * 3 * D * H)
    assert factorised.active.all <= factorised.total.all


def test_a_second_look_at_attention_is_counted() -> None:
    asks = small(moe=MOE | {"router": {"select": {"type": "by_importance", "k": K}}})
    heads, size = asks.num_heads * asks.size_of_head, asks.num_key_heads * asks.size_of_head
    per_layer = 2 * D * (heads + size) + heads * asks.max_seq_len
    assert measure(asks).flops_per_token == measure(small()).flops_per_token + 2 * per_layer


def test_experts_without_work_cost_nothing() -> None:
    half = {"experts": [{"num_experts": E, "d_expert": H}, {"type": "zero", "num_experts": E}]}
    size, plain = measure(small(moe=half)), measure(small())
    gates = 2 * 2 * E * D
    assert size.flops_per_token == plain.flops_per_token + gates - 2 * 2 * (K // 2) * 3 * D * H


def test_parameters_do_not_depend_on_repeats_and_work_does() -> None:
    once, thrice = measure(small(moe=MOE)), measure(small(moe=MOE, num_repeats=3))
    assert (thrice.total, thrice.active, thrice.weight_bytes) == (once.total, once.active, once.weight_bytes)
    assert thrice.kv_bytes_per_token == 3 * once.kv_bytes_per_token
    unrolled = measure(small(moe=MOE, num_layers=6))
    assert thrice.flops_per_token == unrolled.flops_per_token


def test_the_dense_twin_repeats_and_leaves_attention_out_where_the_model_does() -> None:
    config = small(num_layers=4, num_repeats=2, layers={1: {"attends": False}}, momentum={"decay": 0.5})
    twin = dense_twin(config)
    assert 1 <= measure(twin).flops_per_token / measure(config).flops_per_token < 1.1
    assert twin.num_repeats == 2 and [layer.attends for layer in twin.all_layers] == [True, False, True, True]


def test_memories_and_their_queries_cost_what_they_multiply() -> None:
    gate = {"type": "query", "queries": 8, "d_query": 3, "rank": 2, "key_sets": 4}
    select = {"type": "product_keys", "heads": 2, "k": 4, "rank": 2}
    router = {"gate": gate, "select": select, "score": "logits", "weigh": "softmax", "losses": []}
    moe = {"experts": {"type": "values", "num_experts": 100, "tables": 2}, "router": router}
    size, plain = measure(small(moe=moe)), measure(small(moe=None, d_ff=1))
    keys = 8 * 3 * D + 8 * 10 * 3 + 2 * 10 * 2 * 2  # queries, keys of both heads, the core on every row
    assert size.flops_per_token == plain.flops_per_token + 2 * 2 * (keys + 8 * D + 2 * D * D - 3 * D)
    weights = 8 * 3 * D + 4 * 10 * 3 + 4 + 50 * D + 2 * D * D
    assert size.total.all == plain.total.all + 2 * (weights - 3 * D)
    assert size.total.all - size.active.all == 2 * (50 - 8) * D
