"""Checkpoints of DeepSpeed's MoE training, written here as its engine writes them, with ``torch.save``."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moeforge.cli.main import main
from moeforge.data.tokenizers import Bytes, train_or_open
from moeforge.errors import UserError
from moeforge.hub import deepspeed, open_model, save
from moeforge.models import Decoder, ModelConfig
from tests.hub import families

CONFIG = {
    "vocab_size": 257, "d_model": 16, "num_layers": 4, "num_heads": 2, "d_ff": 32, "activation": "gelu", "moe_every": 2,
    "moe": {
        "experts": {"num_experts": 2, "d_expert": 32, "activation": "gelu"}, "router": {"select": {"k": 1}},
        "shared": {"d_expert": 32, "activation": "gelu", "mix": "coefficient"},
    },
    "layers": {3: {"moe": {"experts": {"num_experts": 4}}}},
}  # fmt: skip
MOE = {"router.gate.": "deepspeed_moe.gate.wg.", "shared.mlp.": "mlp.", "shared.gate.": "coefficient."}


def write(folder: Path, dense: dict[str, Tensor], experts: dict[tuple[int, int], dict[str, Tensor]]) -> Path:
    """The files of one tag: (layer with experts, expert) -> its weights."""
    states = folder / "global_step7"
    states.mkdir(parents=True)
    (folder / "latest").write_text("global_step7")
    rest = {"args": argparse.Namespace(lr=1e-3), "global_steps": 7, "ds_version": "0.19.8", "optimizer": None}
    torch.save({"module": dense, **rest}, states / "mp_rank_00_model_states.pt")
    for (layer, expert), weights in experts.items():
        torch.save(weights, states / f"layer_{layer}_expert_{expert}_mp_rank_00_model_states.pt")
    return states


@pytest.fixture
def model() -> Decoder:
    """A pyramid with residual experts."""
    return Decoder(ModelConfig.model_validate(CONFIG | {"init": {"type": "normal", "std": 0.3}})).eval()


@pytest.fixture
def checkpoint(tmp_path: Path, model: Decoder) -> Path:
    """Of ``model``, with its config and tokenizer beside."""
    folder = tmp_path / "run"
    dense, experts = {}, {}
    for name, tensor in model.state_dict().items():
        block, _, row = name.partition(".moe.")
        if not row:
            dense[name] = tensor
        elif row.startswith("banks.0."):
            number = {"blocks.1": 0, "blocks.3": 1}[block]
            for expert, matrix in enumerate(tensor):
                at = f"{block}.moe.deepspeed_moe.experts.deepspeed_experts.{expert}.{row[8:]}.weight"
                experts.setdefault((number, expert), {})[at] = matrix.clone()
        else:
            (theirs,) = [row.replace(ours, there) for ours, there in MOE.items() if row.startswith(ours)]
            dense[f"{block}.moe.{theirs}"] = tensor
    write(folder, dense, experts)
    save(model, train_or_open(Bytes(), []), tmp_path / "ours")
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "ours" / file).rename(folder / file)
    return folder


def test_a_pyramid_with_residual_experts_comes_back_byte_for_byte(model, checkpoint):
    assert len(list((checkpoint / "global_step7").glob("layer_1_expert_*"))) == 4
    found = deepspeed.load(checkpoint)
    for name, tensor in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
    ids = torch.arange(20)[None]
    assert torch.equal(found(ids).logits, model(ids).logits)
    assert deepspeed.load(checkpoint, torch.bfloat16).embedding.weight.dtype == torch.bfloat16


def test_a_family_trained_there_has_its_published_names(tmp_path):
    pytest.importorskip("transformers", reason="pip install 'moeforge[hf]'")
    theirs = families.build("qwen3_moe")
    theirs.save_pretrained(tmp_path / "hf")
    from moeforge.hub.shards import Shards

    shards, dense, experts = Shards(tmp_path / "hf"), {}, {}
    for name in shards.shapes:
        head, middle, rest = name.partition(".mlp.experts.")
        if middle:
            expert, _, matrix = rest.partition(".")
            layer = int(head.rpartition(".")[2])
            at = f"{head}.mlp.deepspeed_moe.experts.deepspeed_experts.{expert}.{matrix}"
            experts.setdefault((layer, int(expert)), {})[at] = shards.get(name).clone()
        else:
            dense[name.replace(".mlp.gate.", ".mlp.deepspeed_moe.gate.wg.")] = shards.get(name).clone()
    write(tmp_path / "run", dense, experts)
    (tmp_path / "hf" / "config.json").rename(tmp_path / "run" / "config.json")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(deepspeed.load(tmp_path / "run")(ids).logits, theirs(ids).logits, atol=1e-4, rtol=0)


def test_the_command_asks_before_it_opens_pickles(capsys, model, checkpoint, tmp_path):
    command = ["convert", str(checkpoint), str(tmp_path / "out")]
    assert main(command) == 2
    assert "is a checkpoint of DeepSpeed, in pickles: if you trust them, add --pickle" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*command, "--pickle", "--verify"]) == 0
    ids = torch.arange(20)[None]
    assert torch.equal(open_model(tmp_path / "out")(ids).logits, model(ids).logits)


CUT = {
    "mp_rank_01_model_states.pt": "cut by tensor parallelism",
    "zero_pp_rank_0_mp_rank_00_model_states.pt": r"ZeRO stage 3: run its zero_to_fp32\.py first",
    "layer_00-model_00-model_states.pt": "cut by pipeline parallelism",
    "expert_0_mp_rank_00_model_states.pt": "numbered without their layer",
    "layer_0_expert_0_mp_rank_01_model_states.pt": "experts are cut by tensor parallelism",
}


@pytest.mark.parametrize("name", CUT)
def test_checkpoints_that_were_cut_otherwise_are_refused(checkpoint, name):
    (checkpoint / "global_step7" / name).touch()
    with pytest.raises(UserError, match=CUT[name]):
        deepspeed.load(checkpoint)


def _without_expert(states: Path) -> None:
    (states / "layer_1_expert_3_mp_rank_00_model_states.pt").unlink()


def _twice(states: Path) -> None:
    one = states / "layer_0_expert_0_mp_rank_00_model_states.pt"
    (states / "layer_7_expert_0_mp_rank_00_model_states.pt").write_bytes(one.read_bytes())


def _more(states: Path) -> None:
    tree = torch.load(states / "mp_rank_00_model_states.pt", weights_only=False)
    tree["module"]["position_embeddings.weight"] = torch.ones(3)
    torch.save(tree, states / "mp_rank_00_model_states.pt")


class Code:
    """What a pickle should not build."""


BROKEN = {
    "an expert lost": (_without_expert, r"missing blocks\.3\.moe\.experts\.3\.down_proj\.weight"),
    "an expert twice": (_twice, r"blocks\.1\.moe\.experts\.0\..* is in layer_0_expert_0_.* and in layer_7_expert_0"),
    "a tensor that means nothing here": (_more, r"unknown position_embeddings\.weight"),
    "the dense file lost": (lambda s: (s / "mp_rank_00_model_states.pt").unlink(), "is missing, damaged"),
    "cut short": (lambda s: (s / "mp_rank_00_model_states.pt").write_bytes(b"PK\x03\x04rest"), "is missing, damaged"),
    "code": (lambda s: torch.save({"module": Code()}, s / "mp_rank_00_model_states.pt"), "or holds more than weights"),
    "no weights": (
        lambda s: torch.save({"module": None}, s / "mp_rank_00_model_states.pt"),
        "holds no weights by name",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_does_not_fit_is_named(checkpoint, what):
    change, message = BROKEN[what]
    change(checkpoint / "global_step7")
    with pytest.raises(UserError, match=message):
        deepspeed.load(checkpoint)


def test_a_config_must_lie_beside(checkpoint, tmp_path):
    (checkpoint / "config.json").unlink()
    with pytest.raises(UserError, match=r"needs a config\.json that says what the model computes"):
        deepspeed.load(checkpoint)
    with pytest.raises(UserError, match="it is no checkpoint of DeepSpeed"):
        deepspeed.load(tmp_path)
    assert json.loads((tmp_path / "run" / "tokenizer_config.json").read_text())["eos_token"]
