"""A run small enough to train in a moment, on text that the tests write themselves."""

from pathlib import Path

import pytest

from moeforge.config import Tree, build, merge
from moeforge.train import RunConfig

TEXT = "\n\n".join(
    f"def add_{n}(left, right):\n    # line {n} of the corpus\n    return left + right * {n}\n" for n in range(400)
)

TINY: Tree = {
    "name": "tiny",
    "steps": 6,
    "batch_size": 2,
    "seq_len": 32,
    "dtype": "float32",
    "eval_every": 3,
    "eval_tokens": 500,
    "save_every": 3,
    "model": {
        "d_model": 16,
        "num_layers": 2,
        "num_heads": 2,
        "d_ff": 16,
        "first_dense_layers": 1,
        "moe": {
            "experts": {"num_experts": 4, "d_expert": 8},
            "shared": {"d_expert": 8},
            "router": {"select": {"k": 2}, "score": "sigmoid", "controller": "expert_bias"},
        },
    },
}


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one text file."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny(corpus: Path):
    """Makes a config: ``tiny(steps=3, model={...})``."""

    def make(**changes: object) -> RunConfig:
        data = {"type": "files", "path": str(corpus), "validation_fraction": 0.2}
        return build(RunConfig, merge(merge(TINY, {"data": data}), changes))

    return make
