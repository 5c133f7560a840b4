"""``moeforge train``: a run from the command line, a dry run, and what it refuses."""

import json

import pytest


def test_a_run_says_where_the_model_is_and_what_to_type_next(call, tiny, tmp_path):
    out = tmp_path / "run"
    code, shown, progress = call("train", "--steps", "3", tiny, "--out", out, "--model.moe.experts.num_experts=6")
    assert code == 0
    assert f"The model is in {out / 'model'}" in shown
    assert f"moeforge generate {out}" in shown and f"moeforge analyze {out}" in shown
    assert "tiny 3/3" in progress
    inside = json.loads((out / "model" / "config.json").read_text())
    assert inside["model"]["moe"]["experts"]["num_experts"] == 6


def test_json_and_quiet_leave_one_object_and_a_second_run_needs_resume(call, tiny, tmp_path):
    out = tmp_path / "run"
    code, shown, progress = call("train", tiny, f"--out={out}", "--steps=3", "--json", "--quiet")
    assert (code, progress) == (0, "")
    found = json.loads(shown)
    assert (found["out"], found["model"], found["metrics"]["step"]) == (str(out), str(out / "model"), 3)

    code, _, err = call("train", tiny, f"--out={out}", "--steps=5")
    assert code == 2
    assert "add --resume" in err
    code, shown, _ = call("train", tiny, f"--out={out}", "--steps=5", "--resume", "--json")
    assert (code, json.loads(shown)["metrics"]["step"]) == (0, 5)


def test_a_dry_run_counts_and_writes_nothing(call, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOEFORGE_ENGINE", "grouped")
    code, shown, _ = call("train", tiny, "--steps=10", "--dry-run", "--json")
    found = json.loads(shown)
    assert code == 0
    assert found["changed"] == {"steps": 10}
    assert (found["tokens"], found["out"]) == (10 * 2 * 32, "runs/tiny")
    assert [(row["engine"], row["layers"]) for row in found["engines"]] == [("grouped", [1])]
    assert found["model"]["total_params"]["all"] > found["model"]["active_params"]["all"] > 0
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_reads_well(call, tiny, monkeypatch):
    monkeypatch.setenv("MOEFORGE_ENGINE", "grouped")
    code, shown, _ = call("train", tiny, "--dry-run")
    assert code == 0
    for part in (
        "engine grouped",
        "memory           about",
        "tokens           384 in 6 steps",
        "changed          nothing",
    ):
        assert part in shown


BAD = {
    "an unknown recipe": (["pr-mo"], "there is no recipe 'pr-mo'. Did you mean 'pr-moe'?"),
    "a path to nothing": (["models/gone"], "models/gone is not there: neither a file nor a folder has this path"),
    "a missing file": (["nowhere.yaml"], "nowhere.yaml: No such file"),
    "an unknown key": (["TINY", "--model.d_modle=3"], "model.d_modle is not a setting. Did you mean 'd_model'?"),
    "an unknown type": (["TINY", "--schedule=cosin"], "Did you mean 'cosine'?"),
    "too many experts": (["TINY", "--model.moe.router.select.k=9"], "9 is more than num_experts = 4"),
    "odd heads": (["TINY", "--model.d_model=15"], "d_model = 15 is not divisible by num_heads = 2"),
    "missing data": (["TINY", "--data.path=nowhere"], "data.path: nowhere does not exist"),
    "an engine that is none": (["TINY", "--model.moe.experts.engine=streming"], "Did you mean 'streaming'?"),
    "capacity with soft slots": (
        ["TINY", "--model.moe.router={select: soft, score: logits, losses: [], capacity: [capacity]}"],
        "model.moe.router: select: soft fills every slot; set losses: [] and neither controller nor capacity",
    ),
    "groups that do not fit": (
        ["TINY", "--model.moe.router.gate=two_level", "--model.moe.experts.num_experts=5"],
        "model.moe: num_experts = 5 is not divisible by gate.num_groups = 2",
    ),
    "ids that a decoder does not know": (
        ["TINY", "--model.moe.router.gate={type: lookup, by: task, num_ids: 3}"],
        "layer 1: gate: lookup by task: a decoder knows token and domain ids",
    ),
    "a bar that nobody passes": (
        ["TINY", "--model.moe.router.select={type: threshold, bar: 1}"],
        "model.moe.router: select: threshold with bar = 1 and score: softmax selects nobody: such a score is never",
    ),
    "no value": (["TINY", "--steps"], "--steps=VALUE"),
}


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("mode", ["--dry-run", "--quiet"])
def test_bad_input_is_a_message_and_exit_code_2(call, tiny, tmp_path, what, mode):
    arguments, message = BAD[what]
    out = tmp_path / "run"
    arguments = [str(tiny) if argument == "TINY" else argument for argument in arguments]
    code, shown, err = call("train", *arguments, mode, f"--out={out}")
    assert (code, shown) == (2, "")
    assert err.startswith("error: ") and message in err
    assert not out.exists()


def test_empty_data(call, tiny, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    for mode in ("--dry-run", "--quiet"):
        code, _, err = call("train", tiny, f"--data.path={empty}", mode, f"--out={tmp_path / 'run'}")
        assert code == 2
        assert "empty.txt is empty" in err


def test_options_that_would_do_nothing_are_refused(call, tiny):
    code, _, err = call("train", tiny, "--dry-run", "--resume")
    assert code == 2
    assert "--resume does nothing beside --dry-run" in err
