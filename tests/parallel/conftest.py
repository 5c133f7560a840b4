"""Two and four processes that all tests of this folder share."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.parallel.processes import Processes


@pytest.fixture(scope="session")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Processes]]:
    """``processes(4)``: four ranks, started when first asked for."""
    started: dict[int, Processes] = {}

    def of(size: int) -> Processes:
        if size not in started:
            started[size] = Processes(size, tmp_path_factory.mktemp("store") / "file")
        return started[size]

    yield of
    for group in started.values():
        group.close()


SETTINGS = """
name: tiny
steps: 100000
batch_size: 4
seq_len: 32
eval_every: 100000
eval_tokens: 500
save_every: 5
device: cpu
dtype: float32
data: {type: files, path: PATH}
model:
  d_model: 16
  num_layers: 2
  num_heads: 2
  d_ff: 16
  moe: {experts: {num_experts: 4, d_expert: 8}}
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("text"))


def write_tiny(folder: Path) -> Path:
    """A run of a second on two processes, over a text of its own."""
    file = folder / "tiny.yaml"
    text = file.with_name("corpus.txt")
    text.write_text("\n\n".join(f"paragraph {n}: the quick brown fox." for n in range(400)), encoding="utf-8")
    file.write_text(SETTINGS.replace("PATH", str(text)), encoding="utf-8")
    return file
