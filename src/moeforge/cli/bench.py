"""``moeforge bench``: what this machine does with our parts, beside its peers and its limits."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

bench = typer.Typer(help="Measure on this machine.", no_args_is_help=True)


@bench.callback()
def _group() -> None:
    """Measure on this machine."""


@bench.command()
def kernels(
    case: Annotated[list[str] | None, typer.Option("--case", help="Only cases whose name contains this.")] = None,
    rounds: Annotated[int, typer.Option(min=3, help="Timings of each variant, interleaved.")] = 7,
    allocator: Annotated[str, typer.Option(help="default, kept (freed memory is kept), or both.")] = "both",
    out: Annotated[Path | None, typer.Option(help="Where to write the JSON.")] = None,
) -> None:
    """Our engines, transformers' experts, a sorted loop and a dense MLP of the same FLOPs, interleaved."""
    from moeforge.cli.bench_kernels import chosen, measure, show
    from moeforge.errors import UserError

    if allocator not in ("default", "kept", "both"):
        raise UserError(f"--allocator is default, kept or both, not '{allocator}'")
    cases = chosen(case or [])
    if allocator == "both":
        results = {which: in_own_process(which, case or [], rounds) for which in ("default", "kept")}
    else:
        results = {allocator: measure(cases, rounds, keep_memory=allocator == "kept")}
    if out:
        out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for which, found in results.items():
        print(f"allocator: {which}")
        show(found)


@bench.command()
def serve(
    model: Annotated[Path | None, typer.Argument(help="A model folder.")] = None,
    *,
    random: Annotated[
        str | None, typer.Option(help="Random weights of this shape instead: olmoe-1b, olmoe-5m.")
    ] = None,
    against: Annotated[str, typer.Option(help="transformers, llama.cpp, or both between commas.")] = "",
    weights: Annotated[str, typer.Option(help="float32, bf16, int8, int4: those to measure, between commas.")] = "bf16",
    clients: Annotated[str, typer.Option(help="Texts at the same time, between commas.")] = "1,8,32",
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 32,
    new: Annotated[int, typer.Option(min=2, help="Tokens to write after each.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="In each, all take turns.")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="Of each contestant.", show_default="all cores")] = None,
    http: Annotated[bool, typer.Option("--http/--no-http", help="Measure the server besides the engine.")] = True,
    keep: Annotated[Path | None, typer.Option(help="Folder for random models and GGUF files.")] = None,
    out: Annotated[Path | None, typer.Option(help="A .json to write; a picture is put beside it.")] = None,
) -> None:
    """Time to first token, time per token and tokens/s, for 1 client and more, side by side with other software."""
    from moeforge.analyze import figures
    from moeforge.cli.bench_figures import paint, rows
    from moeforge.cli.bench_serve import asked, folder_of, measure

    if out is not None:
        figures.library()
    with folder_of(model, random, keep) as (folder, kept):
        peers = {"against": against, "weights": weights, "clients": clients, "threads": threads, "http": http}
        found = measure(asked(folder, kept, **peers, prompt=prompt, new=new, rounds=rounds))
    for line in rows(found):
        print(line)
    if out is not None:
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        count = len(found["contestants"])
        figures.png(lambda figure: paint(found, figure), 11, 1 + 0.28 * count, out.with_suffix(".png"))


def in_own_process(allocator: str, cases: list[str], rounds: int) -> dict[str, object]:
    """What one setting of the allocator does must not reach the next."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "results.json"
        command = [sys.executable, "-m", "moeforge", "bench", "kernels", "--allocator", allocator]
        command += ["--rounds", str(rounds), "--out", str(out), *(f"--case={name}" for name in cases)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return json.loads(out.read_text(encoding="utf-8"))[allocator]
