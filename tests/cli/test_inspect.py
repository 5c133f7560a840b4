"""``moeforge inspect``: the same numbers from a recipe and from a model folder."""

import json

from safetensors.torch import load_file


def test_a_recipe_and_the_model_made_from_it_agree(call, tiny, run_folder):
    recipe = json.loads(call("inspect", tiny, "--json").out)
    code, out, _ = call("inspect", run_folder, "--json")
    assert code == 0
    assert json.loads(out) == recipe


def test_parameters_by_the_three_conventions_are_those_on_disk(call, run_folder):
    found = json.loads(call("inspect", run_folder, "--json").out)
    tensors = load_file(run_folder / "model" / "model.safetensors")
    total = sum(tensor.numel() for tensor in tensors.values())
    assert found["total_params"] == {
        "all": total,
        "without_input_embedding": total - 257 * 16,
        "without_embeddings": total - 257 * 16,
    }
    # Two of four experts rest; each has three matrices of 16 x 8.
    assert found["active_params"]["all"] == total - 2 * 3 * 16 * 8
    assert found["weight_bytes"] == 4 * total
    assert [set(layer) & {"d_ff", "experts"} for layer in found["layers"]] == [{"d_ff"}, {"experts"}]


def test_tables_name_every_layer_and_memory(call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    code, out, _ = call("inspect", "pr-moe", "--model.num_kv_heads=2")
    assert code == 0
    for part in ("dense 256 swiglu", "experts 32 x 128 swiglu", "1 x 128 swiglu, sum", "KV cache", "4 x 16, 2 kv"):
        assert part in " ".join(out.split())
    assert "context 1,024" in out and "passed" not in out


def test_repeats_and_layers_without_attention_are_named(call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    _, out, _ = call("inspect", "dense", "--model.num_repeats=3", "--model.layers={1: {attends: false}}")
    assert "all layers are passed 3 times, with the same weights" in out
    assert [line.split()[3] for line in out.splitlines() if "dense 256" in line] == ["4", "none", "4", "4"]


def test_routed_heads_and_rows_cut_into_heads_are_shown(call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert "5 of 16 x 16, 1 kv" in call("inspect", "mixture-of-heads").out
    layer = json.loads(call("inspect", "multi-head-moe", "--json").out)["layers"][0]
    assert layer["experts_per_token"] == 8 and "heads_per_token" not in layer


def test_settings_of_a_recipe_can_be_changed_but_not_of_a_model(call, tiny, run_folder):
    wide = json.loads(call("inspect", tiny, "--json", "--model.d_model=32").out)
    assert wide["d_model"] == 32
    code, _, err = call("inspect", run_folder, "--model.d_model=32")
    assert code == 2
    assert "only a recipe's can be changed" in err


def test_what_is_neither_recipe_nor_model(call, tmp_path):
    code, _, err = call("inspect", "swich")
    assert code == 2 and "Did you mean 'switch'?" in err
    code, _, err = call("inspect", tmp_path)
    assert code == 2 and "is no model folder" in err
