"""Layers in one call against the modules they stand for."""

import pytest
import torch

from moeforge.kernels.apart import apart
from moeforge.kernels.native import engine
from moeforge.kernels.paged import Rows
from moeforge.models import Decoder, ModelConfig
from moeforge.models.decoder import Blocks, Output
from moeforge.models.fused import Whole, fuse

pytestmark = pytest.mark.skipif(engine.missing() is not None, reason="needs the native engine")

SHAPE = {
    **{"vocab_size": 97, "d_model": 48, "num_layers": 3, "num_heads": 6, "num_kv_heads": 2, "max_seq_len": 64},
    "init": {"type": "normal", "std": 0.3},
    "moe": {"experts": {"num_experts": 6, "d_expert": 24}, "router": {"select": {"k": 3}}},
}


def with_moe(**parts: object) -> dict[str, object]:
    return {"moe": SHAPE["moe"] | parts}


CASES: dict[str, dict[str, object]] = {
    "plain": {},
    "dense layers first": {"first_dense_layers": 1, "d_ff": 40},
    "norms over heads": {"qk_norm": True},
    "norms over all": {"qk_norm": "whole"},
    "half of a head rotates": {"rope_fraction": 0.5},
    "a window": {"window": 5},
    "biases": {"attention": {"type": "all", "qkv_bias": True, "o_bias": True}},
    "sinks and a scale": {"attention": {"type": "all", "sinks": True, "scale": 0.2}},
    "scaled parts": {"residual_scale": 0.4, "embedding_scale": 3.0, "logits_divisor": 2.0},
    "an untied head": {"tie_embeddings": False},
    "a bias at the end": {"tie_embeddings": False, "output_bias": True},
    "passed twice": {"num_repeats": 2},
    "normalised weights": with_moe(router={"select": {"k": 3}, "weigh": {"type": "scores", "normalize_weights": True}}),
    "softmax of the chosen": with_moe(router={"select": {"k": 2}, "score": "logits", "weigh": "softmax"}),
    "sigmoids with a bias": with_moe(
        router={
            "select": {"k": 2},
            "score": "sigmoid",
            "weigh": {"type": "scores", "normalize_weights": True, "weight_scale": 2.5},
            "controller": "expert_bias",
        }
    ),
    "a gate with a bias": with_moe(router={"gate": {"type": "linear", "bias": True}, "select": {"k": 2}}),
    "shared experts": with_moe(shared={"d_expert": 20, "num_shared_experts": 2}),
    "plain experts": with_moe(experts={"num_experts": 6, "d_expert": 24, "activation": "relu"}),
    "geglu": with_moe(experts={"num_experts": 6, "d_expert": 24, "activation": "geglu"}),
}
LATENT = {"type": "latent", "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
OTHERS: dict[str, dict[str, object]] = {
    "latent": {
        "attention": {
            "type": "latent",
            "kv_lora_rank": 8,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": 8,
        }
    },
    "two banks": with_moe(experts=[{"num_experts": 3, "d_expert": 24}, {"num_experts": 3, "d_expert": 8}]),
    "any number of experts": with_moe(router={"select": {"type": "top_p", "p": 0.5}}),
    "layer norms": {"norm": "layer"},
    "neighbours rotate": {"rope_interleaved": True},
}


PLACES = torch.tensor([[2, 0, 1, 3]], dtype=torch.int32)


def model(dtype: torch.dtype, **changes: object) -> Decoder:
    torch.manual_seed(1)
    shape = SHAPE | changes
    if shape.get("attention") == LATENT:
        del shape["num_kv_heads"]
    made = Decoder(ModelConfig.model_validate(shape)).eval()
    with torch.no_grad():
        for name, weight in [*made.named_parameters(), *made.named_buffers()]:
            if name.endswith(("bias", "sinks", "norm.weight")):
                weight.add_(0.3 * torch.randn(weight.shape))
    return made.to(dtype)


def rows(start: int, count: int) -> Rows:
    position = torch.arange(start, start + count)
    slot = PLACES[0].long()[position // 16] * 16 + position % 16
    return Rows(torch.zeros(count, dtype=torch.int32), position, PLACES, slot)


@torch.no_grad()
def run(decoder: Decoder, how: str, chunks: tuple[int, ...]) -> list[Output]:
    blocks, ids, start, outputs = Blocks(decoder, 4, 16), torch.arange(40) * 7 % 97, 0, []
    if how != "modules":
        assert fuse(decoder, blocks) == {}
    whole = Whole(decoder, blocks) if how == "whole" else None
    for count in chunks:
        place, part = rows(start, count), ids[start : start + count]
        blocks.take(place)
        wanted = torch.arange(count)
        if whole is not None:
            outputs.append(whole(part, place, wanted))
        else:
            with apart():
                outputs.append(decoder(part[None], position=place.position[None], cache=blocks, logits_of=wanted))
        start += count
    return outputs


@pytest.mark.parametrize("how", ["layer by layer", "whole"])
@pytest.mark.parametrize("case", CASES)
def test_the_same_logits_and_experts(case: str, how: str) -> None:
    decoder = model(torch.float32, **CASES[case])
    (plain,), (fused,) = run(decoder, "modules", (40,)), run(decoder, how, (40,))
    torch.testing.assert_close(fused.logits, plain.logits, atol=2e-4, rtol=2e-4)
    for layer, routing in plain.routings.items():
        ids_TK, ends_E = fused.taken[layer]
        assert torch.equal(ends_E.diff(prepend=ends_E.new_zeros(1)).long(), routing.route.counts)
        taken = torch.zeros(40, len(ends_E), dtype=torch.bool).scatter(1, ids_TK.long(), True)
        assert torch.equal(
            taken[routing.route.token, routing.route.expert], torch.ones(ids_TK.numel(), dtype=torch.bool)
        )


@pytest.mark.parametrize("case", ["plain", "norms over heads", "shared experts"])
def test_in_bf16_within_its_rounding(case: str) -> None:
    exact = run(model(torch.float32, **CASES[case]), "modules", (40,))[0].logits
    fused, plain = (
        run(model(torch.bfloat16, **CASES[case]), how, (40,))[0].logits.float() for how in ("whole", "modules")
    )
    ours, theirs = ((logits - exact).norm() / exact.norm() for logits in (fused, plain))
    assert ours < 1.5 * theirs + 0.01


@pytest.mark.parametrize("dtype", engine.TYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_rows_have_the_same_bits_however_a_text_is_cut(case: str, dtype: torch.dtype) -> None:
    decoder = model(dtype, **CASES[case])
    if any(p.dtype != dtype for p in decoder.parameters()):
        pytest.skip("float32 parts in a bf16 model go by modules")
    cuts = [
        torch.cat([output.logits[0] for output in run(decoder, "whole", chunks)])
        for chunks in ((40,), (1,) * 40, (13, 27))
    ]
    assert torch.equal(cuts[0], cuts[1]) and torch.equal(cuts[0], cuts[2])


@pytest.mark.parametrize("case", OTHERS)
def test_other_layers_say_why_they_go_by_modules(case: str) -> None:
    decoder = model(torch.float32, **OTHERS[case])
    refused = fuse(decoder, Blocks(decoder, 4, 16))
    assert set(refused) == {0, 1, 2} and all(refused.values())


def test_ties_go_to_the_lowest_expert() -> None:
    decoder = model(torch.float32)
    with torch.no_grad():
        for block in decoder.blocks:
            block.moe.router.gate.weight.zero_()
    (fused,) = run(decoder, "whole", (40,))
    assert all(
        torch.equal(ids_TK, torch.tensor([[0, 1, 2]] * 40, dtype=torch.int32)) for ids_TK, _ in fused.taken.values()
    )
