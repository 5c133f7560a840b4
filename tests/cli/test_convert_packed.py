"""Experts packed for vLLM and transformers: their own packer and opener agree, and what cannot be packed says so."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import moeforge
from moeforge import hub
from moeforge.errors import UserError
from moeforge.hub.packed import from_int32, pack_experts, to_int32
from moeforge.hub.pretrained import contents

transformers = pytest.importorskip("transformers", reason="pip install 'moeforge[hf]'")
packer = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
families = pytest.importorskip("tests.hub.families")

SIZES = {"hidden_size": 128, "intermediate_size": 128}
FAMILIES = {
    "olmoe": {"hidden_size": 128, "intermediate_size": 64},
    "mixtral": {**SIZES, "tie_word_embeddings": True},
    "qwen3_moe": {"hidden_size": 128, "moe_intermediate_size": 128},
    "deepseek_v3": {"hidden_size": 128, "moe_intermediate_size": 128},
}


@given(st.integers(1, 5), st.integers(1, 3), st.sampled_from([(4, 128), (8, None), (4, None)]))
def test_words_are_what_their_packer_makes(rows: int, groups: int, form: tuple[int, int | None]) -> None:
    bits, group = form
    weight = torch.randn(rows, 128 * groups)
    weight[0, :128] = 0
    words, scales = to_int32(weight, bits, group)
    assert scales.dtype == torch.bfloat16 and scales.shape == (rows, groups if group else 1)
    found = from_int32(words, scales, bits)
    steps = scales.float().repeat_interleave(group or weight.shape[1], 1)
    codes = torch.where(steps > 0, found.float() / steps, 0).round()
    assert torch.equal(words, packer.pack_to_int32(codes.to(torch.int8), bits))
    assert bool(((found.float() - weight).abs() <= 0.51 * steps + weight.abs() / 256).all())


def saved(family: str, folder: Path) -> Path:
    """A small model of transformers in bf16."""
    families.build(family, **FAMILIES[family]).bfloat16().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("family", "experts"), [*((family, "int4") for family in FAMILIES), ("mixtral", "int8")])
@torch.no_grad()
def test_transformers_opens_what_was_packed(call, tmp_path: Path, family: str, experts: str) -> None:
    folder = saved(family, tmp_path / "theirs")
    code, out, error = call("convert", folder, tmp_path / "packed", f"--experts={experts}")
    assert code == 0, error
    assert f"experts in {experts[3]} bits" in out and "equal byte for byte, logits within" in out
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    torch.nn.Module.float(theirs)
    ours = moeforge.load(tmp_path / "packed", dtype=torch.float32)
    ids = torch.arange(9)[None]
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-4, rtol=0)
    before = moeforge.load(folder, dtype=torch.float32)(ids).logits
    assert 0 < float((ours(ids).logits - before).norm() / before.norm()) < {"int4": 0.5, "int8": 0.05}[experts]
    old, new = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "packed"))
    whole = {name for name in old if name in new}
    assert all(torch.equal(old[name], new[name]) for name in whole)
    assert {name for name in old.keys() - whole} == {
        name.removesuffix("_packed") for name in new if name.endswith("_packed")
    }
    assert not any("experts." in name and "shared" not in name for name in whole)
    settings = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert transformers.CompressedTensorsConfig.from_dict(settings).quantization_config.format == "pack-quantized"


def test_what_cannot_be_packed_is_refused(call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = saved("olmoe", tmp_path / "theirs")
    for arguments, why in (
        (("out.gguf", "--experts=int4"), "leave --dtype and GGUF out"),
        (("out", "--experts=int4", "--dtype=fp32"), "leave --dtype and GGUF out"),
    ):
        code, _, error = call("convert", folder, tmp_path / arguments[0], *arguments[1:])
        assert code == 2 and why in error and not (tmp_path / arguments[0]).exists()
    monkeypatch.setattr(hub.verify, "find_spec", lambda name: None)
    code, _, error = call("convert", folder, tmp_path / "out", "--experts=int4")
    assert code == 2 and "pip install 'moeforge[compress]'" in error and not (tmp_path / "out").exists()


def test_rows_that_are_no_groups_are_refused(tmp_path: Path) -> None:
    families.build("olmoe", hidden_size=48).save_pretrained(tmp_path / "m")
    model = moeforge.load(tmp_path / "m")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match=r"do not go into 4 bits: rows of \d+ values cannot be cut into groups of 128"):
        pack_experts(model, model.origin.family.names, 4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_dense_models_and_stacked_experts_are_refused(tmp_path: Path) -> None:
    for family in ("llama", "gpt_oss"):
        if family == "llama":
            config = transformers.LlamaConfig(
                vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
            )
            transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / family)
        else:
            families.build(family).save_pretrained(tmp_path / family)
        model = moeforge.load(tmp_path / family)
        with pytest.raises(UserError, match="no experts with files' tensors of their own"):
            pack_experts(model, model.origin.family.names, 8)


@pytest.mark.parametrize("change", [{"symmetric": False}, {"num_bits": 3}, {"type": "float"}])
def test_other_packings_are_not_guessed(tmp_path: Path, change: dict[str, object]) -> None:
    model = moeforge.load(saved("olmoe", tmp_path / "theirs"))
    packed = pack_experts(model, model.origin.family.names, 8)
    packed.settings["config_groups"]["group_0"]["weights"] |= change
    folder = tmp_path / "packed"
    folder.mkdir()
    contents(model, "packed", model.origin.family, model.origin, experts=packed)(folder)
    with pytest.raises(UserError, match="symmetric whole numbers of 4 or 8 bits"):
        moeforge.load(folder)
