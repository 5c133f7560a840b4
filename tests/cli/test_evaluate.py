"""``moeforge evaluate``: the run's own text by default, others by setting."""

import json
import math

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from moeforge.config import build
from moeforge.data.corpora import split
from moeforge.data.tokenizers import Bytes, Tokenizer, train_or_open
from moeforge.hub.families import FAMILIES
from moeforge.hub.pretrained import save_as
from moeforge.models import Decoder
from moeforge.train import RunConfig


def test_a_run_is_scored_on_its_own_validation_text(call, run_folder):
    code, out, _ = call("evaluate", run_folder, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["data"]["type"] == "files"
    # Bytes are tokens here, so both numbers are the same entropy.
    assert found["bits_per_byte"] == pytest.approx(torch.tensor(found["perplexity"]).log2().item(), rel=1e-3)
    last = json.loads((run_folder / "metrics.jsonl").read_text().splitlines()[-1])
    sampled = json.loads(call("evaluate", run_folder, "--json", "--tokens=500").out)
    assert sampled["bits_per_byte"] == pytest.approx(last["eval/bits_per_byte"], rel=1e-5)
    assert sampled["tokens"] <= 500 < found["tokens"]


def test_other_text_by_path_for_a_model_folder(call, run_folder, text_file):
    code, out, _ = call("evaluate", run_folder / "model", f"--data.path={text_file}", "--seq_len", "32", "--tokens=1k")
    assert code == 0
    assert "bits per byte, perplexity" in out and "held out from files" in out


@torch.no_grad()
def test_a_public_folder_reads_documents_as_its_tokenizer_starts_them(call, tmp_path):
    sizes = {"vocab_size": 258, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "intermediate_size": 8, "max_position_embeddings": 2048}
    inner = train_or_open(Bytes(), []).inner
    inner.add_special_tokens(["<s>"])
    inner.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 257)])
    torch.manual_seed(3)
    model = Decoder(FAMILIES["llama"].read(sizes))
    for weight in model.parameters():
        weight *= 5
    save_as(model, tmp_path / "llama", FAMILIES["llama"], tokenizer=Tokenizer(inner, 256))
    (tmp_path / "text").mkdir()
    for number in range(60):
        (tmp_path / "text" / f"{number}.txt").write_text(f"{number} quick brown foxes", encoding="utf-8")
    data = {"type": "files", "path": str(tmp_path / "text")}
    _, held_out = split(build(RunConfig, {"model": {}, "data": data}, source="test").data)
    assert len(held_out) > 1
    nats = 0.0
    for document in held_out:
        ids = torch.tensor([257, *document.text.encode(), 256][: -1 if document is held_out[-1] else None])
        nats += torch.nn.functional.cross_entropy(model(ids[None, :-1]).logits[0], ids[1:], reduction="sum").item()
    code, out, err = call("evaluate", tmp_path / "llama", "--json", f"--data.path={data['path']}", "--dtype=float32")
    assert code == 0, err
    num_bytes = sum(len(document.text) for document in held_out)
    assert json.loads(out)["bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)


BAD = {
    "an idle setting": (["--steps=3"], "--steps=3 changes no evaluation. Did you mean"),
    "a long window": (["--seq_len=300"], "seq_len = 300 is more than model.max_seq_len = 64"),
    "missing text": (["--data.path=nowhere"], "data.path: nowhere does not exist"),
    "an unknown corpus": (["--data=stdlb"], "Did you mean 'stdlib'?"),
    "no number": (["--tokens=many"], "--tokens=many is no number of tokens"),
    "no token": (["--tokens=0"], "at least one"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input(call, run_folder, what):
    arguments, message = BAD[what]
    code, out, err = call("evaluate", run_folder, *arguments)
    assert (code, out) == (2, "")
    assert message.removesuffix(" Did you mean") in err


TASK = """
task: tiny
dataset_path: json
dataset_kwargs: {data_files: {test: tiny.jsonl}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{text}}"
doc_to_target: "{{rest}}"
metric_list: [{metric: perplexity, aggregation: perplexity, higher_is_better: false}]
"""


@pytest.fixture
def task(tmp_path):
    (tmp_path / "tiny.jsonl").write_text('{"text": "the quick", "rest": "brown fox"}\n' * 3, encoding="utf-8")
    (tmp_path / "tiny.yaml").write_text(TASK, encoding="utf-8")
    return tmp_path / "tiny.yaml"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_tasks_of_the_harness(call, run_folder, task):
    pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'moeforge[eval]'")
    code, out, err = call("evaluate", run_folder, "--tasks", task, "--json", "--batch_size=2")
    assert code == 0, err
    found = json.loads(out)
    assert found["truncated"] == 0 and found["results"]["tiny"]["perplexity,none"] > 1
    code, out, _ = call("evaluate", run_folder, "--tasks", task, "--limit", "2")
    assert code == 0 and out.startswith("tiny  perplexity,none") and len(out.splitlines()) == 1
    code, out, err = call("evaluate", run_folder, "--tasks", task.with_name("gone.yaml"))
    assert (code, out) == (2, "") and "gone.yaml is no task" in err and err.count("\n") == 1


BAD_WITH_TASKS = {
    "text": (["--tasks=x", "--tokens=5"], "--tokens belongs to bits per byte"),
    "a setting of the corpus": (["--tasks=x", "--data=stdlib"], "--data=stdlib changes no task"),
    "no task": (["--limit=3"], "--limit belongs to --tasks"),
}


@pytest.mark.parametrize("what", BAD_WITH_TASKS)
def test_what_does_not_belong_to_tasks(call, run_folder, what):
    arguments, message = BAD_WITH_TASKS[what]
    code, out, err = call("evaluate", run_folder, *arguments)
    assert (code, out) == (2, "") and message in err


def test_without_the_harness_it_says_how_to_get_it(call, run_folder, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = call("evaluate", run_folder, "--tasks=x")
    assert code == 2 and "pip install 'moeforge[eval]'" in err
