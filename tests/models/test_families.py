"""One decoder, fifteen families: tiny models of transformers with random weights, and ours with the same weights."""

from typing import Any

import pytest
import torch
import yaml

from moeforge.config import build, to_yaml
from moeforge.models import Cache, Decoder, ModelConfig
from tests.models.their_weights import ours_of, randomise

transformers = pytest.importorskip("transformers")

V, D, L, LENGTH = 37, 32, 3, 11
SIZES = {"vocab_size": V, "hidden_size": D, "num_hidden_layers": L, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES |= {"intermediate_size": 24, "max_position_embeddings": 64, "attention_dropout": 0.0, "rms_norm_eps": 1e-6}
SIZES |= {"pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}
OURS = {"vocab_size": V, "d_model": D, "num_layers": L, "num_heads": 4, "num_kv_heads": 2, "d_ff": 24}
OURS |= {"max_seq_len": 64, "tie_embeddings": False, "norm_eps": 1e-6}
BOTH = {"qkv_bias": True, "o_bias": True}
ROPE = {"rope_theta": 10000.0, "rope_type": "default"}


def moe(num_experts: int = 8, d_expert: int = 12, shared: Any = None, experts: Any = None, **router: Any) -> Any:
    bank = {"num_experts": num_experts, "d_expert": d_expert, **(experts or {})}
    return {"experts": bank, "shared": shared, "router": {"losses": [], **router}}


def top(k: int, normalize: bool = True, **more: Any) -> Any:
    return {"select": {"type": "top_k", "k": k}, "weigh": {"normalize_weights": normalize}, **more}


CHOSEN = {"score": "logits", "weigh": "softmax"}
KEPT = {"controller": {"type": "expert_bias", "rate": 0}}
GROUPS = {"type": "top_k", "k": 3, "num_groups": 4, "top_groups": 2}
LATENT = {"type": "latent", "kv_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}
THEIR_LATENT = {name: size for name, size in LATENT.items() if name != "type"} | {"num_key_value_heads": 4}
OURS_LATENT = {name: value for name, value in OURS.items() if name != "num_kv_heads"}
EXPERTS = {"num_local_experts": 8, "num_experts_per_tok": 2}
MANY = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 12}
ROUTED = {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 12, "first_k_dense_replace": 1}
ROUTED |= {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
GRANITE = {"embedding_multiplier": 6.0, "logits_scaling": 4.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2}
SCALES = {"embedding_scale": 6.0, "logits_divisor": 4.0, "residual_scale": 0.5, "attention": {"scale": 0.2}}
SIGMOID = {"score": "sigmoid", "weigh": {"normalize_weights": True, "weight_scale": 2.5}, **KEPT}

FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("Llama", {}, {}),
    "llama, biases, tied": (
        "Llama",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 12},
        {"attention": BOTH, "mlp_bias": True, "tie_embeddings": True, "head_dim": 12},
    ),
    "qwen2, windows above the first layer": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
        {"attention": {"qkv_bias": True}, "window": 4, "layers": {0: {"window": None}}},
    ),
    "qwen3": ("Qwen3", {"head_dim": 12}, {"qk_norm": True, "head_dim": 12}),
    "mixtral": ("Mixtral", EXPERTS, {"moe": moe(d_expert=24, **top(2))}),
    "mixtral, window": ("Mixtral", EXPERTS | {"sliding_window": 5}, {"moe": moe(d_expert=24, **top(2)), "window": 5}),
    "olmoe": (
        "Olmoe",
        {"num_experts": 8, "num_experts_per_tok": 3, "clip_qkv": 0.8},
        {"moe": moe(d_expert=24, **top(3, False)), "qk_norm": "whole", "attention": {"clip": 0.8}},
    ),
    "qwen2_moe, every other layer": (
        "Qwen2Moe",
        MANY | {"shared_expert_intermediate_size": 16, "decoder_sparse_step": 2},
        {
            "moe": moe(shared={"d_expert": 16, "mix": "gated"}, **top(3, False)),
            "moe_every": 2,
            "attention": {"qkv_bias": True},
        },
    ),
    "qwen3_moe, dense layers": (
        "Qwen3Moe",
        MANY | {"norm_topk_prob": True, "head_dim": 8, "mlp_only_layers": [1]},
        {"moe": moe(**top(3)), "qk_norm": True, "layers": {1: {"moe": None}}},
    ),
    "deepseek_v2, best groups": (
        "DeepseekV2",
        THEIR_LATENT | ROUTED | {"q_lora_rank": 14, "topk_method": "group_limited_greedy", "n_shared_experts": 2},
        {
            "moe": moe(
                shared={"d_expert": 12, "num_shared_experts": 2},
                select={**GROUPS, "group_rank": "best"},
                weigh={"weight_scale": 2.5},
            ),
            "attention": {**LATENT, "q_lora_rank": 14},
            "rope_interleaved": True,
            "first_dense_layers": 1,
        },
    ),
    "deepseek_v2, greedy, one query matrix, biases": (
        "DeepseekV2",
        THEIR_LATENT | ROUTED | {"q_lora_rank": None, "attention_bias": True, "mlp_bias": True, "n_shared_experts": 1},
        {
            "moe": moe(
                shared={"d_expert": 12, "bias": True}, select={"type": "top_k", "k": 3}, weigh={"weight_scale": 2.5}
            ),
            "attention": {**LATENT, "bias": True},
            "rope_interleaved": True,
            "first_dense_layers": 1,
            "mlp_bias": True,
        },
    ),
    "deepseek_v3": (
        "DeepseekV3",
        THEIR_LATENT | ROUTED | {"q_lora_rank": 14, "norm_topk_prob": True, "n_shared_experts": 1},
        {
            "moe": moe(shared={"d_expert": 12}, select=GROUPS, **SIGMOID),
            "attention": {**LATENT, "q_lora_rank": 14},
            "rope_interleaved": True,
            "first_dense_layers": 1,
        },
    ),
    "deepseek_v3, stretched, halves": (
        "DeepseekV3",
        THEIR_LATENT
        | ROUTED
        | {
            "q_lora_rank": None,
            "n_shared_experts": 1,
            "rope_interleave": False,
            "rope_parameters": ROPE
            | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 0.7}
            | {"mscale_all_dim": 1.3, "beta_fast": 32, "beta_slow": 1},
        },
        {
            "moe": moe(shared={"d_expert": 12}, select=GROUPS, **SIGMOID),
            "attention": LATENT,
            "first_dense_layers": 1,
            "rope": {"type": "yarn", "factor": 4.0, "original_max_seq_len": 16, "mscale": 0.7, "mscale_all_dim": 1.3},
        },
    ),
    "gpt_oss": (
        "GptOss",
        EXPERTS
        | {"head_dim": 8, "sliding_window": 4, "swiglu_limit": 1.5, "swiglu_alpha": 1.3}
        | {
            "rope_parameters": ROPE
            | {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16, "truncate": False}
        },
        {
            "moe": moe(
                d_expert=24,
                experts={"bias": True, "clamp": {"limit": 1.5, "alpha": 1.3}},
                gate={"type": "linear", "bias": True},
                **CHOSEN,
            ),
            "attention": {**BOTH, "sinks": True},
            "window": 4,
            "layers": {1: {"window": None}},
            "rope": {"type": "yarn", "factor": 8.0, "original_max_seq_len": 16, "truncate": False},
        },
    ),
    "granitemoe": ("GraniteMoe", EXPERTS | GRANITE, {"moe": moe(d_expert=24, **CHOSEN), **SCALES}),
    "granitemoeshared": (
        "GraniteMoeShared",
        EXPERTS | GRANITE | {"shared_intermediate_size": 16},
        {"moe": moe(d_expert=24, shared={"d_expert": 16}, **CHOSEN), **SCALES},
    ),
    "phimoe": (
        "Phimoe",
        EXPERTS | {"lm_head_bias": True, "attention_bias": True, "router_jitter_noise": 0.2},
        {
            "moe": moe(d_expert=24, score="logits", select={"type": "draw", "k": 2, "margin": 0.4}, weigh="drawn"),
            "norm": "layer",
            "output_bias": True,
            "attention": BOTH,
        },
    ),
    "glm4_moe": (
        "Glm4Moe",
        ROUTED
        | {"n_shared_experts": 1, "use_qk_norm": True, "attention_bias": True, "head_dim": 8}
        | {"rope_parameters": ROPE | {"partial_rotary_factor": 0.5}},
        {
            "moe": moe(shared={"d_expert": 12}, select=GROUPS, **SIGMOID),
            "qk_norm": True,
            "attention": {"qkv_bias": True},
            "rope_fraction": 0.5,
            "first_dense_layers": 1,
        },
    ),
    "ernie4_5_moe": (
        "Ernie4_5_Moe",
        {"moe_num_experts": 8, "moe_k": 3, "moe_intermediate_size": 12, "moe_num_shared_experts": 2, "use_bias": True}
        | {"moe_norm_min": 0.3, "rope_parameters": ROPE, "tie_word_embeddings": True},
        {
            "moe": moe(
                shared={"d_expert": 12, "num_shared_experts": 2, "bias": True},
                select={"type": "top_k", "k": 3},
                weigh={"normalize_weights": True, "min_total": 0.3},
                **KEPT,
            ),
            "first_dense_layers": 1,
            "mlp_bias": True,
            "attention": BOTH,
            "rope_interleaved": True,
            "output_bias": True,
            "tie_embeddings": True,
        },
    ),
}


def pair(family: str) -> tuple[Any, Decoder]:
    """The model of transformers with random weights, and ours."""
    name, changes, ours = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**SIZES | {"rope_parameters": dict(ROPE)} | changes)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    theirs = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    randomise(theirs)
    latent = ours.get("attention", {}).get("type") == "latent"
    return theirs, ours_of(theirs, (OURS_LATENT if latent else OURS) | ours, interleaved=name == "GptOss")


@pytest.fixture(scope="module")
def input_ids() -> torch.Tensor:
    return torch.randint(V, (3, LENGTH), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_a_config(family: str, input_ids: torch.Tensor) -> None:
    theirs, ours = pair(family)
    expected, actual = theirs(input_ids).logits, ours(input_ids).logits
    assert expected.abs().max() > 1
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
    assert_same_gradients(theirs, ours, expected, actual)
    with torch.no_grad():
        assert_same_with_padding(theirs, ours, input_ids)
        assert_decodes(ours, input_ids, actual)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_familys_config_survives_being_written(family: str) -> None:
    latent = FAMILIES[family][2].get("attention", {}).get("type") == "latent"
    config = build(ModelConfig, (OURS_LATENT if latent else OURS) | FAMILIES[family][2])
    assert build(ModelConfig, yaml.safe_load(to_yaml(config))) == config


def assert_same_gradients(theirs: Any, ours: Decoder, expected: torch.Tensor, actual: torch.Tensor) -> None:
    """At the embedding, where all of them meet; and no weight of ours is without one."""
    for logits in (expected, actual):
        (logits * torch.linspace(-1, 1, V)).sum().backward()
    reached = theirs.model.embed_tokens.weight.grad
    scale = float(reached.abs().max())
    torch.testing.assert_close(ours.embedding.weight.grad, reached, rtol=1e-3, atol=1e-4 * scale)
    assert [name for name, weight in ours.named_parameters() if weight.grad is None or not weight.grad.any()] == []


def assert_same_with_padding(theirs: Any, ours: Decoder, input_ids: torch.Tensor) -> None:
    mask = torch.ones_like(input_ids)
    mask[0, :4], mask[1, 8:] = 0, 0
    expected, actual = theirs(input_ids, attention_mask=mask).logits, ours(input_ids, mask).logits
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-4)


def assert_decodes(ours: Decoder, input_ids: torch.Tensor, expected: torch.Tensor) -> None:
    cache = Cache(ours, len(input_ids), LENGTH)
    logits = [ours(part, cache=cache).logits for part in input_ids.split([5, 1, 3, 1, 1], dim=1)]
    torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=0, atol=1e-4)
