"""The tables themselves: what is published is understood, and what is written says what was meant."""

import pytest
import torch

import moeforge
from moeforge.hub.families import FAMILIES
from moeforge.hub.families.family import differences
from moeforge.hub.families.rows import At, Joint, Only
from moeforge.hub.pretrained import save_as
from moeforge.hub.shards import Shards
from moeforge.models import Decoder, measure
from tests.cli.published import MODELS
from tests.hub.published import PUBLISHED


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_understood_and_comes_back(name):
    config_json, total = PUBLISHED[name]
    family = FAMILIES[config_json["model_type"]]
    config = family.read(config_json)
    assert measure(config).total.all == total
    assert family.write(config, config_json) == {"architectures": [family.architecture], **config_json}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_config_made_from_nothing_says_the_same(name):
    config_json, _ = PUBLISHED[name]
    family = FAMILIES[config_json["model_type"]]
    config = family.read(config_json)
    assert differences(config, family.read(family.write(config))) == []


def test_deepseek_moe_that_transformers_has_no_class_for_comes_back(tmp_path):
    _, config_json = MODELS["DeepSeekMoE-16B"]
    small = {"num_hidden_layers": 2, "hidden_size": 32, "moe_intermediate_size": 8, "n_routed_experts": 8}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64, "intermediate_size": 16}
    family = FAMILIES["deepseek"]
    model = Decoder(family.read(config_json | small)).eval()
    save_as(model, tmp_path / "m", family)
    names = {*Shards(tmp_path / "m").shapes}
    assert {f"model.layers.1.mlp.{part}.gate_proj.weight" for part in ("experts.7", "shared_experts")} < names
    assert {"model.layers.0.mlp.gate_proj.weight", "model.layers.1.mlp.gate.weight"} < names
    assert family.write(model.config, config_json | small) == config_json | small
    ids = torch.arange(12)[None]
    assert torch.equal(moeforge.load(tmp_path / "m")(ids).logits, model(ids).logits)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_a_field_has_one_row(family):
    fields = [name for row in family.rows for name in row.defaults]
    assert len(fields) == len({*fields}) and not family.inert & {*fields}
    assert all(isinstance(row, At | Only | Joint) for row in family.rows)


def test_two_names_of_one_field_must_agree():
    row = At("k", 8, "moe.router.select.k", also="top")
    assert row.read({"k": 8, "top": 2}) == row.read({"k": 2, "top": 2}) == {"moe.router.select.k": 2}
    with pytest.raises(ValueError, match="k is 4 and top is 2"):
        row.read({"k": 4, "top": 2})


@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.25])
def test_how_much_of_a_head_rotates_comes_back_whatever_the_family_takes_for_granted(fraction):
    glm = FAMILIES["glm4_moe"]
    sizes = {"vocab_size": 64, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8}
    config = glm.read({**sizes, "model_type": "glm4_moe", "rope_parameters": {"partial_rotary_factor": fraction}})
    assert config.rope_fraction == fraction and differences(config, glm.read(glm.write(config))) == []
