"""``moeforge compress`` from the shell: a budget in, a folder that the other commands open out."""

import json
from pathlib import Path
from typing import Any

import pytest

from moeforge.cli.main import main
from moeforge.data.tokenizers import Bytes, train_or_open
from moeforge.hub import load
from tests.compress.small import model_folder

TEXT = "".join(f"def f{i}(x):\n    return x * {i} + {i % 7}\n" for i in range(400))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compress")
    model_folder(folder / "m")
    (folder / "text").mkdir()
    for i in range(30):
        (folder / "text" / f"{i}.txt").write_text(TEXT[i * 300 : i * 300 + 1500])
    return folder


def run(place: Path, *arguments: str, model: str = "m") -> int:
    text = f"--data.path={place / 'text'}"
    fixed = [text, "--seq_len=32", "--batch_size=8", "--tokens=2000", "--held-out=1000"]
    return main(["compress", str(place / model), *arguments, *fixed, f"--profile={place / f'profile of {model}'}"])


def test_a_budget_is_kept_and_the_cost_measured(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(place, "--fit=95kB", f"--out={place / 'fit'}", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    files = sum(file.stat().st_size for file in (place / "fit").glob("*.safetensors"))
    assert sum(report["bytes"].values()) == files <= 95_000
    assert report["quality"]["kl"] > 0 and report["quality"]["tokens"] > 900 and report["tokens_per_second"] > 0
    assert json.loads((place / "fit" / "report.json").read_text()) == report
    page = (place / "fit" / "report.html").read_text()
    assert report["rounding"] == "gptq" and "for which the experts were rounded" in page
    assert f"{report['quality']['bits_after']:.4f}" in page and page.count('class="cell"') == 10
    arguments = [f"--data.path={place / 'text'}", "--seq_len=32", "--tokens=1000", "--json"]
    assert main(["evaluate", str(place / "fit"), *arguments]) == 0
    scored = json.loads(capsys.readouterr().out)
    assert scored["bits_per_byte"] == pytest.approx(report["quality"]["bits_after"], rel=1e-3)
    assert main(["generate", str(place / "fit"), "def", "--max-tokens=4"]) == 0


@pytest.mark.parametrize(
    "wish",
    [
        ["--bits-per-weight=9"],
        ["--merge=50%"],
        ["--drop=25%"],
        ["--drop=25%", "--bits-per-weight=9"],
        ["--max-loss=+50%", "--rounding=nearest"],
        ["--skip=50%"],
    ],
)
@pytest.mark.parametrize("granularity", ["expert", "layer"])
def test_every_way_to_say_how_large(place: Path, wish: list[str], granularity: str) -> None:
    assert run(place, *wish, f"--granularity={granularity}", f"--out={place / 'out'}", "--force") == 0
    report = json.loads((place / "out" / "report.json").read_text())
    assert report["bytes"]["experts"] < report["bytes_before"]["experts"]
    if "--bits-per-weight=9" in wish:
        assert report["bits_per_weight"] <= 9
    formats = {(row["layer"], row["bits"]) for row in json.loads((place / "out" / "plan.json").read_text())["rows"]}
    assert (report["quality"]["experts_per_token"] < 1.6) == ("--skip=50%" in wish)
    assert granularity == "expert" or len(formats) <= 2 + 2 * ("--drop=25%" in wish)


def test_a_dry_run_says_the_size_and_writes_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(place, "--fit=95kB", f"--out={place / 'dry'}", "--dry-run", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert sum(found["bytes"].values()) <= 95_000 and len(found["plan"]["rows"]) == 10
    assert run(place, "--fit=95kB", "--dry-run") == 0
    assert "layer   1" in capsys.readouterr().out and not (place / "dry").exists()


def test_codebooks_are_among_the_formats_where_asked_for(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moe = {"experts": {"num_experts": 4, "d_expert": 128}, "router": {"select": {"k": 2}}}
    model_folder(place / "wide", d_model=128, num_layers=1, first_dense_layers=0, layers={}, moe=moe)
    for asked in ([], ["--codebooks"]):
        assert run(place, "--bits-per-weight=2.4", *asked, "--dry-run", "--json", model="wide") == 0
        rows = json.loads(capsys.readouterr().out)["plan"]["rows"]
        assert any(row["bits"] == "vector" for row in rows) == bool(asked)


def test_a_packed_folder_is_inspected_as_it_lies(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(place, "--merge=50%", "--bits-per-weight=9", f"--out={place / 'packed'}", "--json") == 0
    experts = json.loads(capsys.readouterr().out)["bytes"]["experts"]
    found = []
    for folder in (place / "m", place / "packed"):
        assert main(["inspect", str(folder), "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    weights = 10 * 3 * 32 * 24
    assert found[0]["bytes"] == 4 * found[0]["total_params"]
    assert found[1]["bytes"] == 2 * (found[1]["total_params"] - weights) + experts
    assert main(["inspect", str(place / "packed")]) == 0
    assert "experts packed" in capsys.readouterr().out


def test_its_plan_can_be_given_back(place: Path) -> None:
    assert run(place, "--bits-per-weight=9", f"--out={place / 'one'}") == 0
    plan = place / "one" / "plan.json"
    assert json.loads(plan.read_text())["rounding"] == "gptq"
    assert run(place, f"--plan={plan}", f"--out={place / 'two'}") == 0
    assert run(place, f"--plan={plan}", "--rounding=nearest", f"--out={place / 'three'}") == 0
    for file in (place / "one").glob("*layer-*.safetensors"):
        assert file.read_bytes() == (place / "two" / file.name).read_bytes()
    last = "model-layer-00002.safetensors"
    assert (place / "one" / last).read_bytes() != (place / "three" / last).read_bytes()


BAD = {
    "the smallest plan makes": ["--fit=1kB"],
    "for experts, and": ["--bits-per-weight=0.5"],
    "no number of bytes": ["--fit=lots"],
    "is no share": ["--max-loss=much"],
    "between 0% and 100%": ["--drop=120%"],
    "say the same thing twice": ["--fit=95kB", "--bits-per-weight=4"],
    "say how large": [],
    "--plan and --skip": ["--plan=p", "--skip=50%"],
    "skips no choice": ["--skip=0.1%"],
    "ordered by one of": ["--drop=25%", "--drop-by=taste"],
    "is what --drop-by router_norm counts from": ["--drop=25%", "--base=m"],
    "drops no expert": ["--drop=1%"],
    "is missing": ["--plan=none.json"],
    "--codebooks goes with": ["--drop=25%", "--codebooks"],
}


@pytest.mark.parametrize("problem", BAD)
def test_bad_input_is_one_line(place: Path, problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(place, *BAD[problem], f"--out={place / 'bad'}") == 2
    said = capsys.readouterr().err
    assert problem in said and said.count("\n") == 1 and not (place / "bad").exists()


def test_an_existing_folder_is_left_alone(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "mine").mkdir()
    assert run(place, "--fit=95kB", f"--out={place / 'mine'}") == 2
    assert "--force" in capsys.readouterr().err and not list((place / "mine").iterdir())


@pytest.mark.parametrize("how", ["mean", "units"])
def test_a_dense_model_is_written_and_trains_on(place: Path, how: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(place, f"--to-dense={how}", f"--out={place / how}", "--json") == 0
    quality = json.loads(capsys.readouterr().out)
    model, _ = load(place / how)
    assert not model.moe_layers and quality["kl"] > 0
    assert run(place, f"--to-dense={how}", "--drop=25%", f"--out={place / 'no'}") == 2
    assert "leaves no experts to pack" in capsys.readouterr().err and not (place / "no").exists()


def test_a_folder_for_transformers_is_opened_before_it_counts(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers", reason="pip install 'moeforge[hf]'")
    pytest.importorskip("compressed_tensors", reason="pip install 'moeforge[compress]'")
    moe = {"moe": {"experts": {"num_experts": 8, "d_expert": 128}, "router": {"select": {"k": 2}}}}
    sizes = {"d_model": 128, "num_layers": 1, "qk_norm": "whole", "first_dense_layers": 0, "layers": {}}
    model_folder(place / "olmoe", **sizes, **moe)

    def to_hf(*wish: str, out: str = "hf") -> int:
        return run(place, *wish, "--to=hf", f"--out={place / out}", "--force", model="olmoe")

    assert to_hf("--drop=25%", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["opened"].startswith("olmoe, ") and "of OlmoeForCausalLM" in report["opened"]
    assert report["bytes"]["experts"] == 6 * 3 * 128 * 128 * 2
    assert to_hf("--drop=25%", "--fit=700kB") == 0
    assert "OlmoeForCausalLM" in capsys.readouterr().out
    assert sum(file.stat().st_size for file in (place / "hf").glob("*.safetensors")) <= 700_000
    config = json.loads((place / "hf" / "config.json").read_text())
    assert config["num_experts"] == 6 and config["quantization_config"]["format"] == "pack-quantized"
    for wish, why in (
        (["--fit=700kB", "--granularity=layer"], "by one scheme"),
        (["--bits-per-weight=1"], "the smallest plan needs"),
    ):
        assert to_hf(*wish, out="none") == 2
        assert why in capsys.readouterr().err and not (place / "none").exists()
    assert run(place, "--drop=25%", "--to=hf", f"--out={place / 'none'}") == 2
    assert "no class for this model" in capsys.readouterr().err and not (place / "none").exists()


@pytest.mark.filterwarnings("ignore")  # transformers would rather have kernels, and says so
def test_the_command_packs_it_and_others_open_what_it_became(call: Any, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs transformers: pip install 'moeforge[hf]'")
    families = pytest.importorskip("tests.hub.families")
    folder, out, text = tmp_path / "m", tmp_path / "out", tmp_path / "text.txt"
    sizes = {"vocab_size": 300, "max_position_embeddings": 128, "hidden_size": 128, "intermediate_size": 128}
    families.build("flex_olmo", **sizes).save_pretrained(folder)
    train_or_open(Bytes(), []).save(folder)
    text.write_text(TEXT)
    asked = (f"--data.path={text}", "--seq_len=64", "--tokens=2000", "--held-out=1000")
    code, said, err = call("compress", folder, "--bits-per-weight", 5, "--out", out, *asked)
    assert code == 0, err
    assert "FlexOlmoForCausalLM of transformers, where moeforge is imported" in said
    assert (out / "report.html").exists() and (out / "plan.json").exists()
    for verb in (("generate", out, "def", "--max-tokens", 4), ("evaluate", out, *asked[:2], "--tokens=500")):
        code, said, err = call(*verb)
        assert code == 0, err
        assert said.strip()
    for wish in (("--to", "hf", "--bits-per-weight", 5), ("--skip", "20%"), ("--to-dense", "mean")):
        code, _, err = call("compress", folder, *wish, "--out", tmp_path / "no", *asked)
        assert code == 2 and "needs a family that we have a table of" in err
        assert not (tmp_path / "no").exists()
    families.build("flex_olmo", **sizes | {"vocab_size": 200}).save_pretrained(folder)
    code, _, err = call("evaluate", folder, *asked[:2])
    assert code == 2 and "the model has vocab_size 200, its tokenizer 257" in err
