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
        {"moe": {"experts": MOE["experts"] | {"bias": True}, "router": {"gate": {"type": "linear", "bias": True}}}},
        {"moe": MOE | {"shared": {"d_expert": 3, "bias": True}}, "norm": "layer", "output_bias": True},
        {"layers": {0: {"moe": None}}, "mlp_bias": True, "qk_norm": "whole"},
        {"attention": {"qkv_bias": True, "o_bias": True, "sinks": True}, "window": 5},
        {"attention": {"type": "latent", "q_lora_rank": 3, "bias": True}, "num_kv_heads": None},
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


@pytest.mark.parametrize("heads", [1, 2])
def test_of_vectors_for_experts_a_token_reads_those_of_its_heads(heads: int) -> None:
    select = {"type": "auxiliary", "k": 2, "main": 1}
    moe = MOE | {"heads": heads, "router": {"select": select}}
    plain = measure(small(moe=MOE | {"heads": heads, "router": {"select": {"type": "top_k", "k": 1}}}))
    vectors = measure(small(moe=moe))
    assert vectors.total.all - plain.total.all == 2 * E * D // heads
    assert vectors.active.all - plain.active.all == 2 * min(E, heads) * D // heads


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


def test_of_biases_a_token_uses_those_of_its_experts() -> None:
    biased, plain = measure(small(moe={"experts": MOE["experts"] | {"bias": True}})), measure(small())
    assert biased.total.all - plain.total.all == 2 * E * (2 * H + D)
    assert biased.active.all - plain.active.all == 2 * K * (2 * H + D)
    assert biased.flops_per_token == plain.flops_per_token


def test_a_window_bounds_what_is_attended_to_and_what_is_kept() -> None:
    window, length = 8, 32
    near, plain = measure(small(window=window)), measure(small())
    seen = sum(min(position + 1, window) for position in range(length)) / length
    attended, whole = 2 * 2 * D * seen, 2 * 2 * D * (length + 1) / 2
    assert near.flops_per_token - plain.flops_per_token == pytest.approx(2 * (attended - whole), abs=4 * D)
    assert near.kv_bytes_per_token == plain.kv_bytes_per_token * window // length
    half = measure(small(window=window, layers={1: {"window": None}}))
    assert half.kv_bytes_per_token == (near.kv_bytes_per_token + plain.kv_bytes_per_token) // 2
    assert measure(small(window=window), seq_len=window) == measure(small(), seq_len=window)


def test_latent_rows_are_what_a_cache_keeps() -> None:
    sizes = {"kv_lora_rank": 7, "qk_nope_head_dim": 3, "qk_rope_head_dim": 4, "v_head_dim": 5}
    config = small(attention={"type": "latent", "q_lora_rank": 6, **sizes}, num_kv_heads=None)
    size, plain = measure(config), measure(small())
    attention = D * 6 + 6 * 2 * 7 + D * (7 + 4) + 7 * 2 * (3 + 5) + 2 * 5 * D
    grouped = D * D + 2 * (D * D // 2) + D * D
    assert size.total.all - plain.total.all == 2 * (attention + 6 + 7 - grouped)
    assert size.kv_bytes_per_token == 2 * 4 * (7 + 4)
    attended = 2 * (7 + 5) * 32 // 2 - 2 * D * 32 // 2
    assert size.flops_per_token - plain.flops_per_token == 2 * 2 * (attention - grouped + attended)


def test_the_dense_twin_keeps_attention_as_it_is() -> None:
    config = small(attention={"type": "latent", "kv_lora_rank": 7}, num_kv_heads=None, window=4, residual_scale=0.5)
    twin = dense_twin(config)
    assert [layer.attention for layer in twin.all_layers] == [config.attention] * 2
    assert twin.all_layers[0].window == 4 and twin.residual_scale == 0.5
    assert 1 <= measure(twin).flops_per_token / measure(config).flops_per_token < 1.1


def top(k: int, **more: object) -> dict[str, object]:
    return {"select": {"type": "top_k", "k": k}, "losses": [], **more}


UNTIED = {"tie_embeddings": False}
PUBLISHED = {
    "Mixtral-8x7B": (46_702_792_704, 12_879_925_248, 131_072),
    "OLMoE-1B-7B": (6_919_161_856, 1_282_017_280, 131_072),
    "DeepSeekMoE-16B": (16_375_728_128, 2_828_650_496, 229_376),
    "DeepSeek-V3": (671_026_404_352, 37_552_282_624, 70_272),
    "Qwen1.5-MoE-A2.7B": (14_315_784_192, 2_689_173_504, 196_608),
    "gpt-oss-20b": (20_914_757_184, 4_187_440_704, 24_600),
}
"""Parameters in all, active, and bytes of a cache per token in two-byte numbers."""
CONFIGS: dict[str, dict[str, object]] = {
    "Mixtral-8x7B": {
        **{"vocab_size": 32000, "d_model": 4096, "num_layers": 32, "num_heads": 32, "num_kv_heads": 8},
        "moe": {"experts": {"num_experts": 8, "d_expert": 14336}, "router": top(2)},
    },
    "OLMoE-1B-7B": {
        **{"vocab_size": 50304, "d_model": 2048, "num_layers": 16, "num_heads": 16, "qk_norm": "whole"},
        "moe": {"experts": {"num_experts": 64, "d_expert": 1024}, "router": top(8)},
    },
    "DeepSeekMoE-16B": {
        **{"vocab_size": 102400, "d_model": 2048, "num_layers": 28, "num_heads": 16},
        **{"d_ff": 10944, "first_dense_layers": 1},
        "moe": {
            "experts": {"num_experts": 64, "d_expert": 1408},
            "shared": {"num_shared_experts": 2, "d_expert": 1408},
            "router": top(6),
        },
    },
    "DeepSeek-V3": {
        **{"vocab_size": 129280, "d_model": 7168, "num_layers": 61, "num_heads": 128},
        **{"d_ff": 18432, "first_dense_layers": 3, "attention": {"type": "latent", "q_lora_rank": 1536}},
        "moe": {
            "experts": {"num_experts": 256, "d_expert": 2048},
            "shared": {"d_expert": 2048},
            "router": top(8, score="sigmoid", controller={"type": "expert_bias", "rate": 0}),
        },
    },
    "Qwen1.5-MoE-A2.7B": {
        **{"vocab_size": 151936, "d_model": 2048, "num_layers": 24, "num_heads": 16, "attention": {"qkv_bias": True}},
        "moe": {
            "experts": {"num_experts": 60, "d_expert": 1408},
            "shared": {"d_expert": 5632, "mix": "gated"},
            "router": top(4),
        },
    },
    "gpt-oss-20b": {
        **{"vocab_size": 201088, "d_model": 2880, "num_layers": 24, "num_heads": 64, "num_kv_heads": 8, "head_dim": 64},
        "attention": {"qkv_bias": True, "o_bias": True, "sinks": True},
        **{"window": 128, "layers": {index: {"window": None} for index in range(1, 24, 2)}, "max_seq_len": 131072},
        "moe": {
            "experts": {"num_experts": 32, "d_expert": 2880, "bias": True, "clamp": {}},
            "router": top(4, gate={"type": "linear", "bias": True}, score="logits", weigh="softmax"),
        },
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_totals_come_out(name: str) -> None:
    size = measure(build(ModelConfig, UNTIED | CONFIGS[name]), 2)
    assert (size.total.all, size.active.all, size.kv_bytes_per_token) == PUBLISHED[name]
