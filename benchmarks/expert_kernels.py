"""Expert kernels against transformers, a sorted loop and a dense MLP, and a training step: what docs/kernels.md shows.

``python benchmarks/expert_kernels.py`` measures all parts and writes ``expert_kernels.json``, ``docs/kernels.png`` and
the table of that page; with names of parts it measures those anew and keeps the others, with ``--case`` only the cases
called so. Not called kernels.py: transformers looks for a package of that name.
"""

import argparse
import json
import re
from pathlib import Path

import torch
from report import HERE, interleaved, ratios, write

from moeforge.cli.bench import in_own_process
from moeforge.cli.bench_kernels import CASES, Case
from moeforge.kernels.allocator import keep_freed_memory

PARTS = ("default", "kept", "training")
ROUNDS = 7
PAGE = HERE.parent / "docs" / "kernels.md"
STEP = {"d_model": 512, "num_experts": 64, "top_k": 8, "d_expert": 256, "num_layers": 6}
COLOURS = {"native": "C3", "streaming": "C0", "grouped": "C1", "sorted loop": "C7", "transformers grouped_mm": "C2"}
COLOURS |= dict.fromkeys(("torch int8pack_mm", "torch int4pack_mm"), "C4")


def training() -> dict[str, object]:
    """A whole training step of an OLMoE-shaped model, 4 x 512 tokens in bf16, against transformers' class."""
    import training_speed  # needs transformers, which the table does not

    keep_freed_memory()
    training_speed.BATCH, training_speed.LENGTH = 4, 512
    torch.manual_seed(0)
    builders = {"moeforge": training_speed.ours, "transformers": training_speed.theirs}
    variants = {name: training_speed.step(build(STEP, torch.bfloat16)) for name, build in builders.items()}
    return ratios(interleaved(variants, ROUNDS), over="transformers")


def with_table(page: str, results: dict) -> str:
    """The page, its table of cases made anew."""
    made = "\n".join(row(case, allocator, results[allocator]) for case in CASES for allocator in PARTS[:2])
    return re.sub(r"(?<=\n)(\| case \|.*\n\|-.*\n)(?:\|.*\n)*", lambda found: f"{found[1]}{made}\n", page)


def row(case: Case, allocator: str, found: dict) -> str:
    """One line: milliseconds, and each ratio beside its target; the share of memory's speed where weights limit."""
    one = found["cases"][case.name]
    share = one["weights_gb_per_s"] / found["limits"]["read GB/s"]
    cells = [
        case.name,
        allocator,
        f"{one['variants']['native']['median_ms']:.2f}",
        f"{one['over_dense']:.2f}",
        f"{case.most:g}" if case.most else "",
        f"{one['times_best_peer']:.2f} ({one['best_peer']})",
        f"{case.least:g}" if case.least else "",
        f"{share:.0%}" if case.tokens <= 64 and not case.backward else "",
        f"{case.reads:.0%}" if case.reads else "",
    ]
    return f"| {' | '.join(cells)} |"


def plot(results: dict, path: Path) -> None:
    """Time over the dense MLP's, per case and variant, for both settings of the allocator."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(12, 5), sharey=True, layout="constrained")
    for axis, allocator in zip(panels, ("default", "kept"), strict=True):
        cases = results[allocator]["cases"]
        for place, case in enumerate(cases.values()):
            for name, row in case["variants"].items():
                if name in COLOURS:
                    axis.plot(row["over_dense"], -place, "o", color=COLOURS[name])
            if case["target_over_dense"]:
                axis.plot(case["target_over_dense"], -place, "|", color="black", markersize=16)
        axis.set_yticks(-torch.arange(len(cases)).numpy(), list(cases), fontsize=8)
        axis.axvline(1, color="grey", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.set_xlabel("time over a dense MLP of the same FLOPs (bar: the target)")
        axis.set_title(f"allocator: {'freed memory is kept' if allocator == 'kept' else 'as it comes'}")
        axis.xaxis.set_major_formatter("{x:g}")
    names = [name for name in COLOURS if not name.startswith("torch")]
    marks = [panels[0].plot([], [], "o", color=COLOURS[name])[0] for name in [*names, "torch int8pack_mm"]]
    figure.legend(marks, [*names, "torch's quantised product"], loc="outside lower center", ncols=6, fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measures, writes, draws."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="all where none is named")
    parser.add_argument(
        "--case", action="append", default=[], help="part of a case's name: measure only such cases anew"
    )
    options = parser.parse_args()
    wanted = options.parts or (PARTS[:2] if options.case else PARTS)
    file = HERE / "expert_kernels.json"
    results = json.loads(file.read_text(encoding="utf-8"))["results"] if file.exists() else {}
    for part in wanted:
        found = training() if part == "training" else in_own_process(part, options.case, ROUNDS)
        if options.case:  # with the limits of their own run
            cases = {name: case | {"limits": found["limits"]} for name, case in found["cases"].items()}
            found = results[part] | {"cases": results[part]["cases"] | cases}
        results[part] = found
        write("expert_kernels", results)
    if {"default", "kept"} <= results.keys():
        plot(results, PAGE.with_suffix(".png"))
        PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")


if __name__ == "__main__":
    main()
