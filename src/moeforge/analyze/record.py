"""A run as a report sees it: its settings, its metrics, its size, and what its experts and its pen did afterwards."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from moeforge.analyze.routing import Usage
from moeforge.config import Tree
from moeforge.models import Size


@dataclass(frozen=True)
class Sample:
    """A prompt with what the model wrote after it."""

    prompt: str
    pieces: list[str]
    """Text of each token, the prompt's included."""
    experts: list[dict[int, list[int]]]
    """Per token and layer, the experts it went to, the heaviest first."""


@dataclass(frozen=True)
class Curve:
    """Evaluations during training, first to last."""

    step: list[int]
    tokens: list[int]
    seconds: list[float]
    """Training time so far, without evaluation and set-up."""
    bits: list[float]
    """Bits per byte of the validation text."""

    def at(self, seconds: float) -> float:
        """Bits per byte at a training time, on the straight line between the two evaluations around it."""
        points = list(zip(self.seconds, self.bits, strict=True))
        for (before, high), (after, low) in pairwise(points):
            if before <= seconds <= after:
                return high + (low - high) * (seconds - before) / max(after - before, 1e-9)
        return points[0][1] if seconds < points[0][0] else points[-1][1]


@dataclass(frozen=True)
class Record:
    """One finished run."""

    name: str
    folder: str
    """Where it lies, as the user named it."""
    settings: Tree
    """The resolved config."""
    lines: list[Tree]
    """``metrics.jsonl``."""
    size: Size
    bits_per_byte: float
    """Of the validation text, from the model folder on disk."""
    usage: dict[int, Usage] = field(default_factory=dict)
    """By MoE layer."""
    tokens: list[str] = field(default_factory=list)
    """[V] text of every token, to name those in ``usage``."""
    samples: list[Sample] = field(default_factory=list)

    @cached_property
    def curve(self) -> Curve:
        """Of the lines that hold an evaluation."""
        lines = [line for line in self.lines if "eval/bits_per_byte" in line]
        names = ("step", "perf/total_tokens", "perf/total_seconds", "eval/bits_per_byte")
        return Curve(*([line[name] for line in lines] for name in names))

    @property
    def seconds(self) -> float:
        """Training time."""
        return float(self.lines[-1]["perf/total_seconds"])

    @property
    def tokens_seen(self) -> int:
        """In training, repetitions included."""
        return int(self.lines[-1]["perf/total_tokens"])

    @cached_property
    def loads(self) -> dict[int, Tensor]:
        """By MoE layer, [steps, E] int64 tokens per expert while training."""
        start = "moe/tokens_per_expert/layer_"
        found = [name for name in self.lines[-1] if name.startswith(start)]
        return {int(name.removeprefix(start)): torch.tensor([line[name] for line in self.lines]) for name in found}

    def series(self, name: str) -> list[float]:
        """One metric, step by step."""
        return [line[name] for line in self.lines]


@dataclass(frozen=True)
class EqualTime:
    """Every run at the longest training time that all of them reached."""

    seconds: float
    bits: list[float]
    """In the order of the runs."""
    done: list[float]
    """Share of its own training that each run had behind it: below 1, its learning rate was still high."""


def at_equal_time(records: Sequence[Record]) -> EqualTime:
    """Reads every curve at the fastest run's last second."""
    seconds = min(record.curve.seconds[-1] for record in records)
    bits = [record.curve.at(seconds) for record in records]
    return EqualTime(seconds, bits, [seconds / record.curve.seconds[-1] for record in records])
