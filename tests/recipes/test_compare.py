"""Recipes side by side: equal FLOPs, one table, one picture, all from real runs on a little text."""

from pathlib import Path

import pytest

from moeforge.cli.main import main
from moeforge.models import measure
from moeforge.recipes import load
from moeforge.recipes.compare import at_equal_flops

SETTINGS = "--batch_size=2 --seq_len=32 --tokenizer=bytes --model.d_model=16 --model.num_layers=2 --model.d_ff=32"


def test_equal_flops_not_equal_steps() -> None:
    configs = at_equal_flops(
        [load(name, ["--model.vocab_size=1024"]) for name in ("dense", "mixtral", "frozen-router")]
    )
    assert configs[0].steps == load("dense").steps and configs[2].steps < 400
    spent = [
        config.steps * config.tokens_per_step * measure(config.model, seq_len=config.seq_len).flops_per_token
        for config in configs
    ]
    assert max(spent) / min(spent) < 1.005


def test_a_table_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"paragraph {n} of {n * 7} words" for n in range(300)))
    out = tmp_path / "out"
    settings = [*SETTINGS.split(), "--steps=30", f"--data={{type: files, path: {text}}}"]
    assert main(["compare", "mixtral", "top-p", "--out", str(out), *settings]) == 0
    shown = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in shown.splitlines() if line.startswith(("mixtral ", "top-p "))}
    assert rows["mixtral"][1] == "2.0000" and rows["top-p"][1] != "2.0000" and rows["mixtral"][3] == "30"
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "mixtral", "mixtral", "--out", str(tmp_path)]) == 2
    assert "each recipe once" in capsys.readouterr().err
    assert main(["compare", "mixtrl", "--out", str(tmp_path)]) == 2
    assert "Did you mean 'mixtral'?" in capsys.readouterr().err
