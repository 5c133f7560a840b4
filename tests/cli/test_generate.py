"""``moeforge generate``: text on stdout, experts on request, one line for bad input."""

import json
import re
import shutil

import pytest


def test_it_continues_the_prompt_and_the_seed_decides(call, run_folder):
    def text(seed: int) -> str:
        code, out, _ = call("generate", run_folder, "para", "--seed", seed, "--max-tokens=20")
        assert code == 0
        return out

    assert text(1).startswith("para") and len(text(1)) > len("para\n")
    assert text(1) == text(1) != text(2)


def test_stdin_is_a_prompt_and_so_is_nothing(call, run_folder):
    greedy = ["--temperature=0", "--max-tokens=3"]
    given = call("generate", run_folder, "para\n", *greedy).out
    assert call("generate", run_folder, *greedy, stdin="para\n\n").out == given
    assert call("generate", run_folder, "-", *greedy, stdin="para\n\n").out == given
    assert call("generate", run_folder, "", *greedy).code == 0


def test_json_has_every_token_with_its_experts(call, run_folder):
    code, out, _ = call("generate", run_folder / "model", "para", "--temperature=0", "--max-tokens=4", "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["prompt"], found["stop"], len(found["steps"])) == ("para", "max_tokens", 4)
    assert "".join(step["text"] for step in found["steps"]) == found["text"]
    assert all(len(step["experts"]["1"]) == 2 for step in found["steps"])


def test_experts_are_shown_for_prompt_and_text_with_a_legend(call, run_folder):
    arguments = ["generate", run_folder, "para", "--temperature=0", "--max-tokens=4"]
    steps = json.loads(call(*arguments, "--json").out)["steps"]
    shown = call(*arguments, "--show-experts", "--layer=1").out
    text, legend, _ = shown.rsplit("\n", 2)
    marks = [int(number) for number in re.findall(r"\[(\d)\]", text)]
    assert text.startswith("p[") and len(marks) == 8
    assert marks[4:] == [step["experts"]["1"][0] for step in steps]
    assert legend == f"strongest of 4 experts in layer 1: {' '.join(map(str, sorted(set(marks))))}"


def test_the_text_has_the_form_that_was_asked_for(call, run_folder, tmp_path):
    pytest.importorskip("llguidance", reason="structured output: pip install 'moeforge[serve]'")
    assert re.fullmatch(r"a[0-9]{3}\n", call("generate", run_folder, "a", "--regex=[0-9]{3}", "--seed=1").out)
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "boolean"}')
    assert call("generate", run_folder, "a", "--json-schema", schema, "--seed=1").out in ("atrue\n", "afalse\n")
    whole = json.loads(call("generate", run_folder, "a", "--seed=1", "--max-tokens=20", "--json").out)["text"]
    stop = whole[5]
    found = json.loads(call("generate", run_folder, "a", "--seed=1", "--max-tokens=20", "--json", "--stop", stop).out)
    assert (found["text"], found["stop"]) == (whole[: whole.index(stop)], "stop")


def test_weights_are_held_as_asked(call, run_folder):
    texts = {
        weights: call("generate", run_folder, "para", "--temperature=0", "--max-tokens=9", "--weights", weights)
        for weights in ("as stored", "int4", "int3")
    }
    assert texts["as stored"].code == texts["int4"].code == 0 and texts["int3"].code == 2
    assert "'int3' is not a choice" in texts["int3"].err


def test_a_full_context_is_said(call, run_folder):
    for seed in range(20):
        code, _, err = call("generate", run_folder, "a" * 60, "--seed", seed)
        if err:
            break
    assert (code, err) == (0, "stopped: the model's context of 64 tokens is full\n")


BAD = {
    "a long prompt": (["a" * 70], "the text has 70 tokens, but the context of 64 has room for 62"),
    "a cold draw": (["a", "--temperature=-1"], "temperature = -1.0: input should be greater than or equal to 0"),
    "an idle option": (["a", "--temperature=0", "--top-p=0.5"], "would do nothing"),
    "two forms": (["a", "--regex=a", "--json-schema=x"], "give one"),
    "no schema": (["a", "--json-schema=nowhere.json"], "nowhere.json cannot be read as a JSON schema"),
    "a layer for nothing": (["a", "--layer=1"], "add --show-experts"),
    "a dense layer": (["a", "--layer=0", "--show-experts"], "layer 0 has no experts. Valid: 1"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input(call, run_folder, what):
    arguments, message = BAD[what]
    code, out, err = call("generate", run_folder, *arguments)
    assert (code, out) == (2, "")
    assert message in err


def test_a_folder_that_is_missing_or_damaged(call, run_folder, tmp_path):
    code, _, err = call("generate", tmp_path / "nowhere", "a")
    assert code == 2
    assert "is no model folder" in err

    model = shutil.copytree(run_folder / "model", tmp_path / "model")
    (model / "config.json").write_text('{"model_type": "moeforge", "mod')
    code, _, err = call("generate", model, "a")
    assert code == 2
    assert "config.json cannot be read" in err
