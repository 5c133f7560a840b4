"""Experts that mix tokens: the layer over channels, on the transposed input."""

import pytest
import torch
from pydantic import ValidationError

from moeforge.data.tokenizers import Tokenizer
from moeforge.errors import UserError
from moeforge.generate import engine_for, trace
from moeforge.models import measure
from moeforge.moe import Context, MoE, MoEConfig
from moeforge.train import RunConfig
from tests.models.test_decoder import decoder, ids
from tests.moe import brute_force
from tests.moe.test_layer import assert_same

D, BLOCK = 6, 4
BANK = {"num_experts": 5, "d_expert": 7}
MIXING = {"experts": BANK, "token_block": BLOCK}
ROUTERS = [
    {"select": {"k": 2}},
    {"select": {"type": "top_p", "p": 0.6}},
    {"score": "relu", "select": "threshold", "losses": []},
]


def layer(**parts: object) -> MoE:
    torch.manual_seed(0)
    return MoE(MoEConfig.model_validate(MIXING | parts), D).eval()


@pytest.mark.parametrize("shared", [None, {"d_expert": 3, "mix": "gated"}], ids=["alone", "shared"])
@pytest.mark.parametrize("router", ROUTERS, ids=str)
def test_it_is_the_brute_force_layer_on_each_transposed_block(router: object, shared: object) -> None:
    moe, x = layer(router=router, shared=shared), torch.randn(2, 3 * BLOCK, D, requires_grad=True)
    y, routing = moe(x, Context(batch_size=2))
    expected = [
        torch.cat([brute_force.layer(moe, block_LD.T).T for block_LD in x_LD.split(BLOCK)]) for x_LD in x.unbind()
    ]
    assert routing.route.num_tokens == 2 * 3 * D
    assert_same(y, torch.stack(expected), [x, *moe.parameters()])


def test_a_whole_sequence_as_a_block_is_the_channel_layer_on_the_transposed_sequence() -> None:
    moe, x = layer(), torch.randn(3, BLOCK, D)
    channels = MoE(MoEConfig.model_validate({"experts": BANK}), BLOCK).eval()
    channels.load_state_dict(moe.state_dict())
    assert torch.equal(moe(x, Context(3))[0], channels(x.transpose(1, 2))[0].transpose(1, 2))


@torch.no_grad()
def test_a_token_sees_those_after_it_in_its_block_and_the_config_says_so() -> None:
    moe, x = layer(), torch.randn(1, 2 * BLOCK, D)
    changed = x.clone()
    changed[:, BLOCK - 1] += 1
    same = torch.isclose(moe(x)[0], moe(changed)[0]).all(-1)[0]
    assert not same[0] and same[BLOCK:].all()
    assert not moe.config.decodes and MoEConfig.model_validate({"experts": BANK}).decodes


def test_losses_by_sequence_find_their_sequences() -> None:
    router = {"losses": [{"type": "load_balancing_loss", "over": "sequence"}]}
    moe, x = layer(router=router), torch.randn(2, 2 * BLOCK, D)
    _, both = moe(x, Context(batch_size=2))
    alone = [moe.router.balance_losses(moe(row[None])[1], 1)["load_balancing_loss"] for row in x]
    together = moe.router.balance_losses(both, 2)["load_balancing_loss"]
    torch.testing.assert_close(together, torch.stack(alone).mean())


def test_a_model_of_it_trains_without_attention_is_counted_and_does_not_write() -> None:
    model = decoder(moe=MIXING, attends=False, layers={1: {"moe": {"token_block": None}}})
    assert model.cannot_write == ["layer_00", "layer_02"]
    model(ids(2, 2 * BLOCK)).logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    config = decoder(moe=MIXING, attends=False).config
    # D / block rows per token, each multiplied with the gate and with two experts of three matrices.
    row = BLOCK * 5 + 2 * 3 * BLOCK * 7
    layers, table = 3 * row * config.d_model // BLOCK, 19 * config.d_model
    assert measure(config).flops_per_token == 2 * (layers + table)
    tokenizer = Tokenizer.open  # not reached: the model is refused first
    for use in (lambda: engine_for(model, tokenizer), lambda: trace(model, tokenizer, "a")):  # type: ignore[arg-type]
        with pytest.raises(UserError, match="mixes whole blocks of tokens"):
            use()


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"heads": 2}, "heads cuts tokens"),
        ({"router": {"gate": "hash", "select": {"k": 1}, "losses": []}}, "gate: hash asks what a token is"),
        ({"router": {"gate": {"type": "linear", "reads": "token"}}}, "gate: linear asks"),
        ({"router": {"gate": "recurrent"}}, "gate: recurrent follows a token"),
        ({"router": {"noise": [{"type": "visible", "common": 9, "experts": 3}]}}, "noise: visible goes by"),
        ({"router": {"select": "by_importance"}}, "select: by_importance looks at a sequence's tokens"),
        ({"router": {"select": "soft", "score": "logits", "losses": []}}, "select: soft looks"),
        ({"token_block": 1}, "greater than or equal to 2"),
    ],
)
def test_what_needs_rows_to_be_tokens_is_refused(parts: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        MoEConfig.model_validate(MIXING | parts)


def test_sequences_that_make_no_whole_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="10 tokens cannot be cut into blocks of token_block = 4"):
        layer()(torch.randn(1, 10, D))
    with pytest.raises(ValueError, match="sequences of a batch cannot be cut"):
        layer()(torch.randn(2, BLOCK // 2, D), Context(batch_size=2))
    with pytest.raises(ValidationError, match=r"seq_len = 30 cannot be cut into blocks of moe.token_block = 4"):
        RunConfig.model_validate({"seq_len": 30, "model": {"moe": MIXING}})
