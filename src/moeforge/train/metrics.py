"""``metrics.jsonl``: one object per step, and the same numbers for TensorBoard on request."""

import json
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from moeforge.errors import UserError
from moeforge.moe.stats import dead_experts, load_entropy
from moeforge.train.step import StepResult

Line = dict[str, Any]


def step_line(step: int, result: StepResult, lr: float, seconds: float, tokens: int) -> Line:
    """The object of one step; ``tokens`` and ``seconds`` are this step's."""
    line: Line = {"step": step, **{f"loss/{name}": value for name, value in result.losses.items()}}
    line |= {"optimizer/lr": lr, "optimizer/grad_norm": result.grad_norm, "perf/seconds": seconds}
    line["perf/tokens_per_second"] = tokens / seconds
    for name, load_E in result.tokens_per_expert.items():
        line[f"moe/load_entropy/{name}"] = load_entropy(load_E)
        line[f"moe/dead_experts/{name}"] = dead_experts(load_E)
        line[f"moe/tokens_per_expert/{name}"] = load_E.tolist()
    for name, dropped in result.dropped.items():
        line[f"moe/drop_rate/{name}"] = dropped / max(1, int(result.tokens_per_expert[name].sum()))
    return line


def read_metrics(path: Path) -> list[Line]:
    """All lines of a metrics file, oldest first; a last line that a crash cut short is left out."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


class Metrics:
    """Appends to ``metrics.jsonl``. On resume, steps after the checkpoint are cut off: they will be done again."""

    def __init__(self, out: Path, done: int, tensorboard: bool) -> None:
        self.path = out / "metrics.jsonl"
        kept = [json.dumps(line) + "\n" for line in read_metrics(self.path) if line["step"] <= done]
        fresh = self.path.with_suffix(".part")
        fresh.write_text("".join(kept), encoding="utf-8")
        fresh.replace(self.path)
        self._file = self.path.open("a", encoding="utf-8")
        self._board = _open_board(out) if tensorboard else None

    def write(self, line: Line) -> None:
        """Adds one object, flushed so that others can follow the run."""
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in line.items():
                if isinstance(value, int | float) and name != "step":
                    self._board.add_scalar(name, value, line["step"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def _open_board(out: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("tensorboard=true needs TensorBoard: pip install 'moeforge[track]'") from error
    return SummaryWriter(str(out / "tensorboard"))
