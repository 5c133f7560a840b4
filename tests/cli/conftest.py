"""The program called in process, and one small trained run for all tests."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from moeforge.cli.main import main

SETTINGS = """
name: tiny
steps: 6
batch_size: 2
seq_len: 32
eval_every: 3
eval_tokens: 500
save_every: 3
device: cpu
dtype: float32
data: {type: files, path: PATH}
tokenizer: bytes
model:
  d_model: 16
  num_layers: 2
  num_heads: 2
  d_ff: 16
  max_seq_len: 64
  first_dense_layers: 1
  moe: {experts: {num_experts: 4, d_expert: 8}, shared: {d_expert: 8}}
"""


class Answer(NamedTuple):
    """What one command did."""

    code: int
    out: str
    err: str


Call = Callable[..., Answer]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """``call("train", "dense", stdin="...")`` runs the program in this process."""

    def run(*arguments: object, stdin: str = "") -> Answer:
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Answer(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few kilobytes of text."""
    file = tmp_path_factory.mktemp("text") / "corpus.txt"
    lines = (f"paragraph {n}: the quick brown fox jumps over {n * 7} dogs." for n in range(400))
    file.write_text("\n\n".join(lines), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def tiny(text_file: Path) -> Path:
    """A YAML file that trains in a moment."""
    file = text_file.with_name("tiny.yaml")
    file.write_text(SETTINGS.replace("PATH", str(text_file)), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def run_folder(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of ``tiny``; not to be written to."""
    from moeforge import recipes
    from moeforge.train import train

    out = tmp_path_factory.mktemp("runs") / "tiny"
    train(recipes.load(str(tiny)), out, quiet=True)
    return out
