"""A paper's claim beside what came out here: a recipe and what it is compared with, over several seeds."""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from moeforge.config import Tree, build, difference, override, read_yaml
from moeforge.data.corpora import Corpus
from moeforge.data.packing import evaluation_batches
from moeforge.data.prepare import TextData, prepare
from moeforge.data.tokenizers import TokenizerConfig
from moeforge.errors import UserError
from moeforge.evaluate import bits_per_byte
from moeforge.hub import load as open_model
from moeforge.hub.whole import write_text
from moeforge.models import measure
from moeforge.recipes.catalogue import load_tree
from moeforge.recipes.quantities import QUANTITIES
from moeforge.train import RunConfig, train
from moeforge.train.config import RecipeNote
from moeforge.train.loop import Run
from moeforge.train.metrics import Line, read_metrics

Trainer = Callable[[RunConfig, Path, bool, TextData], None]
"""Trains a config into a folder, going on from what is there or not."""
Verdict = Literal["shows", "does not show here", "needs scale"]
OF_SEEDS = 0.003
"""Standard deviation of a gain in bits per byte that comes of seeds alone: runs of one model deviate by 0.002
(benchmarks/demo_seeds.json)."""
HIGHER = ("load_entropy", "agreement", "local_share")
"""What should be higher, where a claim is about it; all else should be lower."""
LAST = 50
"""Steps at the end of a run that loads are averaged over."""


@dataclass(frozen=True)
class Measured:
    """One finished run in numbers."""

    bits_per_byte: float
    """Of the whole validation text."""
    experts_per_token: float
    """Experts that compute something, mean over the layers with experts and the last steps; 1 for a dense model."""
    load_entropy: float
    """Of all experts' loads, divided by log E, mean over layers and the last steps; 1 for a dense model."""
    steps: int
    tokens: int
    flops_per_token: int
    active_params: int
    total_params: int
    seconds: float
    agreement: float | None = None
    """Share of choices among the experts whose outputs are longest. From here on, None where no claim asked for it."""
    flips: float | None = None
    """Share of choices that a little noise on the router's rows undoes."""
    local_share: float | None = None
    """Share of choices that stay in the group of experts of their sequence, with two groups."""
    generalisation_gap: float | None = None
    """Bits per byte of validation text beyond those of training text."""
    worst_domain_loss: float | None = None
    """Nats per token of the domain that is worst."""


def arms(name: str, changes: Sequence[str] = ()) -> dict[str, RunConfig]:
    """The recipe's run and the one it is compared with, ``changes`` laid on both. Raises UserError.

    Recipes are listed under their own name, and under "<name>, changed for <ours>" where settings differ.
    """
    tree = load_tree(name)
    ours = build(RunConfig, override(tree, changes), source=name)
    if ours.recipe is None:
        raise UserError(f"{name} has no recipe: with claim and comparison, so there is nothing to reproduce")
    against = ours.recipe.against
    base = load_tree(against.recipe) if against.recipe else tree
    other = build(RunConfig, override(base, [*against.settings, *changes]), source=f"{name}, recipe.against")
    label = against.recipe if against.recipe and not against.settings else f"{other.name}, changed for {ours.name}"
    if label == ours.name:
        raise UserError(f"{name}: recipe.against is the recipe itself; name another one, or settings that differ")
    return {ours.name: ours, label: other}


def here(config: RunConfig, out: Path, resume: bool, data: TextData) -> None:
    """Trains in this process."""
    train(config, out, resume=resume, data=data)


def trained(config: RunConfig, out: Path, data: TextData, how: Trainer = here) -> None:
    """Trains ``config`` into ``out``, goes on where an earlier attempt stopped, or leaves what is done.

    Raises UserError when ``out`` holds a finished run of other settings.
    """
    if not (out / "model" / "config.json").exists():
        how(config, out, (out / "checkpoints").exists(), data)
        return
    there = build(RunConfig, read_yaml(out / "config.yaml"), source=str(out / "config.yaml"))
    changed = difference(*(_what_counts(run, config) for run in (there, config)))
    if changed:
        raise UserError(f"{out} holds a run of other settings; name another folder. Different: {json.dumps(changed)}")


def _what_counts(run: RunConfig, like: RunConfig) -> Tree:
    """All settings but words, and what a run takes from its text."""
    model = run.model.replace(vocab_size=like.model.vocab_size, domains=like.model.domains)
    return json.loads(run.replace(model=model, recipe=None, name=like.name).model_dump_json())


def measured(config: RunConfig, out: Path, data: TextData, by: str = "bits_per_byte", how: Trainer = here) -> Measured:
    """Trains ``config`` into ``out``, measures what is on disk, and keeps that as ``measured.json``.

    What only some claims are about is measured when one asks ``by`` it, also of a run that was measured before.
    """
    trained(config, out, data, how)
    kept = out / "measured.json"
    found = Measured(**json.loads(kept.read_text(encoding="utf-8"))) if kept.exists() else _measure(config, out, data)
    if by in QUANTITIES and getattr(found, by) is None:
        more: dict[str, Any] = {by: QUANTITIES[by](open_model(out)[0], data, config)}
        found = replace(found, **more)
    write_text(kept, json.dumps(asdict(found), indent=1) + "\n")
    return found


def _measure(config: RunConfig, out: Path, data: TextData) -> Measured:
    model, _ = open_model(out)
    lines = read_metrics(out / "metrics.jsonl")
    size = measure(config.model.replace(vocab_size=model.config.vocab_size), seq_len=config.seq_len)
    score = bits_per_byte(model, evaluation_batches(data.validation, config.batch_size, config.seq_len))
    last = lines[-LAST:]
    return Measured(
        bits_per_byte=score.bits_per_byte,
        experts_per_token=statistics.fmean(experts_per_token(line, config) for line in last),
        load_entropy=statistics.fmean(mean_of(line, "moe/load_entropy/") for line in last),
        steps=config.steps,
        tokens=config.steps * config.tokens_per_step,
        flops_per_token=size.flops_per_token,
        active_params=size.active.all,
        total_params=size.total.all,
        seconds=sum(line["perf/seconds"] for line in lines),
    )


@lru_cache(maxsize=4)
def _text(data: Corpus, tokenizer: TokenizerConfig) -> TextData:
    return prepare(data, tokenizer)


def text_of(config: RunConfig) -> TextData:
    """What the run reads; runs that read the same share it."""
    return _text(config.data, config.tokenizer)


def mean_of(line: Line, prefix: str) -> float:
    """Mean of a line's values whose name starts so; 1 where there are none."""
    values = [value for name, value in line.items() if name.startswith(prefix)]
    return statistics.fmean(values) if values else 1.0


def experts_per_token(line: Line, config: RunConfig) -> float:
    """Mean over layers of the experts that a token was computed by in one step; 1 for a dense model."""
    per_layer = []
    for index, layer in enumerate(config.model.applied_layers):
        if layer.moe is not None:
            loads = line[f"moe/tokens_per_expert/layer_{index:02d}"]
            costs = layer.moe.costs(config.model.d_model)
            kept = 1 - line.get(f"moe/drop_rate/layer_{index:02d}", 0.0)
            per_layer.append(kept * sum(load for load, cost in zip(loads, costs, strict=True) if cost))
    return statistics.fmean(per_layer) / config.tokens_per_step if per_layer else 1.0


def seconds_per_step(config: RunConfig, out: Path) -> float:
    """Median of a few steps, nothing kept."""
    run, times = Run(config, out, text_of(config)), []
    for _ in range(5):
        start = time.perf_counter()
        run.step()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def gain(by: str, ours: Measured, other: Measured) -> float:
    """How far ahead ``ours`` is in what the claim is about: above zero where the paper says so."""
    sign = -1 if by in HIGHER else 1
    return sign * (getattr(other, by) - getattr(ours, by))


def verdict(ours: Sequence[Measured], other: Sequence[Measured], note: RecipeNote) -> Verdict:
    """``shows`` when each mean gain that the claim needs is above twice its standard error."""
    by, within = note.against.by, note.against.within

    def gains(by: str) -> list[float]:
        return [gain(by, a, b) for a, b in zip(ours, other, strict=True)]

    # Of quantities that are estimated on text nobody knows what seeds alone do: one seed shows nothing.
    enough = len(ours) > 1 or by not in QUANTITIES
    shows = by == "bits_per_byte" or (enough and _above_zero(gains(by), deviation=0.0))
    if by == "bits_per_byte" or within is not None:
        shows &= _above_zero([each + (within or 0.0) for each in gains("bits_per_byte")], OF_SEEDS)
    if shows:
        return "shows"
    return "needs scale" if note.needs_scale else "does not show here"


def _above_zero(gains: Sequence[float], deviation: float) -> bool:
    """Whether the mean is above twice its standard error; ``deviation`` is what is known of others, for a single gain,
    and the least that is believed of several: two seeds agree by chance."""
    spread = max(deviation, statistics.stdev(gains)) if len(gains) > 1 else deviation
    return statistics.fmean(gains) > 2 * spread / len(gains) ** 0.5


def folder_of(label: str, seed: int, out: Path) -> Path:
    """Where an arm's run lies below ``out``; recipes that are compared with the same one share it."""
    return out / f"{label.replace(', ', '-').replace(' ', '-')}-{seed}"


def reproduce(
    name: str,
    seeds: Sequence[int],
    out: Path,
    changes: Sequence[str] = (),
    say: Callable[[str], None] = print,
    how: Trainer = here,
) -> dict[str, Any]:
    """Trains both arms for every seed into ``out``, in whatever way, and returns claim, numbers and verdict."""
    pair = arms(name, changes)
    note = next(iter(pair.values())).recipe
    assert note is not None
    texts = {label: text_of(config) for label, config in pair.items()}
    runs: dict[str, list[Measured]] = {label: [] for label in pair}
    for seed in seeds:
        for label, config in pair.items():
            say(f"seed {seed}: {label}, {config.steps} steps")
            place, by = folder_of(label, seed, out), note.against.by
            run = measured(config.replace(seed=seed), place, texts[label], by, how)
            runs[label].append(run)
            say(f"seed {seed}: {label}: {run.bits_per_byte:.4f} bits per byte")
    ours, other = runs.values()
    gains = [gain(note.against.by, a, b) for a, b in zip(ours, other, strict=True)]
    return {
        "recipe": name,
        "arxiv": note.arxiv,
        "claim": note.claim,
        "differs": note.differs,
        "by": note.against.by,
        "within": note.against.within,
        "changes": list(changes),
        "seeds": list(seeds),
        "gain": gains,
        "verdict": verdict(ours, other, note),
        "runs": {label: [asdict(run) for run in each] for label, each in runs.items()},
    }
