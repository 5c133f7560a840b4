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


def in_own_process(allocator: str, cases: list[str], rounds: int) -> dict[str, object]:
    """What one setting of the allocator does must not reach the next."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "results.json"
        command = [sys.executable, "-m", "moeforge", "bench", "kernels", "--allocator", allocator]
        command += ["--rounds", str(rounds), "--out", str(out), *(f"--case={name}" for name in cases)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return json.loads(out.read_text(encoding="utf-8"))[allocator]
