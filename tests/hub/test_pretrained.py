"""Folders of public families: what goes along, what is refused, and in which words."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import moeforge
from moeforge import hub
from moeforge.data.tokenizers import Bytes, train_or_open
from moeforge.errors import UserError
from moeforge.hub.families import FAMILIES
from moeforge.hub.pretrained import Pretrained, save_as
from moeforge.models import Decoder

SIZES: dict[str, Any] = {
    **{"vocab_size": 260, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"num_key_value_heads": 1, "intermediate_size": 8, "num_local_experts": 3, "max_position_embeddings": 32},
}
WEIGHTS = "model.safetensors"
GATE = "model.layers.0.block_sparse_moe.gate.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Mixtral folder as it is published: with a tokenizer, a chat template and a generation config."""
    model = Decoder(FAMILIES["mixtral"].read(SIZES))
    save_as(model, tmp_path / "m", FAMILIES["mixtral"], tokenizer=train_or_open(Bytes(), []))
    (tmp_path / "m" / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    (tmp_path / "m" / "generation_config.json").write_text('{"temperature": 0.7}', encoding="utf-8")
    return tmp_path / "m"


def edit(folder: Path, **changes: Any) -> None:
    """Sets fields of config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes), encoding="utf-8")


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS)


def test_verbs_open_and_save_it_like_a_folder_of_ours(folder, tmp_path):
    model, tokenizer = hub.load(folder)
    assert tokenizer.vocab_size == 257 and model.config.vocab_size == 260, "public vocabularies are rounded up"
    hub.save(model, tokenizer, tmp_path / "again")
    for name in (WEIGHTS, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes(), name
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == json.loads(
        (folder / "config.json").read_text()
    )
    assert hub.read_config(folder) == (model.config, 4)


def test_any_of_several_end_tokens_ends_a_text(folder):
    edit(folder, eos_token_id=[65, 66])
    assert hub.load(folder)[1].end_ids == {65, 66, 256}, "the tokenizer's own ends one too"
    (folder / "generation_config.json").write_text('{"eos_token_id": 67}', encoding="utf-8")
    assert hub.load(folder)[1].end_ids == {67, 256}, "the generation config goes first"
    (folder / "generation_config.json").unlink()
    edit(folder, eos_token_id=None)
    assert hub.load(folder)[1].end_ids == {256}
    edit(folder, eos_token_id=[65, "B"])
    with pytest.raises(UserError, match=r"config\.json: eos_token_id = \[65, 'B'\] is neither a token's id nor a list"):
        hub.load(folder)
    (folder / "generation_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"generation_config\.json cannot be read"):
        hub.load(folder)


def test_fields_that_no_logit_depends_on_come_back(folder, tmp_path):
    edit(folder, torch_dtype="float32", dtype=None, router_aux_loss_coef=0.02, use_cache=False, rope_scaling=None)
    edit(folder, rope_theta=5e5, rope_parameters=None, transformers_version="4.36.0")
    model = moeforge.load(folder)
    assert model.config.rope_theta == 5e5
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_text() == json.dumps(
        json.loads((folder / "config.json").read_text()), indent=2
    ) + "\n"


def test_a_changed_model_changes_what_must_change(folder, tmp_path):
    origin = moeforge.load(folder).origin
    config = origin.family.read(SIZES | {"num_local_experts": 2, "rope_theta": 5e5})
    Pretrained(config, origin).save_pretrained(tmp_path / "small")
    before, after = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "small"))
    assert {name for name in before if before[name] != after.get(name)} == {"num_local_experts", "rope_parameters"}
    assert moeforge.load(tmp_path / "small").config == config


@pytest.mark.parametrize(
    ("setting", "value"),
    [("qk_norm", True), ("layers", {"1": {"moe": None}}), ("moe", {"shared": {"d_expert": 8}}), ("num_repeats", 2)],
)
def test_what_the_family_has_no_field_for_is_named(tmp_path, setting, value):
    tree = FAMILIES["mixtral"].read(SIZES).model_dump()
    changed = {**tree[setting], **value} if isinstance(tree[setting], dict) else value
    model = Decoder(type(FAMILIES["mixtral"].read(SIZES)).model_validate({**tree, setting: changed}))
    with pytest.raises(
        UserError, match=rf"no mixtral, which has no field for: .*{'moe' if setting == 'layers' else setting}"
    ):
        save_as(model, tmp_path / "m", FAMILIES["mixtral"])
    assert not (tmp_path / "m").exists()


def test_shards_have_an_index_and_come_back(folder, tmp_path):
    model = moeforge.load(folder)
    model.save_pretrained(tmp_path / "cut", max_shard_size="5KB")
    files = sorted(path.name for path in (tmp_path / "cut").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "cut" / f"{WEIGHTS}.index.json").read_text())
    assert set(index["weight_map"].values()) == {*files}
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())
    for name, tensor in moeforge.load(tmp_path / "cut").state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
    with pytest.raises(UserError, match="max_shard_size = 'much'"):
        model.save_pretrained(tmp_path / "no", max_shard_size="much")


def test_it_can_be_saved_over_itself(folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "config.json"}
    moeforge.load(folder).save_pretrained(folder)
    assert {name: (folder / name).read_bytes() for name in before} == before


def test_fused_experts_are_read_too(folder):
    ours = moeforge.load(folder).state_dict()

    def fuse(weights: dict[str, torch.Tensor]) -> None:
        for layer in range(2):
            old, new = f"model.layers.{layer}.block_sparse_moe", f"model.layers.{layer}.mlp"
            weights[f"{new}.gate.weight"] = weights.pop(f"{old}.gate.weight")
            w1, w2, w3 = ([weights.pop(f"{old}.experts.{e}.w{n}.weight") for e in range(3)] for n in (1, 2, 3))
            weights[f"{new}.experts.gate_up_proj"] = torch.cat((torch.stack(w1), torch.stack(w3)), 1)
            weights[f"{new}.experts.down_proj"] = torch.stack(w2)

    rewrite(folder, fuse)
    assert all(torch.equal(tensor, ours[name]) for name, tensor in moeforge.load(folder).state_dict().items())


def test_dtype_is_taken_or_asked_for(folder):
    assert moeforge.load(folder).embedding.weight.dtype == torch.float32
    assert {p.dtype for p in moeforge.load(folder, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


def test_parts_of_two_types_lose_nothing(folder):
    before = load_file(folder / WEIGHTS)
    half = "model.layers.0.block_sparse_moe.experts.2.w3.weight"
    rewrite(folder, lambda weights: weights.update({half: weights[half].bfloat16()}))
    bank = moeforge.load(folder).blocks[0].moe.banks[0].gate_up_proj
    assert bank.dtype == torch.float32 and torch.equal(bank[2, 8:], before[half].bfloat16().float())
    assert torch.equal(bank[2, :8], before[half.replace("w3", "w1")])


def test_a_correction_bias_keeps_its_type(tmp_path):
    sizes = SIZES | {"n_group": 1, "topk_group": 1, "n_routed_experts": 3, "num_experts_per_tok": 2, "head_dim": 8}
    del sizes["num_local_experts"]
    model = Decoder(FAMILIES["glm4_moe"].read(sizes | {"moe_intermediate_size": 8}))
    model.blocks[1].moe.router.expert_bias += torch.tensor([1e-4, 0.3, 1.0])
    save_as(model.to(torch.bfloat16), tmp_path / "m", FAMILIES["glm4_moe"])
    for dtype in (None, torch.float16):
        bias = moeforge.load(tmp_path / "m", dtype=dtype).blocks[1].moe.router.expert_bias
        assert torch.equal(bias, model.blocks[1].moe.router.expert_bias) and bias.dtype == torch.float32


def test_layers_that_look_further_ahead_are_left_alone_and_kept(tmp_path):
    sizes = SIZES | {"n_routed_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 8}
    del sizes["num_local_experts"]
    save_as(Decoder(FAMILIES["glm4_moe"].read(sizes)), tmp_path / "m", FAMILIES["glm4_moe"])
    rewrite(tmp_path / "m", lambda weights: weights.update({"model.layers.2.eh_proj.weight": torch.rand(2, 2)}))
    moeforge.load(tmp_path / "m").save_pretrained(tmp_path / "again")
    one, two = load_file(tmp_path / "m" / WEIGHTS), load_file(tmp_path / "again" / WEIGHTS)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_tied_output_matrix_may_be_repeated_but_not_differ(folder):
    edit(folder, tie_word_embeddings=True)
    with pytest.raises(UserError, match=r"tie_word_embeddings is true, but lm_head\.weight differs"):
        moeforge.load(folder)
    rewrite(folder, lambda weights: weights.update({"lm_head.weight": weights["model.embed_tokens.weight"].clone()}))
    assert moeforge.load(folder).output is None


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        (lambda w: [w.pop(GATE), w.pop("model.norm.weight")], [f"missing {GATE}", r"missing model\.norm\.weight"]),
        (lambda w: w.update(extra=torch.ones(1), more=torch.ones(1)), ["2 weights", "unknown extra", "unknown more"]),
        (lambda w: w.update({GATE: torch.ones(4, 16)}), [rf"{GATE} is \[4, 16\], the config wants \[3, 16\]"]),
        (lambda w: w.pop("model.layers.1.block_sparse_moe.experts.2.w3.weight"), [r"missing .*1\..*experts\.2\.w3"]),
    ],
)
def test_weights_that_do_not_fit_are_all_named(folder, change, messages):
    rewrite(folder, change)
    for message in messages:
        with pytest.raises(UserError, match=message):
            moeforge.load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frobnicate": 3, "and_more": None}, "and_more = None is not understood; frobnicate = 3 is not understood"),
        ({"hidden_act": "xyz"}, "hidden_act is 'xyz'; what the decoder has is 'silu', 'swish', 'gelu'"),
        ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "rope_type is 'spiral'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2, "twist": 1}}, "twist"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config: its weights are in 'awq'"),
        ({"architectures": ["MixtralForSequenceClassification"]}, "architectures is .*MixtralForSequenceCl"),
        ({"num_attention_heads": 3}, "d_model = 16 is not divisible by num_heads = 3"),
        ({"hidden_size": "wide"}, "d_model = 'wide'"),
        ({"num_experts_per_tok": 9}, "9 is more than num_experts = 3"),
        ({"model_type": "dots1"}, r"model_type is 'dots1'.*experts_implementation=\"moeforge\""),
        ({"model_type": "jetmoe"}, r"model_type is 'jetmoe'.*in transformers either: its layers cut the rows"),
        ({"model_type": None}, "names no model_type"),
        ({"quantization_config": "awq"}, "quantization_config: 'str' object"),
        ({"dtype": "float7"}, "dtype 'float7' is none that torch knows"),
    ],
)
def test_a_config_that_is_not_understood_is_refused(folder, changes, message):
    edit(folder, **changes)
    with pytest.raises(UserError, match=message):
        hub.load(folder)


def test_a_size_that_is_missing_is_named(folder):
    (folder / "config.json").write_text('{"model_type": "mixtral", "hidden_size": 8}', encoding="utf-8")
    with pytest.raises(UserError, match="vocab_size is missing; num_hidden_layers is missing"):
        moeforge.load(folder)


def test_a_tokenizer_with_more_ids_than_rows_is_refused(folder):
    edit(folder, vocab_size=256)
    with pytest.raises(UserError, match="the model has vocab_size 256, its tokenizer 257"):
        hub.load(folder)


def test_shards_cut_short_missing_or_at_odds_with_their_index(folder, tmp_path):
    cut = tmp_path / "cut"
    moeforge.load(folder).save_pretrained(cut, max_shard_size="5KB")
    last = sorted(cut.glob("*.safetensors"))[-1]
    content = last.read_bytes()
    os.truncate(last, len(content) - 10)
    with pytest.raises(UserError, match=rf"{last.name} is damaged or cut short"):
        moeforge.load(cut)
    last.unlink()
    with pytest.raises(UserError, match=rf"names files that are missing: {last.name}"):
        moeforge.load(cut)
    last.write_bytes(content)
    index = cut / f"{WEIGHTS}.index.json"
    good = index.read_text()
    tree = json.loads(good)
    tree["weight_map"]["model.ghost.weight"] = last.name
    index.write_text(json.dumps(tree), encoding="utf-8")
    with pytest.raises(UserError, match=rf"their files lack: model\.ghost\.weight in {last.name}"):
        moeforge.load(cut)
    for bad in ("{", '{"weight_map": {"a": "../a.safetensors"}}', '{"metadata": {}}'):
        index.write_text(bad, encoding="utf-8")
        with pytest.raises(UserError, match="is no index of weight files"):
            moeforge.load(cut)
    index.write_text(good, encoding="utf-8")
    shutil.copyfile(last, cut / "other.safetensors")
    tree = json.loads(good)
    tree["weight_map"]["model.ghost.weight"] = "other.safetensors"
    index.write_text(json.dumps(tree), encoding="utf-8")
    with pytest.raises(UserError, match=rf"is in {last.name} and in other\.safetensors"):
        moeforge.load(cut)


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("false",)


def test_pickles_are_opened_only_when_asked_for(folder):
    ours = moeforge.load(folder).state_dict()
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    with pytest.raises(UserError, match=r"model\.safetensors is missing"):
        moeforge.load(folder)
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"holds pickles.*pickle=True\) and moeforge convert --pickle"):
        moeforge.load(folder)
    opened = moeforge.load(folder, pickle=True).state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in opened.items())
    torch.save({"model": _Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="is no file of weights, or is damaged"):
        moeforge.load(folder, pickle=True)
    torch.save([1, 2], folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="something else than tensors by name"):
        moeforge.load(folder, pickle=True)


def test_a_failed_save_leaves_nothing_behind(folder, tmp_path):
    model = moeforge.load(folder)
    shutil.rmtree(folder)
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="cannot write"):
        model.save_pretrained(tmp_path / "file" / "below")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


MEASURE = """
import resource, sys
import moeforge
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
moeforge.load(sys.argv[1])
before = peak()
model = moeforge.load(sys.argv[2])
print(peak() - before, sum(parameter.nbytes for parameter in model.parameters()))
"""


def test_loading_holds_the_model_and_one_shard(folder, tmp_path):
    big = FAMILIES["mixtral"].read(SIZES | {"hidden_size": 512, "intermediate_size": 1024, "num_local_experts": 8})
    with torch.device("meta"):
        model = Decoder(big)
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    shard = 20_000_000
    save_as(model, tmp_path / "big", FAMILIES["mixtral"], max_shard_size=shard)
    command = [sys.executable, "-c", MEASURE, str(folder), str(tmp_path / "big")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    grown, size = map(int, done.stdout.split())
    assert size > 5 * shard
    assert grown < size + shard + 10_000_000
