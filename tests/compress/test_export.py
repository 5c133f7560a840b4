"""What is written for transformers: it computes what the plan says, and what it could not read is refused before."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import moeforge
from moeforge.compress import export
from moeforge.compress.export import Export
from moeforge.compress.merge import merge
from moeforge.compress.plan import Plan, Row, packable
from moeforge.compress.stream import Streamed, bytes_on_disk
from moeforge.compress.write import Job
from moeforge.errors import UserError
from moeforge.models import Decoder
from tests.compress.small import model_folder

transformers = pytest.importorskip("transformers", reason="pip install 'moeforge[hf]'")
pytest.importorskip("compressed_tensors")
families = pytest.importorskip("tests.hub.families")

FAMILIES = {
    "mixtral": {"hidden_size": 128, "intermediate_size": 128},
    "olmoe": {"hidden_size": 128, "intermediate_size": 128},
    "qwen3_moe": {"hidden_size": 128, "moe_intermediate_size": 128, "num_hidden_layers": 3, "mlp_only_layers": [1]},
    "deepseek_v3": {"hidden_size": 128, "moe_intermediate_size": 128, "num_hidden_layers": 3},
}
IDS = torch.arange(9)[None] * 7 % 64
Change = Callable[[int, int], dict[str, object]]


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model of transformers in bf16."""
    place = tmp_path_factory.mktemp("export") / request.param
    families.build(request.param, **FAMILIES[request.param]).bfloat16().save_pretrained(place)
    return place


def job(folder: Path, change: Change) -> Job:
    streamed = Streamed(folder)
    places = packable(streamed.config)
    return Job(
        streamed, Plan(rows=tuple(Row.model_validate({"layer": x, "expert": e, **change(x, e)}) for x, e in places))
    )


def dropped(layer: int, expert: int) -> dict[str, object]:
    return {"action": "drop"} if expert in (1 + layer % 2, 5) else {}


def merged(layer: int, expert: int) -> dict[str, object]:
    return {"action": "merge_into", "into": 4} if expert in (0, 2) else {}


def in_4(layer: int, expert: int) -> dict[str, object]:
    return {"bits": 4, "group": 32}


def in_8_and_fewer(layer: int, expert: int) -> dict[str, object]:
    return dropped(layer, expert) or merged(layer, expert) or {"bits": 8, "group": 128}


@pytest.mark.parametrize("change", [dropped, merged, in_4, in_8_and_fewer])
@torch.no_grad()
def test_transformers_computes_what_our_own_folder_does(folder: Path, tmp_path: Path, change: Change) -> None:
    own = job(folder, change)
    other = Export(own)
    own.run(tmp_path / "ours")
    said = other.run(tmp_path / "theirs")
    assert "equal byte for byte, logits within" in said
    theirs = torch.nn.Module.float(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs"))
    wanted, found = moeforge.load(tmp_path / "ours")(IDS).logits.float(), theirs(IDS).logits
    assert float((found - wanted).norm() / wanted.norm()) < 2e-2
    before = moeforge.load(folder)(IDS).logits.float()
    assert float((found - before).norm() / before.norm()) > (2e-2 if change is in_4 else 5e-2)
    on_disk, predicted = bytes_on_disk(tmp_path / "theirs"), other.bytes_by_class()
    files = sum(file.stat().st_size for file in (tmp_path / "theirs").glob("*.safetensors"))
    assert sum(on_disk.values()) == files == pytest.approx(sum(predicted.values()), rel=5e-3)
    assert {**on_disk, "other": 0} == {**predicted, "other": 0} and on_disk["experts"] > on_disk["dense"] / 2 > 0
    assert (tmp_path / "theirs" / "plan.json").exists() and not list(tmp_path.glob(".*"))


def test_dropped_experts_are_gone_and_merged_ones_are_copies(tmp_path: Path) -> None:
    families.build("mixtral", **FAMILIES["mixtral"]).bfloat16().save_pretrained(tmp_path / "m")
    for change in (dropped, merged):
        Export(job(tmp_path / "m", change)).run(tmp_path / change.__name__)
    before, few, same = (load_file(tmp_path / name / "model.safetensors") for name in ("m", "dropped", "merged"))
    at, gate = "model.layers.1.block_sparse_moe.", "model.layers.1.block_sparse_moe.gate.weight"
    for new, old in enumerate((0, 1, 3, 4)):
        assert torch.equal(few[f"{at}experts.{new}.w2.weight"], before[f"{at}experts.{old}.w2.weight"])
    assert torch.equal(few[gate], before[gate][[0, 1, 3, 4]]) and f"{at}experts.4.w2.weight" not in few
    up, down = (
        torch.stack([torch.cat([before[f"{at}experts.{e}.{name}.weight"] for name in names]) for e in (4, 0, 2)])
        for names in (("w1", "w3"), ("w2",))
    )
    _, mean = merge(up, down, [1, 1, 1])
    assert all(torch.equal(same[f"{at}experts.{e}.w2.weight"], mean) for e in (0, 2, 4))
    assert torch.equal(same[gate], before[gate]) and torch.equal(
        same[f"{at}experts.3.w1.weight"], before[f"{at}experts.3.w1.weight"]
    )


def test_one_of_our_own_becomes_the_family_that_can_say_it(tmp_path: Path) -> None:
    plain = {"qk_norm": "whole", "first_dense_layers": 0, "layers": {}}
    said = Export(job(model_folder(tmp_path / "m", **plain), lambda x, e: {"action": "drop"} if e < 2 else {})).run(
        tmp_path / "out"
    )
    assert said.startswith("olmoe, ") and isinstance(moeforge.load(tmp_path / "out"), Decoder)
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_auxiliary_experts_are_no_family_s(tmp_path: Path) -> None:
    moe = {"experts": {"num_experts": 4, "d_expert": 24}, "router": {"select": "auxiliary"}}
    folder = model_folder(tmp_path / "m", qk_norm="whole", first_dense_layers=0, layers={}, moe=moe)
    with pytest.raises(UserError, match="no class for this model"):
        Export(job(folder, lambda x, e: {"action": "drop"} if e < 1 else {})).run(tmp_path / "out")


def test_what_transformers_would_not_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    families.build("mixtral", hidden_size=64, intermediate_size=96).save_pretrained(tmp_path / "m")
    for change, why in (
        (
            lambda x, e: {"bits": 4, "group": 32} if x else {"bits": 8, "group": 32},
            "by one scheme, the plan has 4x32, 8x32",
        ),
        (lambda x, e: {"bits": 4, "group": 32} if x else {}, "by one scheme, the plan has 16, 4x32"),
        (lambda x, e: {"bits": 3, "group": 32}, "in 8 or 4 bits, not as 3x32"),
        (lambda x, e: {"bits": 4, "group": 64}, "rows of 96 values cannot be cut into groups of 64"),
        (lambda x, e: {"action": "drop"} if x and not e else {}, "is no mixtral, which has no field for: layers.1.moe"),
    ):
        with pytest.raises(UserError, match=why):
            Export(job(tmp_path / "m", change))
    with pytest.raises(UserError, match="no class for this model"):
        Export(job(model_folder(tmp_path / "own"), lambda x, e: {"bits": 8, "group": 32}))

    def differs(fresh: Path, model: Decoder) -> str:
        raise UserError("logits differ")

    monkeypatch.setattr(export, "verify", differs)
    with pytest.raises(UserError, match="logits differ"):
        Export(job(tmp_path / "m", in_4)).run(tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))
