"""A run that starts with trained weights: exactly those, or nothing."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from moeforge.data.prepare import prepare
from moeforge.errors import UserError
from moeforge.hub import load
from moeforge.models import Decoder
from moeforge.moe import Routing
from moeforge.train import Run, train
from moeforge.train.start import start_from

PLAIN: dict[str, Any] = {"moe": None, "first_dense_layers": 0}
BESIDE = PLAIN | {
    "num_heads": 4,
    "head_dim": 8,
    "attention": {
        "type": "routed",
        "num_experts": 2,
        "keys": "own",
        "frozen_experts": 1,
        "router": {"score": "softmax", "select": {"k": 2}, "weigh": "scores", "losses": []},
    },
}
ATTENTION = [{"steps": 1, "trains": ["*.attention.*"]}]


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "dense"
    train(tiny(model=PLAIN), out, quiet=True)
    return out


def only_prior(routing: Routing) -> Routing:
    """The same route, all weight on the first expert."""
    route = routing.route
    return replace(routing, route=route.with_weight((route.expert == 0).float()))


def test_a_router_forced_to_the_prior_gives_the_trained_model(tiny, tmp_path, trained):
    config = tiny(model=BESIDE, start_from=str(trained), phases=ATTENTION, steps=2, eval_every=2)
    train(config, tmp_path / "run", quiet=True)
    (model, _), (prior, _) = load(tmp_path / "run"), load(trained)
    ids = torch.randint(0, model.config.vocab_size, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mixed, expected = model(ids), prior(ids).logits
        torch.testing.assert_close(mixed.heads[0].route.weight.view(2, -1).sum(0), torch.ones(40))
        assert not torch.allclose(mixed.logits, expected, atol=1e-4)
        for router in model.routers.values():
            router.register_forward_hook(lambda _, __, routing: only_prior(routing))
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(model.blocks[0].attention.q_proj.prior, model.blocks[0].attention.q_proj.weight)


def test_a_run_starts_with_the_weights_it_is_given_and_with_both_attentions_alike(tiny, tmp_path, trained):
    config = tiny(model=PLAIN)
    text = prepare(config.data, config.tokenizer)
    theirs = load(trained)[0].state_dict()
    same, beside = Run(config, tmp_path, text), Run(tiny(model=BESIDE), tmp_path, text)
    start_from(trained, same.model, text.tokenizer)
    assert all(torch.equal(weight, theirs[name]) for name, weight in same.model.state_dict().items())
    start_from(trained, beside.model, text.tokenizer)
    ours = beside.model.state_dict()
    for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
        name = f"blocks.1.attention.{part}"
        for side in ("prior", "weight"):
            assert torch.equal(ours[f"{name}.{side}"][0], theirs[f"{name}.weight"])


def test_experts_become_auxiliary_ones_that_change_nothing_yet_and_then_learn(tiny, tmp_path):
    whole, vectors = ({"select": {"type": kind, "k": 2}} for kind in ("top_k", "auxiliary"))
    train(tiny(model={"moe": {"router": whole}}), tmp_path / "whole", quiet=True)
    config = tiny(model={"moe": {"router": vectors}}, start_from=str(tmp_path / "whole"), optimizer={"weight_decay": 0})
    train(config, tmp_path / "vectors", quiet=True)
    names = [name for name in load(tmp_path / "vectors")[0].state_dict() if "auxiliary" in name]
    assert names == ["blocks.1.moe.router.auxiliary"]
    text = prepare(config.data, config.tokenizer)
    run = Run(config, tmp_path, text)
    start_from(tmp_path / "whole", run.model, text.tokenizer)
    theirs = load(tmp_path / "whole")[0].state_dict()
    ours = run.model.state_dict()
    assert not ours.pop(names[0]).any() and load(tmp_path / "vectors")[0].state_dict()[names[0]].any()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({}, "it has no blocks.1.moe.banks.0.gate_up_proj"),
        (PLAIN | {"d_ff": 24}, "blocks.0.mlp.gate_up_proj.weight has another shape"),
        (PLAIN | {"num_layers": 1}, "no place for its blocks.1.attention.k_proj.weight"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_and_nothing_is_written(tiny, tmp_path, trained, model, message):
    config = tiny(model=model)
    run = Run(config, tmp_path, prepare(config.data, config.tokenizer))
    before = {name: weight.clone() for name, weight in run.model.state_dict().items()}
    with pytest.raises(UserError, match=message):
        start_from(trained, run.model, run.data.tokenizer)
    assert all(torch.equal(weight, before[name]) for name, weight in run.model.state_dict().items())


def test_another_tokenizer_and_no_folder_are_refused(tiny, tmp_path, trained):
    config = tiny(model=PLAIN, tokenizer={"type": "bpe", "vocab_size": 257})
    text = prepare(config.data, config.tokenizer)
    with pytest.raises(UserError, match="has another tokenizer"):
        start_from(trained, Decoder(config.model.replace(vocab_size=257)), text.tokenizer)
    with pytest.raises(UserError, match="nowhere"):
        train(tiny(model=PLAIN, start_from=str(tmp_path / "nowhere")), tmp_path / "run", quiet=True)
