"""Our engine and server beside transformers and llama.cpp: what docs/serving_speed.md shows.

``python benchmarks/serving_speed.py`` measures bf16, int8 and int4, each against the peers of the same bits in a run of
its own, and writes ``serving_speed.json``, ``docs/serving_speed.png`` and the tables of that page; with names of
weights it measures those anew and keeps the others. ``--keep FOLDER`` holds the random model and llama.cpp's files.
"""

import argparse
import json
import re
import tempfile
from pathlib import Path

from report import HERE, write

from moeforge.analyze import figures
from moeforge.cli.bench_figures import paint
from moeforge.cli.bench_serve import BITS, HTTP, LLAMA, OURS, TRANSFORMERS, asked, folder_of, measure

PAGE = HERE.parent / "docs" / "serving_speed.md"
KINDS = ("bf16", "int8", "int4")
CASES = ("1 client", "8 clients", "32 clients", "read 1024 tokens")
TARGETS = (
    *[("bf16", case, TRANSFORMERS, times) for case, times in zip(CASES, (2.4, 2.2, 2.0, 2.0), strict=True)],
    *[("bf16", case, LLAMA, times) for case, times in zip(CASES, (1.2, 1.5, 1.9, 5.0), strict=True)],
    ("int8", CASES[0], LLAMA, 1.3),
    *[("int4", case, LLAMA, times) for case, times in zip(CASES[:3], (1.3, 1.1, 1.2), strict=True)],
)
"""Weights, case, peer, and how many times as fast as it the engine is to be."""
KEPT = 0.9
"""Of the engine's rate, over HTTP with 32 clients."""


def label(name: str, weights: str) -> str:
    """As ``measure`` calls a contestant."""
    return f"{name} {BITS[weights] if name == LLAMA else weights}"


def with_tables(page: str, results: dict) -> str:
    """The page, both tables made anew."""
    page = _filled(page, "| weights | case |", [_target(results, *target) for target in TARGETS])
    return _filled(page, "| contestant |", [_figures(results, weights) for weights in KINDS])


def _filled(page: str, head: str, lines: list[str]) -> str:
    made = "\n".join(lines)
    return re.sub(rf"({re.escape(head)}.*\n\|-.*\n)(?:\|.*\n)*", lambda found: f"{found[1]}{made}\n", page)


def _target(results: dict, weights: str, case: str, peer: str, times: float) -> str:
    """The ratio of medians, and of the least and most of ours."""
    found = results[weights]["contestants"]
    ours, theirs = (found[label(name, weights)]["cases"][case]["tokens/s"][0] for name in (OURS, peer))
    ratio = ours / theirs
    cells = weights, case, label(peer, weights), f"{ours:.0f}", f"{theirs:.0f}", f"{ratio:.2f}", f"{times}"
    return f"| {' | '.join(cells)} | {'reached' if ratio >= times else 'missed'} |"


def _figures(results: dict, weights: str) -> str:
    found, lines = results[weights], []
    for name, one in found["contestants"].items():
        rates = [f"{one['cases'][case]['tokens/s'][0]:.0f}" for case in CASES]
        first, each = (one["cases"][CASES[0]][figure][0] for figure in ("first token s", "ms per token"))
        reads = one["cases"][CASES[0]]["tokens/s"][0] * one["active_bytes"] / 1e9
        start = "{:.1f} ({:.1f} to {:.1f})".format(*one["start_s"])
        speed = f"{reads:.0f} GB/s, {reads / found['limits']['read GB/s']:.0%}" if reads else ""
        lines.append(f"| {name} | {' | '.join(rates)} | {first * 1e3:.0f} | {each:.1f} | {speed} | {start} |")
    return "\n".join(lines)


def kept_over_http(results: dict) -> dict[str, float]:
    """By weights, the share of the engine's rate over all that the server gives 32 clients."""
    rates = {
        weights: [
            results[weights]["contestants"][label(name, weights)]["cases"][CASES[2]]["all tokens/s"][0]
            for name in (HTTP, OURS)
        ]
        for weights in KINDS
        if label(HTTP, weights) in results[weights]["contestants"]
    }
    return {weights: served / engine for weights, (served, engine) in rates.items()}


def main() -> None:
    """Measures, writes, draws."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("weights", nargs="*", choices=[*KINDS, []], help="all where none is named")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    file = HERE / "serving_speed.json"
    results = json.loads(file.read_text(encoding="utf-8"))["results"] if file.exists() else {}
    with tempfile.TemporaryDirectory() as fresh, folder_of(None, "olmoe-1b", options.keep or Path(fresh)) as made:
        for weights in options.weights or KINDS:
            peers = f"{TRANSFORMERS},{LLAMA}" if weights == "bf16" else LLAMA
            asks = {"against": peers, "weights": weights, "clients": "1,8,32", "threads": None, "http": True}
            found = measure(asked(*made, **asks, prompt=32, new=64, rounds=options.rounds))
            results[weights] = {name: found[name] for name in ("limits", "contestants")}
            write("serving_speed", results)
    if set(KINDS) <= results.keys():
        for weights, share in kept_over_http(results).items():
            print(f"{weights}: {share:.0%} of the engine's rate over HTTP with 32 clients (at least {KEPT:.0%})")
        everyone = {
            "contestants": {name: one for each in results.values() for name, one in each["contestants"].items()}
        }
        figures.png(lambda figure: paint(everyone, figure), 11, 4.2, PAGE.with_suffix(".png"))
        PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")


if __name__ == "__main__":
    main()
