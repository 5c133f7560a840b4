"""Native families against transformers' own classes: logits, routes, text, and every byte, in both directions."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import moeforge
from moeforge.errors import UserError
from moeforge.hub.families import FAMILIES
from moeforge.hub.families.family import differences
from moeforge.hub.folder import outline
from moeforge.hub.pretrained import Pretrained
from moeforge.models import Cache, Decoder
from moeforge.models.weights import bytes_by_class

transformers = pytest.importorskip("transformers", reason="needs the families' own code: pip install 'moeforge[hf]'")
families = pytest.importorskip("tests.hub.families")

CASES = [
    pytest.param(family, changes, id=f"{family}: {what}")
    for family, cases in families.NATIVE.items()
    for what, changes in cases.items()
]
IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))
LENGTHS = (9, 6)
NEW = 8


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield


@pytest.fixture
def theirs(family: str, changes: dict[str, object]) -> nn.Module:
    return families.build(family, **changes)


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def same_files(left: Path, right: Path) -> None:
    one, two = load_file(left / "model.safetensors"), load_file(right / "model.safetensors")
    assert one.keys() == two.keys()
    assert {name: one[name].dtype for name in one} == {name: two[name].dtype for name in two}
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
    first, second = (json.loads((folder / "config.json").read_text()) for folder in (left, right))
    assert first == second and list(first) == list(second)


def routed(model: nn.Module, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(logits [T, E], experts [T, K]) of each router of a model of transformers."""
    seen: list[tuple[Tensor, Tensor]] = []
    routers = [part for part in model.modules() if type(part).__name__.endswith(("Router", "TopKGating"))]
    hooks = [router.register_forward_hook(lambda _, __, out: seen.append((out[0], out[-1]))) for router in routers]
    model(ids)
    for hook in hooks:
        hook.remove()
    return seen


def greedy(model: Decoder, ids: Tensor) -> Tensor:
    cache, new = Cache(model, len(ids), ids.shape[1] + NEW), ids
    for _ in range(NEW):
        new = model(new, cache=cache).logits[:, -1:].argmax(-1)
        ids = torch.cat((ids, new), 1)
    return ids


def test_every_family_is_tried() -> None:
    assert families.NATIVE.keys() == {name for name, family in FAMILIES.items() if family.in_transformers}


@pytest.mark.parametrize(("family", "changes"), CASES)
@torch.no_grad()
def test_their_folder_gives_their_logits_routes_and_text(theirs, tmp_path):
    ours = moeforge.load(saved(theirs, tmp_path / "m"))
    assert isinstance(ours, Pretrained) and not ours.training
    want = theirs(IDS).logits
    got = ours(IDS)
    torch.testing.assert_close(got.logits, want, atol=1e-4, rtol=0)
    assert want.std() > 0.3, "logits too small to show a difference"
    routes = routed(theirs, IDS)
    assert len(routes) == len(got.routings)
    for (logits, experts), routing in zip(routes, got.routings.values(), strict=True):
        torch.testing.assert_close(routing.logits, logits, atol=1e-4, rtol=0)
        pairs = {(token, expert) for token, row in enumerate(experts.tolist()) for expert in row}
        assert {*zip(routing.route.token.tolist(), routing.route.expert.tolist(), strict=True)} == pairs
        assert experts.unique().numel() > experts.shape[1], "every token went to the same experts"
    theirs.generation_config.eos_token_id = None
    assert torch.equal(greedy(ours, IDS), theirs.generate(IDS, max_new_tokens=NEW, do_sample=False))


@pytest.mark.parametrize(("family", "changes"), CASES)
@torch.no_grad()
def test_what_is_saved_is_what_was_opened(theirs, tmp_path):
    ours = moeforge.load(saved(theirs, tmp_path / "theirs"))
    same_files(tmp_path / "theirs", saved(ours, tmp_path / "ours"))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(again) is type(theirs)
    torch.testing.assert_close(again(IDS).logits, theirs(IDS).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("family", "changes", "frozen"),
    [
        ("mixtral", {"num_experts_per_tok": 1}, True),
        ("mixtral", {}, False),
        ("olmoe", {"num_experts_per_tok": 1, "norm_topk_prob": True}, True),
        ("olmoe", {"num_experts_per_tok": 1}, False),
    ],
)
def test_a_gate_that_no_gradient_reaches_is_frozen(family, changes, frozen, tmp_path):
    theirs = families.build(family, **changes)
    ours = moeforge.load(saved(theirs, tmp_path / "m"))
    torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, atol=1e-4, rtol=0)
    assert all(router.gate.weight.requires_grad is not frozen for router in ours.routers.values())


def test_one_normalised_expert_beside_a_correction_bias_is_refused(tmp_path):
    saved(families.build("glm4_moe", num_experts_per_tok=1, n_group=1), tmp_path / "m")
    with pytest.raises(UserError, match="normalised over one expert is always one"):
        moeforge.load(tmp_path / "m")


@pytest.mark.parametrize("family", families.NATIVE)
def test_bfloat16_comes_back_byte_by_byte(family, tmp_path):
    saved(families.build(family).to(torch.bfloat16), tmp_path / "theirs")
    ours = moeforge.load(tmp_path / "theirs")
    same_files(tmp_path / "theirs", saved(ours, tmp_path / "ours"))
    assert ours(IDS).logits.dtype == torch.bfloat16


def repacked(folder: Path, pack: Any, settings: dict[str, object]) -> None:
    """Rewrites a folder's weights by ``pack`` (name, tensor) -> tensors by name, and says so in its config."""
    weights = load_file(folder / "model.safetensors")
    fresh = {name: packed for old, tensor in weights.items() for name, packed in pack(old, tensor).items()}
    save_file(fresh, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))


@pytest.mark.filterwarnings("ignore")  # transformers would rather have kernels
@torch.no_grad()
def test_mxfp4_is_read_as_transformers_reads_it(tmp_path):
    folder = saved(families.build("gpt_oss", intermediate_size=32).to(torch.bfloat16), tmp_path / "m")

    def pack(name: str, tensor: Tensor) -> dict[str, Tensor]:
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            return {name: tensor}
        experts, width, rows = tensor.shape
        blocks = torch.randint(0, 256, (experts, rows, width // 32, 16), dtype=torch.uint8)
        scales = torch.randint(121, 127, (experts, rows, width // 32), dtype=torch.uint8)
        return {f"{name}_blocks": blocks, f"{name}_scales": scales}

    repacked(folder, pack, {"quant_method": "mxfp4"})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).float()
    ours = moeforge.load(folder)
    assert bytes_by_class(outline(folder).sized()) == bytes_by_class(ours)
    ours.save_pretrained(tmp_path / "plain")
    again = moeforge.load(tmp_path / "plain").float()
    for model in (ours.float(), again):
        torch.testing.assert_close(model(IDS).logits, theirs(IDS).logits, atol=1e-4, rtol=0)
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())


@torch.no_grad()
def test_fp8_in_blocks_is_read(tmp_path):
    """Against the weights that were quantised, block by block, ragged blocks at the edges included."""
    model = families.build("deepseek_v3").to(torch.bfloat16)
    folder, rows, columns, wanted = saved(model, tmp_path / "m"), 16, 12, {}

    def pack(name: str, tensor: Tensor) -> dict[str, Tensor]:
        if "_proj" not in name:
            return {name: tensor}
        scales = torch.empty(-(-tensor.shape[0] // rows), -(-tensor.shape[1] // columns))
        values, back = torch.empty(tensor.shape, dtype=torch.float8_e4m3fn), torch.empty_like(tensor)
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                place = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
                scales[i, j] = tensor[place].abs().max().float() / 448
                values[place] = (tensor[place].float() / scales[i, j]).to(torch.float8_e4m3fn)
                back[place] = values[place].float() * scales[i, j]
        wanted[name] = back
        return {name: values, f"{name}_scale_inv": scales}

    repacked(folder, pack, {"quant_method": "fp8", "weight_block_size": [rows, columns]})
    moeforge.load(folder).save_pretrained(tmp_path / "plain")
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    assert len(wanted) > 20 and all(torch.equal(plain[name], tensor) for name, tensor in wanted.items())
    repacked(tmp_path / "m", lambda name, tensor: {name: tensor[:, :1].clone() if "scale" in name else tensor}, {})
    with pytest.raises(UserError, match=r"_proj\.weight_scale_inv are no weight in FP8 in blocks of 128 x 128"):
        moeforge.load(tmp_path / "m")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", families.NATIVE)
@torch.no_grad()
def test_padding_changes_nothing(family, side, tmp_path):
    theirs = families.build(family)
    ours = moeforge.load(saved(theirs, tmp_path / "m"))
    count = torch.arange(IDS.shape[1])
    mask = torch.stack([count < n if side == "right" else count >= IDS.shape[1] - n for n in LENGTHS]).long()
    position = (mask.cumsum(1) - 1).clamp_min(0)
    want = theirs(IDS, attention_mask=mask, position_ids=position).logits
    got = ours(IDS, mask).logits
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()], atol=1e-4, rtol=0)
    alone = ours(IDS[1:][mask[1:].bool()][None]).logits
    torch.testing.assert_close(got[1][mask[1].bool()], alone[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", families.NATIVE)
def test_the_defaults_are_those_of_transformers(family):
    """A field that a config.json lacks means what it means to them."""
    config = transformers.AutoConfig.for_model(family)
    table = FAMILIES[family].defaults
    config_fields = type(config).__dataclass_fields__
    ours = {name: value for name, value in table.items() if name in config_fields and value is not ...}
    skipped = {"rope_parameters", "layer_types"}  # derived from the others
    if family == "deepseek_v3":
        skipped.add("num_key_value_heads")  # 128 whatever num_attention_heads says: theirs then fails
    theirs = {name: config_fields[name].default for name in ours}
    assert {n: v for n, v in ours.items() if n not in skipped} == {n: v for n, v in theirs.items() if n not in skipped}


@pytest.mark.parametrize("family", families.NATIVE)
def test_a_config_with_nothing_but_sizes_means_the_same(family):
    """The smallest config.json: transformers' reading of it, written out in full, and ours of the short one agree."""
    sizes = {"vocab_size": 64, "hidden_size": 512, "num_hidden_layers": 3, "num_attention_heads": 32}
    needed = {"deepseek_v2": {"num_experts_per_tok": 2}, "deepseek_v3": {"num_key_value_heads": 32}}
    short = {"model_type": family, **sizes, **needed.get(family, {})}
    full = transformers.AutoConfig.for_model(**short).to_dict()
    full = {name: value for name, value in full.items() if name not in ("architectures", "dtype", "id2label")}
    assert differences(FAMILIES[family].read(short), FAMILIES[family].read(full)) == []
