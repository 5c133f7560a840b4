"""``moeforge evaluate``: the run's own text by default, others by setting."""

import json

import pytest
import torch


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
