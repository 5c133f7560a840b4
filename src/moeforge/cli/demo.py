"""``moeforge demo``: train a Pyramid-Residual MoE and its dense twin, compare them, let them write, make a report."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeforge.errors import UserError

if TYPE_CHECKING:
    from moeforge.analyze import Record
    from moeforge.train import RunConfig

Tree = dict[str, Any]

ARMS = ("dense", "pr_moe")
"""Folders of the two runs and keys of the summary."""
EVALUATIONS = 12
EVALUATION_TOKENS = 60_000
_RUN_PARTS = ("config.yaml", "metrics.jsonl", "checkpoints", "model", "tensorboard")
_PAGES = ("report.html", "summary.json", "comparison.png")


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the two runs and the report.")] = Path("demo"),
    seed: Annotated[int, typer.Option(help="Of starting weights and data order.", min=0)] = 0,
    steps: Annotated[int | None, typer.Option(help="Training steps of each; default: the recipe's.", min=1)] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only the result.")] = False,
) -> None:
    """Train PR-MoE and its dense twin on Python's standard library, compare, write text, make a report."""
    from moeforge import recipes

    overrides = [f"--seed={seed}", *([f"--steps={steps}"] if steps else [])]
    command = " ".join(["moeforge demo", f"--out {out}", f"--seed {seed}", *([f"--steps {steps}"] if steps else [])])
    run_demo(recipes.load("pr-moe", overrides), out, quiet, command)


def run_demo(config: "RunConfig", out: Path, quiet: bool, command: str) -> Tree:
    """Trains ``config`` and its dense twin into ``out``, writes report, picture and summary, and returns the summary.

    Raises UserError when ``out`` holds anything but an earlier demo; of an earlier one only its own files go.
    """
    from moeforge.analyze import check_packages, write_report
    from moeforge.analyze.figures import png, summary
    from moeforge.cli.analyze import read_run
    from moeforge.data.prepare import prepare
    from moeforge.hub.whole import write_text
    from moeforge.train import train

    check_packages()
    make_room(out)
    say: Callable[[str], None] = (lambda text: None) if quiet else typer.echo
    say(f"Reading {config.data.type} text and making a tokenizer ...")
    data = prepare(config.data, config.tokenizer)
    shown: dict[int, float] = {}
    for (arm, settings), line in zip(twins(config).items(), _INTRODUCTIONS, strict=True):
        say(f"\n{line}")
        train(settings, out / arm, quiet=quiet, on_step=_follow(arm, shown, say), data=data)
    say("\nReading both models back from disk, measuring them on the held-out text, and letting them write ...")
    records = [read_run(out / arm, data) for arm in ARMS]
    result = summarise(records)
    write_report(records, out / "report.html", command)
    png(summary(records), 9.6, 3.6, out / "comparison.png")
    write_text(out / "summary.json", json.dumps(result, indent=2) + "\n")
    typer.echo(ending(records, result, out))
    return result


_INTRODUCTIONS = (
    "1 of 2: the dense twin, one MLP in every layer, as wide as the experts cost",
    "2 of 2: the Pyramid-Residual MoE, more experts in higher layers, one of them beside a fixed MLP for each token",
)


def twins(config: "RunConfig") -> dict[str, "RunConfig"]:
    """Both runs by folder: alike in all but the model, and the models alike in arithmetic per token."""
    from moeforge.models import dense_twin

    config = config.replace(
        eval_every=max(1, config.steps // EVALUATIONS), eval_tokens=min(config.eval_tokens, EVALUATION_TOKENS)
    )
    return {"dense": config.replace(name="dense", recipe=None, model=dense_twin(config.model)), "pr_moe": config}


def make_room(out: Path) -> None:
    """Deletes the files of an earlier demo. Raises UserError when ``out`` is anything else that is not empty."""
    if out.is_dir() and any(out.iterdir()):
        if not any(_is_run(out / arm) for arm in ARMS) and not _is_summary(out / "summary.json"):
            raise UserError(f"{out} is not empty and no earlier demo: name another folder with --out")
        runs = [out / arm / part for arm in ARMS if _is_run(out / arm) for part in _RUN_PARTS]
        for path in (*runs, *(out / page for page in _PAGES)):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    elif out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: name a folder with --out")


def _is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file() and (folder / "metrics.jsonl").is_file()


def _is_summary(path: Path) -> bool:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.keys() >= set(ARMS)


def _follow(arm: str, shown: dict[int, float], say: Callable[[str], None]) -> Callable[[Tree], None]:
    """Prints bits per byte at each evaluation; the second arm's beside the first's at the same step."""

    def on_step(line: Tree) -> None:
        if "eval/bits_per_byte" not in line:
            return
        step, bits = line["step"], line["eval/bits_per_byte"]
        before = shown.setdefault(step, bits)
        second = "" if arm == ARMS[0] else f"   PR-MoE {bits:.3f}   {bits - before:+.3f}"
        say(f"  step {step:5d}   bits per byte: dense {before:.3f}{second}")

    return on_step


def summarise(records: "list[Record]") -> Tree:
    """``summary.json``: both runs in numbers, and the comparison at equal tokens and at equal training time."""
    from moeforge.analyze import at_equal_time

    dense, pr_moe = records
    equal = at_equal_time(records)
    runs = {
        arm: {
            "bits_per_byte": record.bits_per_byte,
            "active_params": record.size.active.all,
            "total_params": record.size.total.all,
            "flops_per_token": record.size.flops_per_token,
            "seconds": record.seconds,
        }
        for arm, record in zip(ARMS, records, strict=True)
    }
    return {
        **runs,
        "margin": dense.bits_per_byte - pr_moe.bits_per_byte,
        "steps": pr_moe.lines[-1]["step"],
        "tokens": pr_moe.tokens_seen,
        "seed": pr_moe.settings["seed"],
        "equal_wall_time": {
            "seconds": equal.seconds,
            **dict(zip(ARMS, equal.bits, strict=True)),
            "share_of_own_training": dict(zip(ARMS, equal.done, strict=True)),
            "how": "validation curves read at this training time, on the line between two evaluations",
        },
    }


def ending(records: "list[Record]", result: Tree, out: Path) -> str:
    """What the demo prints at last."""
    from moeforge.analyze.record import at_equal_time
    from moeforge.analyze.report import equal_time_text, headline

    rows = [
        ("bits per byte of unseen text", [f"{record.bits_per_byte:.4f}" for record in records]),
        ("parameters a token uses", [f"{record.size.active.all:,}" for record in records]),
        ("parameters in all", [f"{record.size.total.all:,}" for record in records]),
        ("FLOPs per token, forward", [f"{record.size.flops_per_token:,}" for record in records]),
        ("training seconds", [f"{record.seconds:.1f}" for record in records]),
    ]
    table = [f"{name:30}{dense:>14}{pr_moe:>14}" for name, (dense, pr_moe) in [("", ["dense", "PR-MoE"]), *rows]]
    written = [
        f"--- {records[1].name} goes on from {sample.prompt!r}\n{''.join(sample.pieces)}\n"
        for sample in records[1].samples
    ]
    return "\n".join(
        [
            *("", headline(records), "", *table, "", equal_time_text(records, at_equal_time(records)), ""),
            *written,
            f"Report, with pictures of the experts at work:  {out / 'report.html'}",
            f"Numbers:  {out / 'summary.json'}",
            "Go on:",
            f"  moeforge generate {out / 'pr_moe'} 'class ' --show-experts",
            f"  moeforge inspect {out / 'pr_moe'}",
            "  moeforge recipes list",
        ]
    )
