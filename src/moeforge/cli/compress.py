"""``moeforge compress``: the best model that fits a budget, and what it cost."""

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.status import Status

from moeforge.cli.amounts import in_bytes
from moeforge.cli.held_out import check, count, text_settings
from moeforge.errors import UserError

if TYPE_CHECKING:
    from moeforge.compress.export import Export
    from moeforge.compress.run import Task
    from moeforge.compress.write import Job

Share = Annotated[str | None, typer.Option(help="Share of each layer's experts to drop, or merge, first: 25%.")]
Order = Annotated[
    str, typer.Option(help="output_error, frequency, weight, reap, router_norm, router_hint: what goes is least of it.")
]
Base = Annotated[Path | None, typer.Option(help="The model before its tuning: --drop-by router_norm counts since.")]
Skipped = Annotated[str | None, typer.Option(help="Share of a token's choices after its first that are not run: 50%.")]
Dense = Annotated[
    Literal["mean", "units"] | None, typer.Option(help="One MLP a layer: the experts' mean, or their best units.")
]
Granularity = Annotated[
    Literal["expert", "layer", "model"] | None,
    typer.Option(help="What shares one format.", show_default="expert; with --to hf the model"),
]
To = Annotated[Literal["hf"] | None, typer.Option(help="A folder for transformers, opened by it before it counts.")]
Rounding = Annotated[
    Literal["nearest", "gptq"] | None,
    typer.Option(help="Each weight by itself, or for the calibration text.", show_default="gptq, or as --plan says"),
]
Codebooks = Annotated[
    bool, typer.Option("--codebooks", help="Experts may become vectors of a codebook of their own: 2.1 bits.")
]
UNITS = {"": 1, "B": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def compress(
    context: typer.Context,
    model: Annotated[Path, typer.Argument(help="A model folder or a run folder.")],
    *,
    fit: Annotated[str | None, typer.Option(help="Bytes of the weight files at most: 3GiB, 500MB.")] = None,
    bits_per_weight: Annotated[float | None, typer.Option(help="Of the experts' weights, on average, at most.")] = None,
    max_loss: Annotated[
        str | None, typer.Option(help="Smallest model whose bits per byte grow by at most: +2%.")
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="A JSON or YAML file with a row for each expert.")] = None,
    drop: Share = None,
    drop_by: Order = "output_error",
    base: Base = None,
    merge: Share = None,
    skip: Skipped = None,
    to_dense: Dense = None,
    granularity: Granularity = None,
    to: To = None,
    codebooks: Codebooks = False,
    rounding: Rounding = None,
    out: Annotated[Path | None, typer.Option(help="The folder to write.", show_default="PATH-compressed")] = None,
    profile: Annotated[Path | None, typer.Option(help="A profile to use, or to keep if there is none.")] = None,
    tokens: Annotated[str, typer.Option(help="Of calibration text.")] = "64k",
    held_out: Annotated[str, typer.Option(help="Tokens of held-out text to measure on.")] = "32k",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show plan and size; write nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Write over the folder.")] = False,
) -> None:
    """Pack the experts of a model into fewer bits, or drop some, and measure what it cost.

    Say how large: --fit, --bits-per-weight, --max-loss, or an own --plan; --drop, --merge or --skip alone leaves the
    rest at 16 bits. The folder opens like any other. Text is the run's own, or the standard library: --data as in
    evaluate.
    """
    from moeforge.compress.run import Task, Wish

    check(context.obj)
    sizes = {"--fit": fit, "--bits-per-weight": bits_per_weight, "--max-loss": max_loss, "--plan": plan}
    _check_wishes(sizes, {"--drop": drop, "--merge": merge}, {"--skip": skip}, to_dense is not None, dry_run)
    _check_fits(to, granularity, base, drop and drop_by, codebooks and not (fit or bits_per_weight or max_loss))
    target = _target(model, out, force or dry_run)
    shares = {"max_loss": max_loss, "drop": drop, "merge": merge, "skip": skip}
    told = {name: _share(share, f"--{name.replace('_', '-')}") for name, share in shares.items() if share is not None}
    by = granularity or ("model" if to else "expert")
    wish = Wish(
        _bytes(fit), bits_per_weight, plan=plan, drop_by=drop_by, base=base, granularity=by, codebooks=codebooks, **told
    )
    with Console(stderr=True).status("reading text") as status:
        tell = partial(_tell, status)
        task = Task(model, count(tokens), count(held_out), profile, tell, rounding, to == "hf")
        task.read_text(text_settings(model, task.streamed.config, context.obj))
        dense = task.write_dense(to_dense, target) if to_dense else None
        job = None if dense else task.plan(wish)
        report = task.write(job, target) if job and not dry_run else None
    if dense:
        _say_dense(dense, target, as_json)
    elif report:
        _say(report, target, as_json)
    elif job:
        _show(task, job, as_json)


def _target(model: Path, out: Path | None, over: bool) -> Path:
    """The folder to write. Raises UserError where there is one already, and it may not be written ``over``."""
    target = out or model.with_name(f"{model.name}-compressed")
    if target.exists() and not over:
        raise UserError(f"{target} exists: name another with --out, or add --force to write over it")
    return target


def _tell(status: Status, what: str, layers: int) -> None:
    """In a terminal; elsewhere nothing is drawn."""
    status.update(f"{what}: {layers} layers done")


def _check_wishes(
    sizes: "dict[str, Any]", counts: "dict[str, Any]", skips: "dict[str, Any]", alone: bool, dry_run: bool
) -> None:
    """Raises UserError unless one size is named, or fewer experts, or both; or neither where no experts are left."""
    named, fewer, less = ([k for k, value in wishes.items() if value is not None] for wishes in (sizes, counts, skips))
    if len(named) > 1 or len(fewer) > 1 or ("--plan" in named and [*fewer, *less]):
        raise UserError(f"{' and '.join([*named, *fewer, *less][-2:])} say the same thing twice: leave one out")
    if alone and (named or fewer or less or dry_run):
        raise UserError("--to-dense leaves no experts to pack, drop or plan for: leave the other wishes out")
    if not (named or fewer or less or alone):
        raise UserError("say how large it may be: --fit 3GiB, --bits-per-weight 3, --max-loss +2%, or --plan FILE")


def _check_fits(to: str | None, granularity: str | None, base: Path | None, drop_by: str | None, no_size: bool) -> None:
    """Raises UserError for options that need others, or go without them; ``no_size``: codebooks without one."""
    if no_size:
        raise UserError("--codebooks goes with --fit, --bits-per-weight or --max-loss")
    if to and granularity not in (None, "model"):
        raise UserError(
            "transformers reads the experts of all layers by one scheme: leave --granularity out, or --to hf"
        )
    if base and drop_by != "router_norm":
        raise UserError("--base is what --drop-by router_norm counts from: leave it out, or add that and --drop 25%")


def _say(report: "dict[str, Any]", target: Path, as_json: bool) -> None:
    if as_json:
        print(json.dumps(report))
        return
    quality, sizes = report["quality"], report["bytes"]
    before, after = sum(report["bytes_before"].values()), sum(sizes.values())
    print(
        f"{target}: {in_bytes(after)} of {in_bytes(before)}, experts {in_bytes(sizes['experts'])}; {report['opened']}"
    )
    print(_lost(quality))
    print(f"{quality['experts_per_token']:.2f} experts per token in the mean of the layers that have some")


def _say_dense(quality: "dict[str, Any]", target: Path, as_json: bool) -> None:
    print(json.dumps(quality) if as_json else f"{target}: dense, {_lost(quality)}")


def _lost(quality: "dict[str, Any]") -> str:
    grown = quality["bits_after"] / quality["bits_before"] - 1
    bits = f"{quality['bits_before']:.4f} -> {quality['bits_after']:.4f} bits per byte ({grown:+.2%})"
    return f"{bits}, KL {quality['kl']:.4f} nats per token, on {quality['tokens']:,} held-out tokens"


def _show(task: "Task", job: "Job | Export", as_json: bool) -> None:
    sizes = job.bytes_by_class()
    if as_json:
        print(json.dumps({"bytes": sizes, "plan": job.plan.model_dump()}))
        return
    for line in task.table(job):
        print(line)
    print(
        f"{in_bytes(sum(sizes.values()))} of weight files: " + ", ".join(f"{k} {in_bytes(v)}" for k, v in sizes.items())
    )


def _bytes(text: str | None) -> int | None:
    import re

    if text is None:
        return None
    match = re.fullmatch(r"\s*([\d.]+)\s*([KMG]?I?)B?\s*", text, re.IGNORECASE)
    try:
        assert match is not None
        return int(float(match[1]) * UNITS[match[2].upper()])
    except (AssertionError, ValueError, KeyError) as error:
        raise UserError(f"--fit={text} is no number of bytes; 3GiB and 500MB are understood") from error


def _share(text: str, option: str) -> float:
    number = text.strip().removeprefix("+")
    try:
        share = float(number.removesuffix("%")) / 100 if number.endswith("%") else float(number)
    except ValueError as error:
        raise UserError(f"{option}={text} is no share; 25% and 0.25 are understood") from error
    if not 0 < share < 1:
        raise UserError(f"{option}={text} must lie between 0% and 100%")
    return share
