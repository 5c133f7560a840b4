"""Model folders: nothing random after opening, nothing lost in saving, and a clear word when a folder is broken."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import moeforge
from moeforge.data.tokenizers import Bytes, Tokenizer, train_or_open
from moeforge.errors import UserError
from moeforge.hub import load, save
from moeforge.hub.folder import outline
from moeforge.hub.pretrained import fill
from moeforge.hub.whole import write_whole
from moeforge.models import Decoder, ModelConfig

MOE = {
    "experts": [{"num_experts": 3, "d_expert": 8}, {"num_experts": 1, "d_expert": 16, "activation": "relu"}],
    "shared": {"d_expert": 8, "mix": "coefficient"},
    "router": {"select": {"k": 2}, "controller": "expert_bias"},
}


@pytest.fixture
def tokenizer() -> Tokenizer:
    return train_or_open(Bytes(), [])


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    model = Decoder(config())
    model.blocks[1].moe.router.expert_bias += torch.arange(4)
    save(model, tokenizer, tmp_path / "model")
    return tmp_path / "model"


def config(**changes: object) -> ModelConfig:
    settings = {"vocab_size": 257, "d_model": 16, "num_layers": 2, "num_heads": 2, "moe": MOE, "first_dense_layers": 1}
    return ModelConfig.model_validate(settings | changes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_opens_exactly_as_it_was(tmp_path, tokenizer, dtype, tied):
    model = Decoder(config(tie_embeddings=tied, qk_norm=True)).to(dtype).eval()
    save(model, tokenizer, tmp_path / "m")
    opened, read = load(tmp_path / "m")
    assert opened.config == model.config and read.vocab_size == 257 and not opened.training
    for (name, left), (other, right) in zip(model.state_dict().items(), opened.state_dict().items(), strict=True):
        assert name == other and left.dtype == right.dtype and torch.equal(left, right)
    ids = torch.randint(0, 257, (2, 9))
    assert torch.equal(opened(ids).logits, model(ids).logits)


def test_a_layer_is_settled_before_the_next_is_read(folder: Path) -> None:
    found, there = outline(folder), list[set[str]]()

    def settle(block: torch.nn.Module) -> None:
        there.append({name for name, tensor in found.model.state_dict().items() if not tensor.is_meta})
        block.to(torch.float64)

    fill(found.model, found.pieces, found.shards, found.unused, None, "cpu", settle)
    assert [{name.split(".")[1] for name in names} for names in there] == [{"0"}, {"0", "1"}]
    assert all(name.startswith("blocks.") for name in there[1])
    for name, tensor in found.model.named_parameters():
        assert tensor.dtype == (torch.float64 if name.startswith("blocks.") else torch.float32)


def test_a_run_folder_stands_for_the_model_inside(folder):
    assert load(folder.parent)[0].config == load(folder)[0].config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("norm.weight"), "missing norm.weight"),
        (lambda w: w.update(extra=torch.ones(1)), "unknown extra"),
        (lambda w: w.update({"norm.weight": torch.ones(3)}), r"norm.weight is \[3\], the config wants \[16\]"),
    ],
)
def test_weights_that_do_not_fit_are_named(folder, change, message):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(UserError, match=message):
        load(folder)


def test_a_file_cut_short_is_named(folder):
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 10)
    with pytest.raises(UserError, match=r"model\.safetensors is damaged or cut short"):
        load(folder)


def test_no_folder_no_config_other_type_bad_json(tmp_path, folder):
    with pytest.raises(UserError, match="no model folder"):
        load(tmp_path / "nowhere")
    (folder / "config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
    with pytest.raises(UserError, match="model_type is 'gpt2'"):
        load(folder)
    (folder / "config.json").write_text('{"model_type": "moeforge", "dtype": "float7"}', encoding="utf-8")
    with pytest.raises(UserError, match="dtype 'float7' is none that torch knows"):
        load(folder)
    (folder / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="cannot be read"):
        load(folder)


def test_a_tokenizer_of_another_size_is_refused(folder):
    tree = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tree["model"]["vocab_size"] = 300
    (folder / "config.json").write_text(json.dumps(tree), encoding="utf-8")
    with pytest.raises(UserError, match="vocab_size 300, its tokenizer 257"):
        load(folder)


def contents(folder: Path) -> dict[Path, bytes]:
    """Every file below the folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_failed_write_leaves_the_old_folder_and_no_rubbish(folder):
    before = contents(folder)

    def fill(fresh: Path) -> None:
        (fresh / "config.json").write_text("half", encoding="utf-8")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"No space left.*untouched"):
        write_whole(folder, fill)
    assert contents(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_what_was_opened_goes_home_with_all_that_lay_beside_it(folder, tmp_path):
    beside = {"generation_config.json": '{"eos_token_id": [256, 65]}', "chat_template.jinja": "{{ messages }}"}
    for name, text in beside.items():
        (folder / name).write_text(text, encoding="utf-8")
    model = moeforge.load(folder)
    model.save_pretrained(tmp_path / "again")
    save(model, load(folder)[1], tmp_path / "third")
    want = {path.relative_to(folder): data for path, data in contents(folder).items()}
    for again in (tmp_path / "again", tmp_path / "third"):
        assert {path.relative_to(again): data for path, data in contents(again).items()} == want


def test_it_goes_home_in_shards_and_in_another_type(folder, tmp_path):
    model = moeforge.load(folder, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    again = moeforge.load(tmp_path / "again").state_dict()
    for name, weight in model.state_dict().items():
        assert again[name].dtype == weight.dtype and again[name].equal(weight), name
    with pytest.raises(UserError, match="max_shard_size = 'much' is no number of bytes"):
        model.save_pretrained(tmp_path / "none", max_shard_size="much")
    assert not (tmp_path / "none").exists()


def test_every_token_that_ends_a_text_is_kept(tmp_path, tokenizer):
    several = Tokenizer(tokenizer.inner, tokenizer.eos_id, [65, 10])
    save(Decoder(config()), several, tmp_path / "m")
    assert load(tmp_path / "m")[1].end_ids == {10, 65, 256}
