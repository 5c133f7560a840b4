"""What the parallel path costs where there is nothing to exchange: steps of one process, through it and without it.

Two runs of the same recipe, seed and text take their steps in turn in one process: ``plain`` alone, ``parallel`` as the
only rank of a gloo group, with an expert size of 1. ``python benchmarks/parallel_overhead.py`` writes
``parallel_overhead.json``.
"""

import argparse
import os
import socket
import tempfile
from pathlib import Path

from report import interleaved, ratios, write

from moeforge import recipes
from moeforge.data.prepare import prepare
from moeforge.kernels.allocator import keep_freed_memory
from moeforge.parallel.layout import Layout
from moeforge.parallel.together import join
from moeforge.train.loop import Run


def become_the_only_rank() -> None:
    """As torchrun would start it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)


def main() -> None:
    """Both runs, and whether they came to the same weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="pr-moe")
    parser.add_argument("--rounds", type=int, default=200)
    options = parser.parse_args()
    config = recipes.load(options.recipe)
    keep_freed_memory()
    data = prepare(config.data, config.tokenizer)
    become_the_only_rank()
    with tempfile.TemporaryDirectory() as folder, join(Layout()) as ranks:
        plain, parallel = Run(config, Path(folder), data), Run(config, Path(folder), data, ranks)
        summary = ratios(interleaved({"plain": plain.step, "parallel": parallel.step}, options.rounds), over="plain")
        pairs = zip(plain.model.parameters(), parallel.model.parameters(), strict=True)
        away = max(float((a - b).detach().abs().max()) for a, b in pairs)
    print(f"{options.recipe}: {summary['parallel']['ratio']:.4f}, weights at most {away:g} apart")
    write("parallel_overhead", {options.recipe: {**summary, "rounds": options.rounds, "weights_apart": away}})


if __name__ == "__main__":
    main()
