"""One layer's wiring: the shortcut past attention, and layers of experts that follow one another without it."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from moeforge.models import Cache, Decoder, measure
from moeforge.models.attention import locate
from tests.models.test_decoder import LENGTH, MOE, decoder, ids
from tests.moe import brute_force
from tests.moe.test_layer import assert_same

TOP_1 = {"select": {"k": 1}, "losses": []}


def positions(model: Decoder, input_ids: Tensor) -> Any:
    return locate(model.config, torch.arange(input_ids.shape[1]).expand_as(input_ids), None, 0)


def unembed(model: Decoder, x: Tensor) -> Tensor:
    return torch.nn.functional.linear(model.norm(x), model.embedding.weight)


def assert_decodes(model: Decoder, input_ids: Tensor) -> None:
    with torch.no_grad():
        cache = Cache(model, len(input_ids), LENGTH)
        logits = [model(part, cache=cache).logits for part in input_ids.split([5, 1, 3], dim=1)]
        torch.testing.assert_close(torch.cat(logits, 1), model(input_ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("recompute", [False, True])
def test_experts_read_before_attention_and_the_shared_branch_after_it(recompute: bool) -> None:
    model, input_ids = decoder(moe=MOE | {"shortcut": True, "shared": {"d_expert": 8}}), ids()
    model.recompute_activations = recompute
    x = model.embedding(input_ids)
    for block in model.blocks:
        before, x = x, x + block.attention(block.attention_norm(x), positions(model, input_ids))
        early_TD, late_TD = (block.mlp_norm(rows).flatten(0, 1) for rows in (before, x))
        shared = block.moe.shared.mlp
        both = brute_force.layer(block.moe, early_TD)  # its shared branch reads the early rows: take that out again
        both = both + brute_force.mlp(late_TD, shared.gate_up_proj.weight, shared.down_proj.weight, "swiglu")
        both = both - brute_force.mlp(early_TD, shared.gate_up_proj.weight, shared.down_proj.weight, "swiglu")
        x = x + both.view_as(x)
    weights = list(model.parameters())
    assert_same(model(input_ids).logits, unembed(model, x), weights, rtol=1e-3, atol=1e-3)
    assert_decodes(model, input_ids)


def test_a_shortcut_changes_the_model_and_costs_nothing() -> None:
    plain, shorter, input_ids = decoder(), decoder(moe=MOE | {"shortcut": True}), ids()
    shorter.load_state_dict(plain.state_dict())
    assert not torch.allclose(plain(input_ids).logits, shorter(input_ids).logits, atol=1e-2)
    assert measure(plain.config) == measure(shorter.config)


PAIRS = {index: {"attends": False} for index in (1, 3)}


def test_two_layers_of_e_experts_are_e_squared_paths() -> None:
    moe = {"experts": {"num_experts": 3, "d_expert": 8}, "router": TOP_1}
    model, input_ids = decoder(moe=moe, num_layers=4, layers=PAIRS), ids(6, 40)
    output = model(input_ids)
    first, second = output.routings[0].route, output.routings[1].route
    taken = [[int(route.expert[route.token.argsort()][token]) for token in range(240)] for route in (first, second)]
    assert set(zip(*taken, strict=True)) == set(itertools.product(range(3), repeat=2))
    x = model.embedding(input_ids)
    for attending, following in ((0, 1), (2, 3)):
        block = model.blocks[attending]
        x = x + block.attention(block.attention_norm(x), positions(model, input_ids))
        for one in (block, model.blocks[following]):
            rows_TD = one.mlp_norm(x).flatten(0, 1)
            x = x + brute_force.layer(one.moe, rows_TD).view_as(x)
    assert_same(output.logits, unembed(model, x), list(model.parameters()), rtol=1e-3, atol=1e-3)
    assert_decodes(model, ids())


def test_a_layer_without_attention_has_neither_its_weights_nor_its_cache() -> None:
    model = decoder("dense", num_layers=4, layers=PAIRS)
    assert sorted({name.split(".")[1] for name in model.state_dict() if ".attention." in name}) == ["0", "2"]
    assert sorted(Cache(model, 1, 4).layers) == [0, 2]
    whole, half = (measure(decoder("dense", num_layers=n).config) for n in (4, 2))
    assert measure(model.config).kv_bytes_per_token == half.kv_bytes_per_token == whole.kv_bytes_per_token // 2
    matrices = sum(p.numel() for p in model.blocks[0].attention.parameters() if p.ndim == 2)
    two_layers = 2 * (2 * matrices + 2 * 4 * 4 * model.config.max_seq_len)
    assert whole.flops_per_token - measure(model.config).flops_per_token == two_layers


@torch.no_grad()
def test_a_stratum_that_a_token_skips_leaves_it_bit_for_bit() -> None:
    """Experts in strata, each with a way past it: a token has between none and all of the strata's experts."""
    bank = [{"num_experts": 3, "d_expert": 8}, {"type": "zero", "num_experts": 2}]
    strata = {index: {"attends": False} for index in (1, 2)}
    model, input_ids = decoder(moe={"experts": bank, "router": TOP_1}, layers=strata), ids(4, 32)
    seen: list[tuple[Tensor, Tensor]] = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, given, passed: seen.append((passed.x, passed.x + passed.added)))
    routings = model(input_ids).routings
    hops_T = torch.zeros(128, dtype=torch.int64)
    for depth, (before, after) in enumerate(seen):
        route = routings[depth].route
        skips_T = (route.expert >= 3)[route.token.argsort()]
        same_T = (before == after).all(-1).flatten()
        assert torch.equal(skips_T, same_T), "exactly those tokens stay as they are that chose to"
        assert depth == 0 or torch.equal(before, seen[depth - 1][1]), "strata follow one another, each once"
        hops_T += ~skips_T
    assert set(hops_T.tolist()) == {0, 1, 2, 3}
