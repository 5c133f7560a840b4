"""``moeforge convert``: whatever opens becomes a folder or a file that others read, or nothing is left."""

import json
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import moeforge
from moeforge.data.document import Document
from moeforge.data.tokenizers import BPE, train_or_open
from moeforge.hub import save
from moeforge.models import Decoder, ModelConfig
from tests.hub import llama2c

transformers = pytest.importorskip("transformers", reason="pip install 'moeforge[hf]'")

SIZES = (16, 24, 2, 4, 2, -270, 64)
PIECES = [
    (-float(rank), piece)
    for rank, piece in enumerate(["b", "a", " ", "aa", "ab", "aba", " a", "aaa", "bb", "é", " ab"])
]
MIXTRAL = {
    "vocab_size": 300,
    "d_model": 16,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "max_seq_len": 64,
    "moe": {"experts": {"num_experts": 4, "d_expert": 24}, "router": {"score": "logits", "weigh": "softmax"}},
}


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A file of llama2.c with its tokenizer beside."""
    llama2c.write_tokenizer(tmp_path / "tok270.bin", PIECES)
    return llama2c.write_weights(tmp_path / "small.bin", SIZES, llama2c.random_tensors(SIZES))


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of our own type that says what Mixtral says."""
    folder = tmp_path_factory.mktemp("ours") / "model"
    torch.manual_seed(0)
    tokenizer = train_or_open(BPE(vocab_size=300), [Document("text", "the cat sat on the mat " * 30)])
    config = {**MIXTRAL, "init": {"type": "normal", "std": 0.3}}
    save(Decoder(ModelConfig.model_validate(config)), tokenizer, folder)
    return folder


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_stories_are_written_as_transformers_writes_them(call, shared_data, tmp_path):
    source, target = shared_data / "weights" / "stories260K.bin", tmp_path / "stories"
    code, out, _ = call("convert", source, target, "--verify")
    assert code == 0
    assert "llama, 260,032 parameters in float32; 42 tensors equal byte for byte, logits within" in out
    theirs = transformers.AutoModelForCausalLM.from_pretrained(target)
    words = transformers.AutoTokenizer.from_pretrained(target)
    asked = words("Once upon a time", return_tensors="pt")
    written = theirs.generate(**asked, max_new_tokens=210, do_sample=False)[0, asked.input_ids.shape[1] :]
    code, out, _ = call("generate", target, "Once upon a time", "--temperature=0", "--max-tokens=210", "--json")
    assert [step["token_id"] for step in json.loads(out)["steps"]] == written.tolist() and len(written) == 210
    text = json.loads(out)["text"]
    assert text == words.decode([*asked.input_ids[0], *written], skip_special_tokens=True).removeprefix(
        "Once upon a time"
    )
    assert text.startswith(", there was a little girl named Lily. She loved to play outside in the park.")


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_weights_are_written_in_the_type_asked_for(call, weights, tmp_path, dtype):
    code, out, _ = call("convert", weights, tmp_path / "out", f"--dtype={dtype}", "--verify")
    assert code == 0 and "equal byte for byte, logits within" in out
    name = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[dtype]
    assert {str(t.dtype) for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {f"torch.{name}"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == name


def test_what_we_trained_becomes_the_family_that_says_the_same(call, ours, tmp_path):
    code, out, _ = call("convert", ours, tmp_path / "out", "--verify")
    assert code == 0 and "out: mixtral, " in out and "of MixtralForCausalLM" in out
    ids = torch.arange(10)[None]
    assert torch.equal(moeforge.load(tmp_path / "out")(ids).logits, moeforge.load(ours)(ids).logits)
    assert call("convert", tmp_path / "out", tmp_path / "again").code == 0
    for name in left(tmp_path / "out"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_what_no_family_says_stays_ours(call, run_folder, tmp_path):
    code, out, _ = call("convert", run_folder, tmp_path / "out", "--verify", "--dtype=bf16")
    assert code == 0 and "out: moeforge, " in out and "equal byte for byte" in out
    assert moeforge.load(tmp_path / "out").config == moeforge.load(run_folder).config


def test_pickles_are_opened_only_when_asked_for(call, weights, tmp_path):
    folder = tmp_path / "pickled"
    assert call("convert", weights, folder).code == 0
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    code, _, err = call("convert", folder, tmp_path / "out")
    assert code == 2 and "holds pickles" in err and not (tmp_path / "out").exists()
    assert call("convert", folder, tmp_path / "out", "--pickle", "--verify").code == 0
    assert left(tmp_path / "out") >= {"model.safetensors", "tokenizer.json"} and "pytorch_model.bin" not in left(
        tmp_path / "out"
    )


def test_an_old_target_stays_unless_force_is_given(call, weights, tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "precious").touch()
    code, _, err = call("convert", weights, target)
    assert code == 2 and "out exists: name another, or add --force to write over it" in err
    assert left(target) == {"precious"}
    assert call("convert", weights, target, "--force").code == 0
    assert "precious" not in left(target) and "config.json" in left(target)
    code, _, err = call("convert", weights, target, "--force", "--to=gguf")
    assert code == 2 and "out is a folder, and would become the other: remove it first" in err
    assert left(tmp_path) == {"out", "small.bin", "tok270.bin"}


BAD = {
    "nothing": (["nowhere", "out"], "nowhere is no model folder"),
    "no model": ([".", "out"], "is no model folder: it has no config.json"),
    "no weights": (["tok270.bin", "out"], "does not begin with the sizes of a model"),
    "a pickle that is none": (["small.bin", "out", "--pickle"], "is no pickle: leave --pickle out"),
    "a tokenizer too many": ([".", "out", "--tokenizer=tok270.bin"], "--tokenizer is for files of llama2.c"),
    "a type that is none": (["small.bin", "out", "--dtype=int3"], "'int3' is not one of 'bf16', 'fp16', 'fp32'"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input(call, weights, monkeypatch, what):
    monkeypatch.chdir(weights.parent)
    arguments, message = BAD[what]
    code, out, err = call("convert", *arguments)
    assert (code, out) == (2, "") and message in err
    assert left(weights.parent) == {"small.bin", "tok270.bin"}


def test_a_file_cut_short_leaves_nothing(call, weights):
    weights.write_bytes(weights.read_bytes()[:-100])
    code, _, err = call("convert", weights, weights.with_name("out"))
    assert code == 2 and "bytes, but the sizes that it begins with ask for" in err
    assert left(weights.parent) == {"small.bin", "tok270.bin"}


@pytest.mark.parametrize("target", ["out", "out.gguf"])
def test_a_full_disk_leaves_what_was_there(call, weights, target):
    path = weights.with_name(target)
    assert call("convert", weights, path).code == 0
    before = {file: file.read_bytes() for file in path.parent.rglob("*") if file.is_file()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, hard))
    try:
        code, _, err = call("convert", weights, path, "--force")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 2 and f"cannot write {path}" in err
    assert {file: file.read_bytes() for file in path.parent.rglob("*") if file.is_file()} == before


def test_what_does_not_verify_is_not_left(call, weights, monkeypatch):
    from moeforge.hub import pretrained

    def spoilt(folder: Path, sizes, get, limit) -> None:
        write(folder, sizes, lambda name: get(name) + (name == "model.norm.weight"), limit)

    write = pretrained.write
    monkeypatch.setattr(pretrained, "write", spoilt)
    code, _, err = call("convert", weights, weights.with_name("out"), "--verify")
    assert code == 2 and "does not give back the model: norm.weight" in err
    assert left(weights.parent) == {"small.bin", "tok270.bin"}


def test_a_class_that_computes_something_else_is_told(call, weights, monkeypatch):
    from transformers import LlamaForCausalLM

    forward = LlamaForCausalLM.forward
    monkeypatch.setattr(LlamaForCausalLM, "forward", lambda self, ids: _moved(forward(self, ids)))
    code, _, err = call("convert", weights, weights.with_name("out"), "--verify")
    assert code == 2 and "logits differ from those of LlamaForCausalLM by 0.5" in err
    assert left(weights.parent) == {"small.bin", "tok270.bin"}


def _moved(output):
    output.logits[0, 3, 5] += 0.5
    return output


def test_a_run_with_a_key_head_for_each_query_opens_in_transformers(call, tmp_path: Path) -> None:
    config = {name: value for name, value in MIXTRAL.items() if name != "num_kv_heads"}
    tokenizer = train_or_open(BPE(vocab_size=300), [Document("text", "the cat sat on the mat " * 30)])
    save(Decoder(ModelConfig.model_validate(config)), tokenizer, tmp_path / "own")
    code, out, error = call("convert", tmp_path / "own", tmp_path / "theirs", "--verify")
    assert code == 0 and "logits within" in out, error
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["num_key_value_heads"] == 4
