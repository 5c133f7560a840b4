"""``moeforge bench serve``: a tiny model end to end against real peers, what the figures mean, and what is refused."""

import importlib.util
import json
from pathlib import Path

import pytest

from moeforge.cli import bench_serve
from moeforge.cli.bench_serve import Case, figures
from moeforge.errors import UserError
from moeforge.hub import shapes

QUICK = ("--clients", "1,3", "--prompt", "4", "--new", "3", "--rounds", "1", "--threads", "1")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of a moment."""
    folder = tmp_path_factory.mktemp("random") / "tiny"
    small = shapes.SHAPES["olmoe-5m"] | {"vocab_size": 300, "num_hidden_layers": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(shapes.SHAPES, "tiny", small)
        shapes.write_random("tiny", folder)
    return folder


def test_engine_and_transformers_take_turns_and_a_picture_is_drawn(call, tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    out = tmp_path / "found.json"
    code, shown, err = call("bench", "serve", tiny, *QUICK, "--no-http", "--against", "transformers", "--out", out)
    assert code == 0, err
    found = json.loads(out.read_text(encoding="utf-8"))
    assert list(found["contestants"]) == ["moeforge bf16", "transformers bf16"]
    for one in found["contestants"].values():
        assert list(one["cases"]) == ["1 client", "3 clients", "read 1024 tokens"]
        assert 0 < one["start_s"][1] <= one["start_s"][0]
        assert 5e7 < one["start_peak_bytes"] < 5e9  # torch and a tiny model
        assert all(case["tokens/s"][0] > 0 for case in one["cases"].values())
        # output matrix, attention, router, and 8 of 64 experts
        assert one["active_bytes"] == pytest.approx(2 * 128 * (300 + 4 * 128 + 64 + 8 * 3 * 64), rel=0.02)
    assert "% of memory's speed" in shown and "transformers bf16" in shown
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_the_server_is_a_contestant(tiny: Path, call) -> None:
    pytest.importorskip("fastapi")
    code, shown, err = call("bench", "serve", tiny, *QUICK)
    assert code == 0, err
    assert "moeforge over HTTP bf16" in shown
    assert "opening moeforge over HTTP bf16" in err


def test_figures_are_what_the_moments_say() -> None:
    texts = {"tokens": [], "times": [[1.0, 2.0, 3.0], [2.0, 4.0, 6.0]]}
    found = figures(Case("2 clients", 2, 5, 3), texts)
    # the first token of all is there at 2; until 6 come 3.0, 4.0 and 6.0
    assert found == {"first token s": 1.5, "all tokens/s": 1.0, "ms per token": 1500, "tokens/s": 3 / 4}
    assert figures(Case("read", 1, 10, 1), {"tokens": [], "times": [[2.0]]})["tokens/s"] == 5
    with pytest.raises(UserError, match="3 tokens were to be written, and 1 were"):
        figures(Case("1 client", 1, 5, 3), {"tokens": [], "times": [[1.0]]})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--against", "vllm"], "--against takes transformers, llama.cpp, not 'vllm'"),
        (["--weights", "int3"], "--weights takes bf16, float32, int8, int4, not 'int3'"),
        (["--clients", "many"], "--clients are numbers between commas, not 'many'"),
        (["--against", "transformers", "--weights", "int8"], "add bf16 to --weights"),
        (["--new", "4090"], "this model's context has 4096"),
        (["--random", "olmoe-5m"], "name a model folder, or a shape with --random"),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_opens(tiny: Path, call, options, said) -> None:
    pytest.importorskip("transformers")
    code, _, err = call("bench", "serve", tiny, "--no-http", *options)
    assert code == 2 and said in err and "opening" not in err


def test_a_peer_that_is_missing_is_said_with_how_to_install_it(tiny: Path, call, monkeypatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(bench_serve, "find_spec", lambda name: None if name == "llama_cpp" else find(name))
    code, _, err = call("bench", "serve", tiny, "--no-http", "--against", "llama.cpp")
    assert code == 2 and "llama.cpp is not installed: pip install llama-cpp-python" in err


def test_a_contestant_that_stops_is_named_with_its_last_words(tiny: Path, tmp_path: Path, call) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny.iterdir():
        (broken / file.name).write_bytes(file.read_bytes()[: 1000 if file.suffix == ".safetensors" else None])
    code, _, err = call("bench", "serve", broken, *QUICK, "--no-http")
    assert code == 2 and "moeforge has stopped: " in err and "safetensors" in err
