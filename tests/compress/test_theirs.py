"""Models of transformers without a table of ours: calibrated layer by layer, packed, and opened by transformers."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moeforge
from moeforge.compress.measure import Reference
from moeforge.compress.plan import Plan, groups, packable
from moeforge.compress.profile import profile
from moeforge.compress.prune import drop
from moeforge.compress.source import open_source
from moeforge.compress.stream import Streamed
from moeforge.compress.theirs import StreamedTheirs
from moeforge.compress.write import Job
from moeforge.data.packing import Batch
from moeforge.errors import UserError
from moeforge.hub.families import FAMILIES as OURS
from moeforge.hub.theirs import Theirs
from moeforge.kernels.mixed import MixedWeight
from tests.compress.small import batches as ours

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'moeforge[hf]'")
families = pytest.importorskip("tests.hub.families")

CAUSAL = {name for name, (kind, _) in families.FAMILIES.items() if kind.endswith("ForCausalLM")} - OURS.keys()
UNKNOWN = {"mistral4"}
"""Not known to AutoModelForCausalLM."""
LOOPED = CAUSAL & families.LOOPED
"""Whose experts are no plain MLPs."""
SILENT = {"zaya"}
"""Whose router tells no logits."""
LINEAR = {"bailing_hybrid", "kimi_linear", "qwen3_5_moe", "qwen3_next", "qwen4_exp"}
"""Whose two layers have no attention that keeps keys: transformers writes with no such model."""
KEPT = {"inkling", "zaya"}
"""Whose routers have rows for more than experts, so that none can go."""
PACKED = sorted(CAUSAL - UNKNOWN - LOOPED)
Change = Callable[[int, int], dict[str, object]]

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers would rather have kernels, and says so


def batches() -> list[Batch]:
    """A text in the 64 tokens that these models have."""
    found = ours(400)
    return [
        replace(b, input_ids=b.input_ids % 64, labels=torch.where(b.labels < 0, -100, b.labels % 64)) for b in found
    ]


def saved(family: str, folder: Path) -> Path:
    families.build(family).save_pretrained(folder)
    return folder


def mixed(layer: int, expert: int) -> dict[str, object]:
    return {"bits": 4, "group": 32} if expert % 2 else {"bits": 8, "group": 128}


def merged(layer: int, expert: int) -> dict[str, object]:
    return {"action": "merge_into", "into": 1} if expert in (2, 3) else {"bits": 16, "group": None}


SIZES = {
    "pad_token_id": 0,
    "eos_token_id": 1,
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def plan(streamed: StreamedTheirs | Streamed, change: Change, **settings: Any) -> Plan:
    rows = [{"layer": layer, "expert": expert, **change(layer, expert)} for layer, expert in packable(streamed.config)]
    return Plan.model_validate({"rows": rows, **settings})


def watched(model: Any, text: list[Batch]) -> dict[str, list[tuple[Tensor, ...]]]:
    """What came to transformers' own experts."""
    seen: dict[str, list[tuple[Tensor, ...]]] = {}
    model.set_experts_implementation("eager")
    for name, module in model.named_modules():
        if name.endswith("experts") and hasattr(module, "is_transposed"):
            note = seen.setdefault(name, [])
            module.register_forward_pre_hook(lambda module, inputs, note=note: note.append(inputs))
    with torch.no_grad():
        for batch in text:
            model(input_ids=batch.input_ids, position_ids=batch.position, use_cache=False)
    return seen


@pytest.mark.parametrize("family", PACKED)
def test_a_family_is_calibrated_packed_and_opened_by_transformers(family: str, tmp_path: Path) -> None:
    text, folder, out = batches(), saved(family, tmp_path / "m"), tmp_path / "out"
    streamed = open_source(folder)
    assert isinstance(streamed, StreamedTheirs)
    made, reference = profile(streamed, text), Reference(streamed, text)
    assert reference.compare(streamed.theirs).kl == 0, "layer by layer, and at once"

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    came = watched(model, text)
    for layer, inputs in zip(made.layers, came.values(), strict=True):
        ids, weights = (torch.cat([some[at].flatten() for some in inputs]) for at in (1, 2))
        seen = made.layers[layer]
        assert torch.equal(seen.count, ids.bincount(minlength=len(seen.count)).float())
        summed = torch.zeros_like(seen.count).index_add(0, ids, weights.float())
        torch.testing.assert_close(seen.weight, summed, rtol=1e-3, atol=1e-3)
        assert float(seen.joint.abs().sum()) > 0 and (float(seen.correlation.abs().sum()) > 0) == (family not in SILENT)

    job = Job(streamed, plan(streamed, mixed, rounding="gptq"), made, text)
    assert "where moeforge is imported" in job.run(out)
    found = streamed.bytes_on_disk(out)
    assert found == job.bytes_by_class() and sum(found.values()) == sum(
        f.stat().st_size for f in out.glob("*.safetens*s")
    )
    assert min(found[kind] for kind in ("experts", "router", "dense", "embeddings")) > 0
    assert {**found, "experts": 0, "other": 0} == {**streamed.bytes_on_disk(folder), "experts": 0, "other": 0}

    packed: Any = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    for name, inputs in came.items():
        module, wide = packed.get_submodule(name), model.get_submodule(name)
        for own in ("gate_up_proj" if module.has_gate else "up_proj", "down_proj"):
            weight: Any = getattr(module, own)
            assert isinstance(weight, MixedWeight)
            stack = weight.dequantise()
            getattr(wide, own).data = stack.transpose(1, 2).contiguous() if module.is_transposed else stack
        with torch.no_grad():
            ours, wanted = module(*inputs[0]), wide(*inputs[0])
        assert float((ours - wanted).norm() / wanted.norm()) < 2e-2
    again = streamed.open(out)
    assert 0 < reference.compare(again).kl < 0.1
    ids = text[0].input_ids[:1, :9]
    with torch.no_grad():  # as the engine writes
        if family in LINEAR:
            return
        start = again.model(input_ids=ids[:, :8], use_cache=True)
        end = again.model(input_ids=ids[:, 8:], past_key_values=start.past_key_values, use_cache=True).logits
        torch.testing.assert_close(end[0, -1], again.model(input_ids=ids).logits[0, -1], rtol=0.02, atol=0.02)


def test_the_same_weights_show_the_same_whether_they_run_here_or_there(tmp_path: Path) -> None:
    text, folders = batches(), (saved("solar_open", tmp_path / "theirs"), tmp_path / "ours")
    shutil.copytree(*folders)  # Solar Open is GLM-4.5 with whole heads rotating and no dense layer
    fields = json.loads((folders[1] / "config.json").read_text())
    fields |= {"model_type": "glm4_moe", "architectures": ["Glm4MoeForCausalLM"], "first_k_dense_replace": 0}
    fields["rope_parameters"]["partial_rotary_factor"] = 1.0
    (folders[1] / "config.json").write_text(json.dumps(fields))
    theirs, ours = map(open_source, folders)
    assert isinstance(theirs, StreamedTheirs) and isinstance(ours, Streamed)
    profiles = [profile(source, text) for source in (theirs, ours)]
    assert profiles[0].layers.keys() == profiles[1].layers.keys() == {0, 1}
    for layer, seen in profiles[0].layers.items():
        for name, found in vars(seen).items():
            if name not in ("ratio", "predicted"):  # of routers and layers that are taken apart
                wanted = getattr(profiles[1].layers[layer], name)
                torch.testing.assert_close(
                    found, wanted, rtol=1e-3, atol=1e-4, msg=lambda said, name=name: f"{name}: {said}"
                )
    for change in (mixed, merged, dropped):
        found = []
        for source, made, out in zip((theirs, ours), profiles, ("packed theirs", "packed ours"), strict=True):
            Job(source, plan(source, change, rounding="gptq", dense="as stored"), made, text).run(tmp_path / out)
            found.append(Reference(source, text).compare(source.open(tmp_path / out)))
        assert found[0].bits_before == pytest.approx(found[1].bits_before, rel=1e-5)
        assert found[0].kl == pytest.approx(found[1].kl, rel=0.1) and found[0].kl > 0


def test_every_family_is_packed_or_said_why_not(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "compress.md").read_text(encoding="utf-8")
    part = page[page.index("## Families without a table") : page.index("## Fewer experts")]
    assert f"these {len(PACKED)} of transformers" in part
    assert {*re.findall(r"`([a-z_0-9]+)`", part)} & families.FAMILIES.keys() == CAUSAL - UNKNOWN
    looped = open_source(saved("beam", tmp_path / "beam"))
    assert not list(packable(looped.config))
    with pytest.raises(UserError, match="only experts that are MLPs"):
        profile(looped, batches())


def test_merged_experts_are_one_and_run_in_transformers(tmp_path: Path) -> None:
    text, folder = batches(), saved("flex_olmo", tmp_path / "m")
    streamed = open_source(folder)
    Job(streamed, plan(streamed, merged), profile(streamed, text)).run(tmp_path / "out")
    opened = streamed.open(tmp_path / "out")
    assert isinstance(opened, Theirs)
    weight = opened.experts[0].down_proj
    assert weight.place[1] == weight.place[2] == weight.place[3] != weight.place[0]
    quality = Reference(streamed, text).compare(opened)
    assert quality.kl > 0 and quality.experts_per_token == 2
    with pytest.raises(UserError, match="held in few bits"):
        moeforge.experts(opened.model)
    with pytest.raises(UserError, match="is compressed already"):
        open_source(tmp_path / "out")


def test_without_our_import_transformers_takes_experts_at_random_and_a_model_without_a_head_finds_them(
    tmp_path: Path,
) -> None:
    streamed = open_source(saved("flex_olmo", tmp_path / "m"))
    Job(streamed, plan(streamed, mixed)).run(tmp_path / "out")
    program = "import sys, transformers; model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]); "
    program += "print(type(model.model.layers[0].mlp.experts.down_proj).__name__, 'moeforge' in sys.modules)"
    command = [sys.executable, "-c", program, str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["Parameter", "False"] and "Unknown quantization type, got moeforge" in done.stderr
    headless = transformers.AutoModel.from_pretrained(tmp_path / "out")
    assert isinstance(headless.layers[0].mlp.experts.down_proj, MixedWeight)


def test_a_text_does_not_feel_the_one_before_it_in_its_row(tmp_path: Path) -> None:
    model = Theirs(saved("flex_olmo", tmp_path / "m"))
    ids, position = torch.arange(12)[None], torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])
    with torch.no_grad():
        both, alone = model(ids, position).logits[0, 5:], model(ids[:, 5:], position[:, 5:]).logits[0]
    torch.testing.assert_close(both, alone, rtol=1e-4, atol=1e-4)


def dropped(layer: int, expert: int) -> dict[str, object]:
    return {"action": "drop"} if expert in (1, 4) else {"bits": 16, "group": None}


@pytest.mark.parametrize("family", PACKED)
def test_dropped_experts_are_gone_and_the_others_chosen_as_before(family: str, tmp_path: Path) -> None:
    streamed, text = open_source(saved(family, tmp_path / "m")), batches()
    before, batch = Theirs(tmp_path / "m"), text[0]
    layer = min(before.names)
    with torch.no_grad():
        chosen = before(batch.input_ids, batch.position).taken[layer][0]
    counts = chosen.flatten().bincount(minlength=6)
    gone = {int(counts[:3].argmin()), 3 + int(counts[3:].argmin())}  # one of each group, where there are groups
    change = {False: {"bits": 16, "group": None}, True: {"action": "drop"}}
    job = Job(streamed, plan(streamed, lambda _, expert: change[expert in gone]))
    if family in KEPT:
        with pytest.raises(UserError, match=r"transformers does not take \w+ with this plan: "):
            job.run(tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["m"]
        return
    job.run(tmp_path / "out")
    assert streamed.bytes_on_disk(tmp_path / "out") == job.bytes_by_class()
    after = streamed.open(tmp_path / "out")
    with torch.no_grad():
        left = after(batch.input_ids, batch.position).taken[layer][0]
    stays = torch.tensor([expert for expert in range(6) if expert not in gone])
    assert [found.num_experts for found in after.experts.values()] == [4] * len(after.experts)
    untouched = (chosen[..., None] == stays).any(-1).all(-1)
    assert int(untouched.sum()) > 3
    assert torch.equal(chosen[untouched].sort().values, stays[left[untouched]].sort().values)


def test_what_its_routers_or_its_config_cannot_is_refused(tmp_path: Path) -> None:
    streamed = open_source(saved("flex_olmo", tmp_path / "m"))
    with pytest.raises(UserError, match=r"as many experts in each layer, not \[5, 6\]"):
        Job(streamed, plan(streamed, lambda layer, expert: {"action": "drop"} if expert < 1 - layer else {}))
    with pytest.raises(UserError, match="keep all choices"):
        Job(streamed, plan(streamed, mixed, skip={0: {"min_ratio": 0.5, "typical": 1.5}}))


def test_experts_of_groups_go_from_each_and_never_more_than_a_token_has(tmp_path: Path) -> None:
    streamed = open_source(saved("solar_open", tmp_path / "m"))
    assert groups(streamed.config) == {0: 2, 1: 2}

    def without(*gone: int) -> Plan:
        return plan(streamed, lambda layer, expert: {"action": "drop"} if expert in gone else {"bits": 8, "group": 128})

    with pytest.raises(UserError, match=r"from each of its router's 2 groups, not \[2, 0\]"):
        Job(streamed, without(0, 1))
    with pytest.raises(UserError, match=r"select.k = 2 is more than the 1 experts"):
        Job(streamed, without(0, 1, 3, 4))
    rows = drop(profile(streamed, batches()), list(plan(streamed, mixed).rows), 0.34, "output_error", {0: 2, 1: 2})
    Job(streamed, Plan(rows=tuple(rows)))


def test_a_number_of_experts_that_config_json_leaves_to_its_class_is_written(tmp_path: Path) -> None:
    folder, file = saved("flex_olmo", tmp_path / "m"), tmp_path / "m" / "config.json"
    model = transformers.AutoModelForCausalLM.from_config(
        type(transformers.AutoConfig.from_pretrained(folder))(**SIZES)
    )
    model.save_pretrained(folder)
    fields = json.loads(file.read_text())
    number = fields.pop("num_experts")
    file.write_text(json.dumps(fields))
    streamed = open_source(folder)
    Job(streamed, plan(streamed, dropped)).run(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_experts"] == number - 2


def test_nothing_is_left_behind_where_a_pass_is_interrupted(tmp_path: Path) -> None:
    streamed = open_source(saved("dots1", tmp_path / "m"))
    assert isinstance(streamed, StreamedTheirs)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    streamed.found[1].router.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        profile(streamed, batches())
    assert not streamed.banks[1]._forward_hooks and not streamed.found[1].router._forward_hooks


def test_the_mapped_file_is_let_go(tmp_path: Path) -> None:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("only Linux says what is mapped")
    model = Theirs(saved("dots1", tmp_path / "m"))  # joined experts, and a bias that is a buffer
    assert model.names and str(tmp_path) not in maps.read_text()


@pytest.mark.parametrize("damage", ["fewer", "more", "bits"])
def test_packed_experts_that_do_not_fit_are_named(tmp_path: Path, damage: str) -> None:
    streamed = open_source(saved("dots1", tmp_path / "m"))
    Job(streamed, plan(streamed, mixed)).run(tmp_path / "out")
    config = tmp_path / "out" / "config.json"
    before, after = {
        "fewer": ('"rows": [[0], [2], [4]]', '"rows": [[0], [2], [3]]'),
        "more": ('"moe_intermediate_size": 16', '"moe_intermediate_size": 24'),
        "bits": ('"bits": 8', '"bits": 3'),
    }[damage]
    text = "".join(line.strip() for line in config.read_text().splitlines())
    text = text.replace("[[0],[2],[4]]", "[[0], [2], [4]]")
    assert before in text
    config.write_text(text.replace(before, after))
    with pytest.raises(UserError, match=r"packed experts of model\.layers\.1\.mlp\.experts do not fit"):
        Theirs(tmp_path / "out")
