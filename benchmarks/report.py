"""What every benchmark writes: its numbers, and enough of the machine to know what they can be compared with."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

HERE = Path(__file__).parent


def write(name: str, results: object) -> None:
    """``benchmarks/NAME.json``."""
    machine = {
        "date": time.strftime("%Y-%m-%d"),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    path = HERE / f"{name}.json"
    path.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")


def interleaved(variants: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each variant, one after the other in each round, so that a noisy machine treats them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratios(seconds: dict[str, list[float]], over: str) -> dict[str, dict[str, float]]:
    """Median and quartiles of each variant's time over ``over``'s in the same round; below one is faster."""
    summary = {}
    for name, values in seconds.items():
        ratio = sorted(value / base for value, base in zip(values, seconds[over], strict=True))
        low, middle, high = statistics.quantiles(ratio, n=4)
        summary[name] = {"median_ms": statistics.median(values) * 1e3, "ratio": middle, "quartiles": [low, high]}
    return summary
