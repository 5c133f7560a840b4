"""Any recipes side by side at equal FLOPs: one table, one picture."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeforge.analyze.figures import COLOURS, png
from moeforge.errors import UserError
from moeforge.models import measure
from moeforge.recipes.catalogue import load
from moeforge.recipes.reproduce import Measured, experts_per_token, mean_of, measured, seconds_per_step, text_of
from moeforge.train import RunConfig
from moeforge.train.metrics import Line, read_metrics

SMOOTH = 20
"""Steps that a point of the picture is the mean of."""


@dataclass(frozen=True)
class Compared:
    """One recipe's run."""

    config: RunConfig
    result: Measured
    lines: list[Line]


def at_equal_flops(configs: Sequence[RunConfig]) -> list[RunConfig]:
    """The configs with steps changed so that all spend the FLOPs of the first."""

    def per_step(config: RunConfig) -> float:
        vocab_size = config.model.vocab_size or text_of(config).tokenizer.vocab_size
        model = config.model.replace(vocab_size=vocab_size)
        return measure(model, seq_len=config.seq_len).flops_per_token * config.tokens_per_step

    budget = configs[0].steps * per_step(configs[0])
    return [config.replace(steps=max(1, round(budget / per_step(config)))) for config in configs]


def compare(
    names: Sequence[str],
    out: Path,
    changes: Sequence[str] = (),
    minutes: float | None = None,
    say: Callable[[str], None] = print,
) -> list[Compared]:
    """Trains each recipe into its folder below ``out`` and draws ``compare.png`` there. Raises UserError."""
    folders = [out / Path(name).stem for name in names]
    if len(set(folders)) < len(names):
        raise UserError(f"each recipe once, please: {', '.join(names)}")
    configs = at_equal_flops([load(name, changes) for name in names])
    if minutes is not None:
        needed = sum(seconds_per_step(config, out) * config.steps for config in configs)
        share = min(1.0, 60 * minutes / needed)
        configs = [config.replace(steps=max(1, int(share * config.steps))) for config in configs]
    runs = []
    for name, config, folder in zip(names, configs, folders, strict=True):
        say(f"{name}: {config.steps} steps")
        result = measured(config, folder, text_of(config))
        runs.append(Compared(config, result, read_metrics(folder / "metrics.jsonl")))
        say(f"{name}: {result.bits_per_byte:.4f} bits per byte")
    png(lambda figure: paint(figure, runs), 9.6, 6.4, out / "compare.png")
    return runs


def paint(figure: Any, runs: Sequence[Compared]) -> None:
    """Loss against tokens and FLOPs; experts per token and load entropy against tokens."""
    (by_tokens, by_flops), (experts, entropy) = figure.subplots(2, 2)
    for number, run in enumerate(runs):
        colour, config = COLOURS[(number + 1) % len(COLOURS)], run.config
        steps = [line["step"] for line in run.lines]
        millions = [step * config.tokens_per_step / 1e6 for step in steps]
        flops = [million * run.result.flops_per_token * 3e6 / 1e12 for million in millions]
        loss = [line["loss/lm"] for line in run.lines]
        for axes, x, y in (
            (by_tokens, millions, loss),
            (by_flops, flops, loss),
            (experts, millions, [experts_per_token(line, config) for line in run.lines]),
            (entropy, millions, [mean_of(line, "moe/load_entropy/") for line in run.lines]),
        ):
            axes.plot(smoothed(x), smoothed(y), color=colour, label=config.name)
    for axes, x, y in (
        (by_tokens, "tokens, millions", "training loss, nats per token"),
        (by_flops, "training FLOPs, 10^12", "training loss, nats per token"),
        (experts, "tokens, millions", "experts per token"),
        (entropy, "tokens, millions", "load entropy (1 is even)"),
    ):
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.grid(axis="y", lw=0.4, alpha=0.35)
    by_tokens.legend(frameon=False)


def smoothed(values: Sequence[float]) -> list[float]:
    """Means of ``SMOOTH`` neighbours, fewer at the end."""
    return [statistics.fmean(values[start : start + SMOOTH]) for start in range(0, len(values), SMOOTH)]
