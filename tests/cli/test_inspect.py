"""``moeforge inspect``: the same numbers from a recipe and from a model folder, and those that were published."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.cli import published

KEYS = (
    "family num_layers num_experts top_k total_params active_params active_params_no_input_embedding "
    "active_params_no_embeddings bytes kv_bytes_per_token"
).split()


def inspected(call, *arguments: object) -> dict[str, object]:
    code, out, err = call("inspect", *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def folder(path: Path, config_json: dict[str, object]) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config_json), encoding="utf-8")
    return path


def test_a_recipe_and_the_model_made_from_it_agree(call, tiny, run_folder):
    assert inspected(call, run_folder) == inspected(call, tiny)
    assert inspected(call, run_folder, "--detail") == inspected(call, tiny, "--detail")


def test_parameters_by_the_three_conventions_are_those_on_disk(call, run_folder):
    found = inspected(call, run_folder, "--detail")
    tensors = load_file(run_folder / "model" / "model.safetensors")
    total = sum(tensor.numel() for tensor in tensors.values())
    detail = found.pop("detail")
    assert detail["total_params"] == {
        "all": total,
        "without_input_embedding": total - 257 * 16,
        "without_embeddings": total - 257 * 16,
    }
    # Two of four experts rest; each has three matrices of 16 x 8.
    active = total - 2 * 3 * 16 * 8
    assert detail["active_params"]["all"] == active
    assert [set(layer) & {"d_ff", "experts"} for layer in detail["layers"]] == [{"d_ff"}, {"experts"}]
    assert found == dict(
        zip(
            KEYS, ("moeforge", 2, 4, 2, total, active, *[active - 257 * 16] * 2, 4 * total, 2 * 2 * 16 * 4), strict=True
        )
    )


@pytest.mark.parametrize("name", published.MODELS)
def test_public_models_have_the_parameters_that_were_published(call, tmp_path, name):
    expected, config_json = published.MODELS[name]
    found = inspected(call, folder(tmp_path / "model", config_json))
    assert list(found) == KEYS
    assert found | expected == found
    assert found["family"] == config_json["model_type"] and found["bytes"] == 2 * found["total_params"]
    assert found["active_params_no_embeddings"] < found["active_params_no_input_embedding"] < found["active_params"]


@pytest.mark.parametrize("name", published.DEEPSPEED_MOE)
def test_the_models_of_deepspeed_moe_have_the_parameters_that_were_published(call, tmp_path, name):
    billions, settings = published.DEEPSPEED_MOE[name]
    file = tmp_path / "model.yaml"
    file.write_text(json.dumps({"name": "published", "data": "stdlib", "model": settings}), encoding="utf-8")
    assert round(inspected(call, file)["total_params"] / 1e9, 2) == billions


def test_tables_name_every_layer_and_memory(call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    code, out, _ = call("inspect", "pr-moe", "--model.num_kv_heads=2")
    assert code == 0
    for part in ("dense 256 swiglu", "experts 32 x 128 swiglu", "1 x 128 swiglu, sum", "KV cache", "4 x 16, 2 kv"):
        assert part in " ".join(out.split())
    assert out.startswith("moeforge\n") and "context 1,024" in out and "passed" not in out
    assert "decoding         1.248 MB of weights per token: so few that memory does not bound it" in out


def test_layers_alike_are_one_line_and_a_model_too_large_is_told(call, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "120")
    _, config_json = published.MODELS["DeepSeek-V3"]
    out = call("inspect", folder(tmp_path / "model", config_json)).out
    assert out.startswith("deepseek_v3, stored as fp8: sizes are those once opened\n")
    assert [line.split()[1] for line in out.splitlines() if " swiglu" in line] == ["0-2", "3-60"]
    assert "decoding         not on this machine: its memory is" in out


def test_the_speed_is_the_bandwidth_over_the_weights_that_a_token_reads(call, monkeypatch):
    monkeypatch.setattr("moeforge.cli.speed.read_bandwidth", lambda: 1e9)
    width = [
        "--model.d_model=1024",
        "--model.num_layers=1",
        "--model.layers={}",
        "--model.moe=null",
        "--model.d_ff=4096",
    ]
    total = inspected(call, "dense", *width)["bytes"]
    out = call("inspect", "dense", *width).out
    assert f"at most {1e9 / total:.4g} tokens/s on this machine: {total / 1e6:.4g} MB of weights each, 1 GB/s" in out


def test_repeats_and_layers_without_attention_are_named(call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    _, out, _ = call("inspect", "dense", "--model.num_repeats=3", "--model.layers={1: {attends: false}}")
    assert "all layers are passed 3 times, with the same weights" in out
    assert [line.split()[1:4:2] for line in out.splitlines() if "dense 256" in line] == [
        ["0", "4"],
        ["1", "none"],
        ["2-3", "4"],
    ]


def test_routed_heads_and_rows_cut_into_heads_are_shown(call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert "5 of 16 x 16, 1 kv" in call("inspect", "mixture-of-heads").out
    found = inspected(call, "multi-head-moe", "--detail")
    layer = found["detail"]["layers"][0]
    assert layer["experts_per_token"] == found["top_k"] == 8 and "heads_per_token" not in layer


def test_settings_of_a_recipe_can_be_changed_but_not_of_a_model(call, tiny, run_folder):
    assert inspected(call, tiny, "--detail", "--model.d_model=32")["detail"]["d_model"] == 32
    code, _, err = call("inspect", run_folder, "--model.d_model=32")
    assert code == 2
    assert "only a recipe's can be changed" in err


def test_what_is_neither_recipe_nor_model(call, tmp_path):
    code, _, err = call("inspect", "swich")
    assert code == 2 and "Did you mean 'switch'?" in err
    code, _, err = call("inspect", tmp_path)
    assert code == 2 and "is no model folder" in err
    code, _, err = call("inspect", folder(tmp_path / "other", {"model_type": "jamba"}))
    assert code == 2 and "model_type is 'jamba'" in err and 'experts_implementation="moeforge"' in err
    code, _, err = call("inspect", "dense", "--detail")
    assert code == 2 and "--detail goes with --json" in err
