"""``moeforge plan`` from the shell: recipes and folders, and what a user gets wrong."""

import json

import pytest
import yaml

CLUSTER = """
nodes: 2
devices_per_node: 4
memory: 1 GB
flops: 1 TFLOP/s
bandwidth: 100 GB/s
inside: {latency: 10 us, bandwidth: 10 GB/s}
between: {latency: 50 us, bandwidth: 1 GB/s}
host: 1 GB/s
"""


@pytest.fixture
def cluster(tmp_path):
    path = tmp_path / "cluster.yaml"
    path.write_text(CLUSTER)
    return path


def planned(call, *arguments: object) -> dict:
    code, out, err = call("plan", *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def test_a_recipe_and_the_model_made_from_it_cost_the_same(call, tiny, run_folder, cluster):
    recipe = planned(call, tiny, "--cluster", cluster, "--batch_size=8")
    same = ("--batch_size=8", "--seq_len=32", "--dtype=float32")
    folder = planned(call, run_folder, "--cluster", cluster, *same)
    assert recipe["meshes"] == folder["meshes"] and recipe["bytes"] == folder["bytes"]
    assert recipe["tokens_per_step"] == 8 * 32
    assert {mesh["expert"] for mesh in recipe["meshes"]} == {1, 2, 4}  # four experts do not go to eight processes


def test_the_table_ends_with_the_command_to_run(call, tiny, cluster):
    code, out, err = call("plan", tiny, "--cluster", cluster, "--batch_size=8", "--ep", 4, "--shard")
    assert code == 0, err
    assert f"torchrun --nnodes 2 --nproc-per-node 4 ... -m moeforge train {tiny} --ep=4 --shard --batch_size=8" in out
    assert "all_to_all" in out and "activations" in out and "data 2 x expert 4, sharded" in out


def test_processes_without_a_row_are_counted(call, tiny, cluster):
    assert "6 processes have no row" in call("plan", tiny, "--cluster", cluster).out


def test_a_runs_loads_are_its_own_last_ones(call, tiny, run_folder, cluster):
    spread = planned(call, tiny, "--cluster", cluster, "--ep", 4, "--loads", run_folder)
    even = planned(call, tiny, "--cluster", cluster, "--ep", 4)
    assert spread["bytes"]["all_reduce"] == even["bytes"]["all_reduce"]
    assert spread["bytes"]["all_to_all"] == pytest.approx(even["bytes"]["all_to_all"], rel=0.5)
    assert spread["bytes"] != even["bytes"]


def test_a_timeline_is_written(call, tiny, cluster, tmp_path):
    code, _, err = call("plan", tiny, "--cluster", cluster, "--timeline", tmp_path / "step.svg")
    assert code == 0 and (tmp_path / "step.svg").read_text().startswith("<svg"), err


@pytest.mark.parametrize(
    "options, flags",
    [
        (["--tp", "2", "--two-level"], "--ep=4 --node-size=4 --two-level --tp=2"),
        (["--fetch"], "--ep=4 --fetch"),
        (["--by-index", "--uneven"], "--ep=4 --uneven --by-index"),
        (["--placement", "PLACES"], "--ep=4 --placement=PLACES"),
        (["--offload", "--shard"], "--ep=4 --shard --offload"),
    ],
)
def test_what_train_can_do_is_planned(call, tiny, cluster, tmp_path, options, flags):
    file = tmp_path / "places.yaml"
    file.write_text("layer_01: [1, 0, 3, 2]", encoding="utf-8")
    options = [str(file) if option == "PLACES" else option for option in options]
    code, told, err = call("plan", tiny, "--cluster", cluster, "--ep", "4", "--no-shard", *options, "--json")
    assert code == 0 and flags.replace("PLACES", str(file)) in json.loads(told)["command"], err


@pytest.mark.parametrize("options", [[], ["--replicas", "2"], ["--transfers"]], ids=str)
def test_places_are_written_for_a_run(call, run_folder, tmp_path, options):
    out = tmp_path / "places.yaml"
    code, told, err = call("plan", run_folder, "--ep", 2, "--place", out, *options, "--json")
    assert code == 0, err
    (row,) = json.loads(told)["layers"]
    assert row["layer"] == 1 and 1 <= row["placed"] <= 2
    (entries,) = yaml.safe_load(out.read_text()).values()
    holders = [entry if isinstance(entry, list) else [entry] for entry in entries]
    assert len(holders) == 4 and sum(map(len, holders)) == 4 + 2 * ("--replicas" in options)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["RUN", "--place", "places.yaml"], "--place needs a run folder, and --ep"),
        (["TINY", "--place", "places.yaml", "--ep", "2"], "is no run"),
        (["RUN", "--place", "places.yaml", "--ep", "3"], "take 2 replicas, or 5, 8"),
        (["RUN", "--place", "places.yaml", "--ep", "3", "--transfers"], "4 experts cannot be spread evenly over 3"),
        (["RUN", "--place", "none/places.yaml", "--ep", "2"], "No such file"),
        (["RUN", "--place", "places.yaml", "--ep", "2", "--steps=3"], "a run's settings are fixed"),
        (["RUN", "--cluster", "CLUSTER", "--replicas", "2"], "--replicas is not about planning: it goes with --place"),
        (["TINY", "--cluster", "CLUSTER", "--nproc", "4"], "--nproc is not about planning: it goes with --profile"),
        (["RUN", "--place", "x.yaml", "--ep", "2", "--cluster", "CLUSTER"], "--cluster is not about --place"),
        (["--profile", "--cluster", "CLUSTER", "--no-shard"], "--shard is not about --profile"),
        (["TINY"], "name a cluster with --cluster FILE"),
        (["--cluster", "CLUSTER"], "name a recipe"),
        (["TINY", "--cluster", "none.yaml"], "none.yaml: No such file"),
        (["TINY", "--cluster", "CLUSTER", "--ep", "3"], "cannot form expert groups of 3"),
        (["TINY", "--cluster", "CLUSTER", "--ep", "8"], "4 experts cannot be spread evenly over 8 processes"),
        (["TINY", "--cluster", "CLUSTER", "--ep", "1", "--chunks", "2"], "--chunks is about experts on several"),
        (["TINY", "--cluster", "CLUSTER", "--tp", "3"], "8 processes cannot form tensor groups of 3"),
        (["TINY", "--cluster", "CLUSTER", "--tp", "4", "--ep", "2"], "num_heads = 2 cannot be cut in 4 slices"),
        (["TINY", "--cluster", "CLUSTER", "--two-level"], "two levels need expert groups that fill several machines"),
        (["TINY", "--cluster", "CLUSTER", "--by-index", "--chunks", "2"], "--by-index gathers all rows at once"),
        (["TINY", "--cluster", "CLUSTER", "--by-index", "--fetch"], "--fetch sends no rows, --by-index all of them"),
        (["TINY", "--cluster", "CLUSTER", "--imbalance", "9"], "a layer has 4 experts"),
        (["TINY", "--cluster", "CLUSTER", "--imbalance", "2", "--loads", "RUN"], "leave one out"),
        (["dense", "--cluster", "CLUSTER", "--ep", "2"], "no layer has experts"),
        (["dense", "--cluster", "CLUSTER", "--imbalance", "2"], "no layer has experts"),
        (["scmoe", "--cluster", "CLUSTER", "--loads", "RUN"], "it is a run of another model"),
        (["TINY", "--cluster", "CLUSTER", "--timeline", "step.gif"], "must end in .json"),
        (["TINY", "--cluster", "CLUSTER", "--profile"], "leave the model out"),
        (["--cluster", "CLUSTER", "--profile", "--nproc", "1"], "two processes or more"),
        (["--cluster", "none/here.yaml", "--profile"], "there is no folder none"),
    ],
    ids=str,
)
def test_bad_input_is_one_line(call, tiny, run_folder, cluster, arguments, said):
    places = {"TINY": tiny, "CLUSTER": cluster, "RUN": run_folder}
    code, out, err = call("plan", *(places.get(argument, argument) for argument in arguments))
    assert (code, out) == (2, "") and said in err
