"""Layers in one native call: they compute what the modules do, and leave to them what is of another kind."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moeforge.kernels.apart import apart
from moeforge.kernels.native import engine
from moeforge.kernels.paged import Rows
from moeforge.models import Decoder, ModelConfig
from moeforge.models.decoder import Blocks, Output
from moeforge.models.fused import Whole, fuse
from moeforge.models.weights import hold

pytestmark = pytest.mark.skipif(engine.missing() is not None, reason=f"needs the native engine: {engine.missing()}")

BLOCK, TEXTS = 16, 3
LENGTHS = [21, 1, 18]
SHAPE: dict[str, Any] = {
    **{"vocab_size": 61, "d_model": 48, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "max_seq_len": 64},
    "init": {"type": "normal", "std": 0.3},
    "layers": {0: {"moe": None, "d_ff": 40}},
    "moe": {"experts": {"num_experts": 9, "d_expert": 24}, "router": {"select": {"k": 3}}},
}
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dense": {"moe": None},
    "one head of keys, tied": {"num_kv_heads": 1, "tie_embeddings": True},
    "wide heads, biases": {"head_dim": 40, "attention": {"qkv_bias": True, "o_bias": True}, "mlp_bias": True},
    "sinks, window": {"attention": {"sinks": True}, "window": 5},
    "scale": {"attention": {"scale": 0.2}},
    "norms of heads": {"qk_norm": True},
    "norms of all heads": {"qk_norm": "whole"},
    "part of a head rotates": {"rope_fraction": 0.5},
    "multipliers": {"residual_scale": 0.3, "embedding_scale": 2.0, "logits_divisor": 3.0},
    "gelu": {"activation": "gelu", "moe": {"experts": {"num_experts": 4, "d_expert": 24, "activation": "geglu"}}},
    "relu": {"activation": "relu", "moe": {"experts": {"num_experts": 4, "d_expert": 24, "activation": "relu"}}},
    "shared": {"moe": SHAPE["moe"] | {"shared": {"d_expert": 24, "num_shared_experts": 2, "bias": True}}},
    "shared, gated": {"moe": SHAPE["moe"] | {"shared": {"d_expert": 24, "mix": {"type": "gated"}}}},
    "clip": {"attention": {"clip": 0.5}},
    "clip and norms of heads": {"attention": {"clip": 0.5}, "qk_norm": True},
    "clip and norms of all heads": {"attention": {"clip": 0.5}, "qk_norm": "whole"},
    "neighbours rotate": {"rope_interleaved": True},
    "neighbours in a part of a head rotate": {"rope_interleaved": True, "rope_fraction": 0.5},
    "layers twice": {"num_repeats": 2},
    "output bias": {"output_bias": True},
}
ROUTERS: dict[str, dict[str, Any]] = {
    "softmax, normalised": {"weigh": {"normalize_weights": True, "weight_scale": 1.5}},
    "smallest sum": {"score": {"type": "logits"}, "weigh": {"normalize_weights": True, "min_total": 9.0}},
    "softmax of the chosen": {"score": {"type": "logits"}, "weigh": {"type": "softmax", "weight_scale": 0.5}},
    "softmax twice": {"weigh": {"type": "softmax"}},
    "sigmoid, selection bias": {
        **{"score": {"type": "sigmoid"}, "weigh": {"normalize_weights": True}},
        **{"controller": {"type": "expert_bias"}, "losses": []},
    },
    "two of three groups": {"select": {"k": 3, "num_groups": 3, "top_groups": 2}},
    "the group of the best": {"select": {"k": 2, "num_groups": 3, "top_groups": 1, "group_rank": "best"}},
    "the third best alone": {"select": {"k": 1, "skip": 2}},
    "two after the best, of two groups": {"select": {"k": 2, "skip": 1, "num_groups": 3, "top_groups": 2}},
    "groups of one": {"select": {"k": 2, "num_groups": 9, "top_groups": 4}},
    "groups, selection bias": {
        **{"score": {"type": "sigmoid"}, "select": {"k": 3, "num_groups": 3, "top_groups": 2}},
        **{"controller": {"type": "expert_bias"}, "losses": []},
    },
    "gate with bias": {"gate": {"bias": True}},
    "logits as they are": {"score": {"type": "logits"}},
}


def built(dtype: torch.dtype = torch.float32, **changes: Any) -> Decoder:
    torch.manual_seed(4)
    model = Decoder(ModelConfig.model_validate(SHAPE | changes)).eval()
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.dim() == 1:  # norms, biases and sinks differ from where they start
                tensor.add_(torch.randn_like(tensor) / 5)
    return model.to(dtype)


def routed(router: dict[str, Any]) -> dict[str, Any]:
    return {"moe": SHAPE["moe"] | {"router": {"select": {"k": 3}} | router}}


def passes(model: Decoder, cuts: list[list[tuple[int, int]]], whole: bool) -> list[Output]:
    """One pass for each list of (start, end) of every text, which has nothing there where they are equal."""
    blocks = Blocks(model, 4 * TEXTS, BLOCK)
    assert fuse(model, blocks) == {}
    table = torch.randperm(4 * TEXTS).view(TEXTS, 4)
    outputs = []
    for cut in cuts:
        text = torch.cat([torch.full((end - start,), index) for index, (start, end) in enumerate(cut)])
        position = torch.cat([torch.arange(start, end) for start, end in cut])
        slot = table[text, position // BLOCK] * BLOCK + position % BLOCK
        rows, ids = Rows(text.int(), position, table.int(), slot), ids_of(model)[text, position]
        with torch.no_grad(), apart():
            if whole:
                outputs.append(Whole(model, blocks)(ids, rows, torch.arange(len(ids))))
            else:
                blocks.take(rows)
                outputs.append(model(ids[None], position=position[None], cache=blocks))
    return outputs


def ids_of(model: Decoder) -> Tensor:
    return torch.randint(model.config.vocab_size or 0, (TEXTS, max(LENGTHS)), generator=torch.manual_seed(9))


def assert_same(model: Decoder, tolerance: float, whole: bool = True) -> None:
    (output,) = passes(model, [[(0, length) for length in LENGTHS]], whole)
    at = 0
    for ids, length in zip(ids_of(model), LENGTHS, strict=True):
        with torch.no_grad():
            exact = model(ids[None, :length])
        error = (output.logits[0, at : at + length] - exact.logits[0]).float().norm() / exact.logits.float().norm()
        assert float(error) < tolerance
        for depth, routing in exact.routings.items():
            if tolerance < 1e-3:  # in bf16 experts of nearly the same score change places
                assert output.taken[depth][0][at : at + length].tolist() == chosen(routing)
        at += length
    for depth, routing in exact.routings.items():
        taken, ends = output.taken[depth]
        counts = taken.flatten().bincount(minlength=len(ends))
        assert ends.tolist() == counts.cumsum(0).tolist() and len(ends) == len(routing.route.counts)


def chosen(routing: Any) -> list[list[int]]:
    """Experts of each token, best first by the scores that selection saw."""
    route = routing.route
    by_token: list[list[tuple[int, int]]] = [[] for _ in range(route.num_tokens)]
    experts = torch.repeat_interleave(torch.arange(len(route.counts)), route.counts)
    for token, expert, slot in zip(route.token.tolist(), experts.tolist(), route.slot.tolist(), strict=True):
        by_token[token].append((slot, expert))
    return [[expert for _, expert in sorted(pairs)] for pairs in by_token]


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_it_is_what_the_modules_compute(changes: dict[str, Any]) -> None:
    assert_same(built(**changes), 1e-5)


@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
def test_it_routes_as_the_router_does(router: dict[str, Any]) -> None:
    assert_same(built(**routed(router)), 1e-5)


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_in_bf16_too(changes: dict[str, Any]) -> None:
    """With every expert for every token, so that no near tie decides."""
    moe = changes.get("moe", SHAPE["moe"])
    all_of_them = moe and moe | {"router": {"select": {"k": moe["experts"]["num_experts"]}}}
    assert_same(built(torch.bfloat16, **changes | {"moe": all_of_them}), 0.05)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_with_quantised_weights(weights: str) -> None:
    model = built(
        torch.bfloat16,
        **{"d_model": 128, "layers": {0: {"moe": None, "d_ff": 128}}},
        moe={
            "experts": {"num_experts": 4, "d_expert": 128},
            "router": {"select": {"k": 4}},
            "shared": {"d_expert": 128},
        },
    )
    hold(model, weights)
    assert_same(model, 0.1)  # rows in int8: where two ways round a bf16 differently, a code may be the next one


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_a_row_is_the_same_however_the_texts_are_cut(dtype: torch.dtype, changes: dict[str, Any]) -> None:
    model = built(dtype, **changes)
    whole = passes(model, [[(0, length) for length in LENGTHS]], True)[0].logits[0].split(LENGTHS)
    one_by_one = [[(min(at, n), min(at + 1, n)) for n in LENGTHS] for at in range(max(LENGTHS))]
    halves = [[(0, 9), (0, 0), (0, 0)], [(9, 10), (0, 1), (0, 17)], [(10, 21), (1, 1), (17, 18)]]
    for cuts in (one_by_one, halves):
        got: list[list[Tensor]] = [[] for _ in LENGTHS]
        for cut, output in zip(cuts, passes(model, cuts, True), strict=True):
            for text, part in enumerate(output.logits[0].split([end - start for start, end in cut])):
                got[text].append(part)
        assert all(torch.equal(torch.cat(parts), rows) for parts, rows in zip(got, whole, strict=True))


@pytest.mark.parametrize("changes", [{}, MODELS["shared"], MODELS["multipliers"]])
def test_layers_one_by_one_have_the_bits_of_all_at_once(changes: dict[str, Any]) -> None:
    model, cuts = built(**changes), [[(0, 20), (0, 1), (0, 0)], [(20, 21), (1, 1), (0, 18)]]
    for one, all_at_once in zip(passes(model, cuts, False), passes(model, cuts, True), strict=True):
        assert torch.equal(one.logits, all_at_once.logits)
        for depth, taken in all_at_once.taken.items():
            assert all(torch.equal(a, b) for a, b in zip(one.taken[depth], taken, strict=True))


def test_equal_scores_go_to_the_first_experts() -> None:
    model = built()
    with torch.no_grad():
        for block in model.blocks:
            if block.moe is not None:
                block.moe.router.gate.weight.zero_()
    (output,) = passes(model, [[(0, 3), (0, 0), (0, 0)]], True)
    assert output.taken[1][0].tolist() == [[0, 1, 2]] * 3


@pytest.mark.parametrize("router", [{}, ROUTERS["two of three groups"]], ids=["plain", "groups"])
def test_scores_that_are_no_numbers_choose_different_experts(router: dict[str, Any]) -> None:
    model = built(**routed(router))
    with torch.no_grad():
        model.blocks[1].moe.router.gate.weight.fill_(torch.nan)
    (output,) = passes(model, [[(0, 3), (0, 0), (0, 0)]], True)
    assert all(len({*row}) == 3 and max(row) < 9 for row in output.taken[1][0].tolist())
    assert bool(output.logits.isnan().all())


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "routed heads": ({"attention": {"type": "routed", "num_experts": 4}}, "other heads"),
    "layer norm": ({"norm": "layer"}, "no RMS norms"),
    "momentum": ({"momentum": {"decay": 0.5}}, "momentum"),
    "biased experts": ({"moe": {"experts": {"num_experts": 4, "d_expert": 24, "bias": True}}}, "plain MLPs"),
    "two banks": ({"moe": {"experts": [{"num_experts": 2, "d_expert": 24}] * 2}}, "plain MLPs"),
    "shortcut": ({"moe": SHAPE["moe"] | {"shortcut": True}}, "cut or mixed"),
    "mixed shares": ({"moe": SHAPE["moe"] | {"shared": {"d_expert": 8, "mix": {"type": "coefficient"}}}}, "mixed"),
    "cosine": (routed({"gate": {"type": "cosine"}}), "no linear map"),
    "gate of the token": (routed({"gate": {"reads": "token"}}), "no linear map"),
    "temperature": (routed({"score": {"temperature": 2.0}}), "scores"),
    "relu scores": (routed({"score": {"type": "relu"}, "losses": []}), "scores"),
    "threshold": (routed({"select": {"type": "top_p"}}), "selects"),
    "vectors for experts": (routed({"select": "auxiliary"}), "selects"),
    "weights of one": (routed({"weigh": {"type": "ones"}}), "weighs"),
}


@pytest.mark.parametrize(("changes", "reason"), REFUSED.values(), ids=REFUSED)
def test_another_part_is_left_to_the_modules(changes: dict[str, Any], reason: str) -> None:
    model = built(**changes)
    refused = fuse(model, blocks := Blocks(model, 8, BLOCK))
    assert reason in refused[2] and 2 not in blocks.fused


def test_other_types_are_left_to_the_modules() -> None:
    model = built(torch.float64)
    assert "float64" in fuse(model, Blocks(model, 8, BLOCK))[1]


def test_routers_that_hand_on_what_they_decide_are_left_to_the_modules() -> None:
    model = built(**routed({"gate": {"previous": True}}))
    assert "hand on" in fuse(model, Blocks(model, 8, BLOCK))[0]
