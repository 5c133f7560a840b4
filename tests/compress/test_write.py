"""Plans carried out: sizes as predicted, a folder that runs; interrupted runs go on, and bad plans are refused."""

import json
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moeforge.cli.convert import convert
from moeforge.compress.measure import Reference
from moeforge.compress.merge import merge
from moeforge.compress.plan import Plan, Row, packable
from moeforge.compress.profile import profile
from moeforge.compress.stream import Streamed
from moeforge.compress.write import Job
from moeforge.errors import UserError
from moeforge.generate import Settings, opening
from moeforge.hub import load
from moeforge.hub.experts import experts
from moeforge.hub.folder import open_model
from moeforge.kernels.mixed import MixedWeight
from moeforge.kernels.native.quantised import QuantisedWeight
from moeforge.models import Decoder
from moeforge.models.weights import bytes_by_class, hold
from tests.compress.small import batches, model_folder

IDS = torch.arange(40)[None] * 7 % 257


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("write") / "m")


def rows(change: Callable[[int, int], dict[str, object]]) -> list[Row]:
    experts = [*((1, expert) for expert in range(4)), *((2, expert) for expert in range(6))]
    return [
        Row.model_validate({"layer": layer, "expert": expert, **change(layer, expert)}) for layer, expert in experts
    ]


KINDS = [(8, 128), (4, 32), (3, 64), (2, 128), ("vector", 128), ("ternary", 32), ("coded", None), (16, None)]


def mixed(layer: int, expert: int) -> dict[str, object]:
    bits, group = KINDS[(layer + expert) % len(KINDS)]
    return {"bits": bits, "group": group}


def uniform(layer: int, expert: int) -> dict[str, object]:
    return {"bits": 4, "group": 32}


def pruned(layer: int, expert: int) -> dict[str, object]:
    return {"action": "drop"} if (layer, expert) in ((1, 0), (2, 2), (2, 5)) else mixed(layer, expert)


def merged(layer: int, expert: int) -> dict[str, object]:
    if (layer, expert) == (2, 0):
        return {"action": "drop"}
    return {"action": "merge_into", "into": 1} if expert in (2, 3) else {"bits": 8, "group": 128}


@torch.no_grad()
def logits(model: Decoder) -> torch.Tensor:
    return model(IDS).logits.float()


@pytest.mark.parametrize("change", [uniform, mixed, pruned, merged])
def test_the_folder_has_the_bytes_that_were_predicted_and_opens(
    folder: Path, tmp_path: Path, change: Callable[[int, int], dict[str, object]]
) -> None:
    job = Job(Streamed(folder), Plan(rows=tuple(rows(change))))
    job.run(tmp_path / "out")
    on_disk = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert on_disk == sum(job.bytes_by_class().values())
    assert not list(tmp_path.glob(".*"))
    model, tokenizer = load(tmp_path / "out")
    assert tokenizer.vocab_size == 257 and model.config == job.config
    assert bool(logits(model).isfinite().all())
    held = model.moe_layers[1].banks[0].gate_up_proj
    assert isinstance(held, QuantisedWeight if change is uniform else MixedWeight)
    assert bytes_by_class(model)["experts"] <= job.bytes_by_class()["experts"]


def dequantised(folder: Path, original: Path) -> Decoder:
    """The original in bf16, its experts set to what the packed ones stand for."""
    packed, plain = open_model(folder), open_model(original)
    hold(plain, "bf16")
    for layer, moe in plain.moe_layers.items():
        for name in ("gate_up_proj", "down_proj"):
            wide = getattr(packed.moe_layers[layer].banks[0], name).dequantise()
            getattr(moe.banks[0], name).data = wide.to(torch.bfloat16)
    return plain


@pytest.mark.parametrize("change", [uniform, mixed])
def test_it_computes_what_its_dequantised_weights_do(
    folder: Path, tmp_path: Path, change: Callable[[int, int], dict[str, object]]
) -> None:
    Job(Streamed(folder), Plan(rows=tuple(rows(change)))).run(tmp_path / "out")
    found, wanted = logits(open_model(tmp_path / "out")), logits(dequantised(tmp_path / "out", folder))
    assert float((found - wanted).norm() / wanted.norm()) < 2e-2


@pytest.mark.parametrize(("weights", "of_stored"), [("int4", 1.0), ("float32", 1.1)])
def test_packed_experts_take_the_same_bytes_whatever_the_rest_is_held_as(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str, of_stored: float
) -> None:
    Job(Streamed(folder), Plan(rows=tuple(rows(uniform)))).run(tmp_path / "out")
    there = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    monkeypatch.setattr(opening, "available_memory", lambda: there * of_stored)
    with pytest.raises(UserError, match="of memory are free"):
        opening.open_engine(tmp_path / "out", Settings(weights=weights, kv_blocks=1, token_budget=1))


def test_merged_experts_are_one_and_dropped_ones_are_gone_from_the_router(folder: Path, tmp_path: Path) -> None:
    Job(Streamed(folder), Plan(rows=tuple(rows(merged)))).run(tmp_path / "out")
    before, after = open_model(folder).moe_layers, open_model(tmp_path / "out").moe_layers
    held = after[2].banks[0].down_proj
    assert isinstance(held, MixedWeight)
    # Expert 0 is gone, so what was 1 is 0; 2 and 3 share its weights.
    assert held.place[0] == held.place[1] == held.place[2] and len(held.place) == 5
    bank = before[2].banks[0]
    _, mean = merge(bank.gate_up_proj.detach()[1:4], bank.down_proj.detach()[1:4], [1, 1, 1])
    assert float((held.dequantise()[0] - mean).norm() / mean.norm()) < 0.01
    assert torch.equal(after[2].router.gate.weight, before[2].router.gate.weight[1:])
    assert torch.equal(after[2].router.expert_bias, before[2].router.expert_bias[1:])


@torch.no_grad()
def test_the_vector_of_a_dropped_expert_goes_and_others_stay_as_they_are(tmp_path: Path) -> None:
    select = {"router": {"select": {"type": "auxiliary", "k": 3}}}
    folder = model_folder(tmp_path / "m", layers={}, moe={"experts": {"num_experts": 4, "d_expert": 24}} | select)
    original = open_model(folder)
    for moe in original.moe_layers.values():
        moe.router.auxiliary.normal_()
    original.save_pretrained(folder)
    made = [Row(layer=layer, expert=expert, bits=8, group=128) for layer in (1, 2) for expert in range(4)]
    Job(Streamed(folder), Plan(rows=tuple(made))).run(tmp_path / "out")
    found, wanted = logits(open_model(tmp_path / "out")), logits(dequantised(tmp_path / "out", folder))
    assert float((found - wanted).norm() / wanted.norm()) < 2e-2
    made[1] = Row(layer=1, expert=1, action="drop")
    Job(Streamed(folder), Plan(rows=tuple(made))).run(tmp_path / "fewer")
    fewer = open_model(tmp_path / "fewer").moe_layers
    for layer, left in ((1, [0, 2, 3]), (2, [0, 1, 2, 3])):
        assert torch.equal(fewer[layer].router.auxiliary, original.moe_layers[layer].router.auxiliary[left])


def test_weights_outside_experts_can_stay_as_they_are(folder: Path, tmp_path: Path) -> None:
    Job(Streamed(folder), Plan(rows=tuple(rows(uniform)), dense="as stored")).run(tmp_path / "out")
    before, after = open_model(folder).state_dict(), open_model(tmp_path / "out").state_dict()
    assert after and all(torch.equal(before[name], tensor) for name, tensor in after.items())


def test_an_interrupted_run_goes_on_where_it_was(folder: Path, tmp_path: Path) -> None:
    plan, made = Plan(rows=tuple(rows(mixed))), []

    def stop(part: int | None) -> None:
        made.append(part)
        if part == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Job(Streamed(folder), plan).run(tmp_path / "out", stop)
    assert not (tmp_path / "out").exists()
    half = {file.name: file.stat().st_mtime_ns for file in (tmp_path / ".out.unfinished").glob("*.safetensors")}
    assert len(half) == 3
    Job(Streamed(folder), plan).run(tmp_path / "out")
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in half} == half
    Job(Streamed(folder), plan).run(tmp_path / "whole")
    for file in (tmp_path / "whole").glob("*.*"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name


def test_what_was_made_from_other_calibration_is_not_used(folder: Path, tmp_path: Path) -> None:
    streamed, plan, made = Streamed(folder), Plan(rows=tuple(rows(mixed))), list[object]()
    seen, other = (profile(streamed, batches(length)) for length in (600, 700))
    assert seen.fingerprint == profile(streamed, batches()).fingerprint != other.fingerprint

    def stop(part: object) -> None:
        if part == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Job(streamed, plan, seen).run(tmp_path / "out", stop)
    Job(streamed, plan, other).run(tmp_path / "out", made.append)
    Job(streamed, plan, other).run(tmp_path / "whole")
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name


def test_rounding_for_a_text_is_nearer_to_the_original_and_goes_on_where_it_was(folder: Path, tmp_path: Path) -> None:
    def in_two_bits(layer: int, expert: int) -> dict[str, object]:
        return {"action": "merge_into", "into": 1} if (layer, expert) == (2, 2) else {"bits": 2, "group": 128}

    plan, text, streamed = Plan(rows=tuple(rows(in_two_bits)), rounding="gptq"), batches(2000), Streamed(folder)

    def stop(part: int | None) -> None:
        if part == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Job(streamed, plan, text=text).run(tmp_path / "out", stop)
    Job(streamed, plan, text=text).run(tmp_path / "out")
    Job(streamed, plan, text=text).run(tmp_path / "whole")
    Job(streamed, plan, text=batches(600)).run(tmp_path / "other")
    Job(streamed, plan.replace(rounding="nearest"), profile(streamed, text)).run(tmp_path / "nearest")
    files = {
        name: (tmp_path / name / "model-layer-00002.safetensors").read_bytes() for name in ("out", "whole", "other")
    }
    assert files["out"] == files["whole"] != files["other"]
    reference = Reference(streamed, text)
    ours, nearest = (reference.compare(open_model(tmp_path / name)).kl for name in ("out", "nearest"))
    assert ours < 0.9 * nearest
    with pytest.raises(UserError, match="there is none"):
        Job(streamed, plan)


def test_what_another_plan_left_unfinished_is_not_used(folder: Path, tmp_path: Path) -> None:
    def stop(part: int | None) -> None:
        if part == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Job(Streamed(folder), Plan(rows=tuple(rows(mixed)))).run(tmp_path / "out", stop)
    job = Job(Streamed(folder), Plan(rows=tuple(rows(uniform))))
    job.run(tmp_path / "out")
    on_disk = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert on_disk == sum(job.bytes_by_class().values())


def test_a_full_disk_leaves_the_original_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    before = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, hard))
    try:
        with pytest.raises(UserError, match=r"cannot write .*out"):
            Job(Streamed(folder), Plan(rows=tuple(rows(mixed)))).run(tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "out").exists()
    assert {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()} == before


BAD = {
    "names absent experts: 1.4, 7.0": [*rows(uniform), Row(layer=1, expert=4), Row(layer=7, expert=0)],
    "names twice: 1.0": [*rows(uniform), Row(layer=1, expert=0)],
    "misses: 1.0": rows(uniform)[1:],
    "does nothing": rows(lambda layer, expert: {}),
    "does not keep": rows(lambda layer, expert: {"action": "merge_into", "into": 1} if expert == 1 else uniform(1, 1)),
    "select.k = 2": rows(lambda layer, expert: {"action": "drop"} if expert < 3 and layer == 1 else uniform(1, 1)),
    "no expert left": rows(lambda layer, expert: {"action": "drop"} if layer == 1 else uniform(1, 1)),
}


@pytest.mark.parametrize("problem", BAD)
def test_a_plan_that_cannot_be_is_refused(folder: Path, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        Job(Streamed(folder), Plan(rows=tuple(BAD[problem])))


def test_experts_of_other_gates_are_not_dropped(tmp_path: Path) -> None:
    gate = {"moe": {"experts": {"num_experts": 4, "d_expert": 24}, "router": {"gate": "cosine", "select": {"k": 2}}}}
    streamed = Streamed(model_folder(tmp_path / "m", **gate, layers={}))
    plan = [Row(layer=at, expert=e, action="drop" if e == 0 else "keep") for at, e in packable(streamed.config)]
    with pytest.raises(UserError, match="linear gates"):
        Job(streamed, Plan(rows=tuple(plan)))


def test_models_that_cannot_be_compressed_are_refused(folder: Path, tmp_path: Path) -> None:
    Job(Streamed(folder), Plan(rows=tuple(rows(uniform)))).run(tmp_path / "out")
    with pytest.raises(UserError, match="compressed already"):
        Streamed(tmp_path / "out")
    with pytest.raises(UserError, match="dense model"):
        Streamed(model_folder(tmp_path / "dense", moe=None, layers={}, first_dense_layers=0))
    with pytest.raises(UserError, match="repeats"):
        Streamed(model_folder(tmp_path / "repeats", num_repeats=2))


def test_a_packed_model_is_not_saved_as_a_whole_one(folder: Path, tmp_path: Path) -> None:
    Job(Streamed(folder), Plan(rows=tuple(rows(uniform)))).run(tmp_path / "out")
    model = open_model(tmp_path / "out")
    with pytest.raises(UserError, match="few bits"):
        model.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again").exists()
    with pytest.raises(UserError, match="few bits"):
        experts(model)


def test_one_that_a_public_family_could_say_is_not_converted_without_its_experts(tmp_path: Path) -> None:
    olmoe = {"qk_norm": "whole", "first_dense_layers": 0, "layers": {}}
    streamed = Streamed(model_folder(tmp_path / "m", **olmoe))
    plan = [Row(layer=at, expert=expert, bits=4, group=32) for at, expert in packable(streamed.config)]
    Job(streamed, Plan(rows=tuple(plan))).run(tmp_path / "out")
    for target in ("again", "again.gguf"):
        with pytest.raises(UserError, match=r"few bits|gguf package"):
            convert(tmp_path / "out", tmp_path / target)
        assert not (tmp_path / target).exists()


def test_a_folder_whose_records_do_not_fit_is_refused(folder: Path, tmp_path: Path) -> None:
    Job(Streamed(folder), Plan(rows=tuple(rows(uniform)))).run(tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    tree = json.loads(path.read_text())
    tree["packed_experts"]["blocks.1.moe.banks.0"][0]["rows"].pop()
    path.write_text(json.dumps(tree))
    with pytest.raises(UserError, match=r"blocks.1.moe.banks.0 do not fit"):
        open_model(tmp_path / "out")


def test_a_plan_comes_back_from_its_file(tmp_path: Path) -> None:
    plan = Plan(rows=tuple(rows(merged)))
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    with pytest.raises(UserError, match="missing"):
        Plan.load(tmp_path / "none.json")
    for text, problem in (('{"rows": [{"layer": 0, "expert": 0, "bits": 5}]}', "bits"), ("{rows: [", "plan.json")):
        (tmp_path / "plan.json").write_text(text)
        with pytest.raises(UserError, match=problem):
            Plan.load(tmp_path / "plan.json")
