"""Rows cut into heads: against a loop over tokens and heads, with everything that is known of a row following it."""

import pytest
import torch

from moeforge.config import build
from moeforge.models import Decoder, ModelConfig, dense_twin, measure
from moeforge.moe import Context, MoE, MoEConfig
from tests.models.test_decoder import assert_close, decoder, ids
from tests.moe import brute_force
from tests.moe.test_layer import D, assert_same

BANK = {"num_experts": 6, "d_expert": 5}


def layer(heads: int, **parts: object) -> MoE:
    torch.manual_seed(0)
    return MoE(MoEConfig.model_validate({"experts": BANK, "heads": heads} | parts), D).eval()


@pytest.mark.parametrize("shared", [None, {"d_expert": 3, "mix": "gated"}], ids=["alone", "shared"])
@pytest.mark.parametrize("heads", [2, 4, 8])
def test_heads_are_a_loop_over_heads(heads: int, shared: object) -> None:
    moe, x_TD = layer(heads, shared=shared), torch.randn(7, D, requires_grad=True)
    y_TD, routing = moe(x_TD)
    assert routing.route.num_tokens == 7 * heads and moe.row_width == D // heads
    assert_same(y_TD, brute_force.cut(moe, x_TD), [x_TD, *moe.parameters()])


def test_one_head_is_the_layer_without() -> None:
    moe, x_TD = layer(1), torch.randn(7, D)
    assert MoEConfig.model_validate({"experts": BANK}).heads == 1
    assert not any("proj" in name for name in moe.state_dict() if not name.startswith("banks"))
    assert torch.equal(moe(x_TD)[0], moe.banks[0](x_TD, moe.router(x_TD, Context()).route))


def test_what_is_known_of_a_row_follows_its_parts() -> None:
    embedded_TD, ids_T = torch.randn(3, D), torch.tensor([5, 6, 7])
    context = Context(3, ids_T, embedded_TD, torch.arange(3), ids={"task": ids_T - 5})
    parts = context.split(2)
    assert parts.token_ids.tolist() == [5, 5, 6, 6, 7, 7] and parts.positions.tolist() == [0, 0, 1, 1, 2, 2]
    assert parts.ids["task"].tolist() == [0, 0, 1, 1, 2, 2] and parts.batch_size == 3
    assert torch.equal(parts.embedded.view(3, D), embedded_TD)
    assert context.split(1) is context
    assert Context().split(2) == Context()


@pytest.mark.parametrize(
    "router",
    [
        {"gate": {"type": "lookup", "by": "token", "num_ids": 19, "rows": True}},
        {"gate": {"type": "linear", "reads": "token"}},
        {"gate": "recurrent"},
        {"noise": [{"type": "visible", "common": 9, "experts": 3}]},
        {"losses": [{"type": "load_balancing_loss", "over": "sequence"}]},
    ],
    ids=str,
)
def test_a_decoder_with_heads_sees_no_later_token(router: dict[str, object]) -> None:
    model, input_ids = decoder(moe={"experts": BANK, "router": router, "heads": 4}).eval(), ids()
    changed = input_ids.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 19
    output = model(input_ids)
    assert_close(output.logits[:, :5], model(changed).logits[:, :5])
    for index, routing in output.routings.items():
        for value in model.moe_layers[index].router.balance_losses(routing, len(input_ids)).values():
            assert 0.9 < value < 7


def test_counts_and_the_dense_twin() -> None:
    tree = {"vocab_size": 256, "d_model": 64, "num_layers": 2, "max_seq_len": 32, "moe": {"experts": BANK}}
    plain = build(ModelConfig, tree)
    cut = build(ModelConfig, tree | {"moe": {"experts": BANK, "heads": 4, "shared": {"d_expert": 3}}})
    size, base = measure(cut), measure(plain)
    assert size.total.all == sum(p.numel() for p in Decoder(cut).parameters())
    work = 2 * 64 * 64 + 4 * (16 * 6 + 2 * 3 * 16 * 5 + 3 * 16 * 3)
    assert size.flops_per_token - base.flops_per_token == 2 * 2 * (work - (64 * 6 + 2 * 3 * 64 * 5))
    assert size.active == size.total, "four heads with two experts each need as many weights as six experts have"
    few = measure(build(ModelConfig, tree | {"moe": {"experts": BANK, "heads": 2}}))
    assert few.total.all - few.active.all == 2 * (6 - 4) * 3 * 32 * 5
    assert 1 <= measure(dense_twin(cut)).flops_per_token / size.flops_per_token < 1.01


def test_heads_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match=r"d_model = 8 is not divisible by moe.heads = 3"):
        layer(3)
    with pytest.raises(ValueError, match=r"d_model = 64 is not divisible by moe.heads = 3"):
        ModelConfig.model_validate({"moe": {"experts": BANK, "heads": 3}})
    moe = {"experts": BANK, "router": {"gate": "recurrent"}}
    with pytest.raises(ValueError, match="takes a state of 32 for each of 2 heads, the layer below hands on 32"):
        ModelConfig.model_validate({"moe": moe, "layers": {1: {"moe": {"heads": 2}}}})
    select = {"type": "merged", "over": "segment_before", "segment": 4}
    merged = {"select": select, "score": "logits", "weigh": "softmax", "losses": []}
    with pytest.raises(ValueError, match="with heads a token is several rows"):
        ModelConfig.model_validate({"moe": {"experts": BANK, "heads": 2, "router": merged}})
    keys = {"select": "product_keys", "score": "logits", "losses": [], "gate": {"type": "linear", "previous": True}}
    more = {"moe": {"router": {"select": {"type": "product_keys", "heads": 2}}}}
    with pytest.raises(ValueError, match="its gate takes a state of 16, the layer below hands on 8"):
        moe = {"experts": {"num_experts": 16, "d_expert": 4}, "router": keys}
        ModelConfig.model_validate({"moe": moe, "layers": {1: more}})
