"""How fast one text is written from packed folders, beside the same model in bf16, int8 and int4.

    OMP_NUM_THREADS=2 python benchmarks/packed_speed.py

A random model in the shape of OLMoE, three layers of 64 experts; what weights say does not change the time, so that one
expert is rounded for each format and written as often as there are experts. Each is opened, writes, and is closed
before the next one's turn: the threads of several engines would make each other sleep. Writes ``packed_speed.json``.
"""

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from report import write
from torch import Tensor

from moeforge.compress.plan import Plan, Row, packable
from moeforge.compress.rounding import to_format
from moeforge.compress.stream import Streamed
from moeforge.compress.write import Job
from moeforge.generate.engine import Engine
from moeforge.generate.opening import open_engine
from moeforge.generate.sample import Sampling
from moeforge.generate.settings import Settings
from moeforge.hub import shapes
from moeforge.hub.store import Format
from moeforge.kernels.mixed import Part

FORMATS = (Format(8, 128), Format(4, 32), Format(4, 128), Format(3, 128), Format(2, 128))
FORMATS += (Format("vector", 128), Format("ternary", 128), Format("coded", None))
MIXED = FORMATS[1], FORMATS[3], FORMATS[4], FORMATS[6]
WEIGHTS = ("bf16", "int8", "int4")


class Alike(Job):
    """A job that rounds one expert to each format, and writes it for all."""

    once: dict[Format, Sequence[Part]]

    def _experts(
        self, format: Format, matrices: list[Tensor], members: list[list[int]], *_: object
    ) -> Iterator[Sequence[Part]]:
        if format not in self.once:
            self.once[format] = [to_format(matrix[:1], format) for matrix in matrices]
        return (self.once[format] for _ in members)


def packed(folder: Path, formats: Sequence[Format], target: Path, once: dict[Format, Sequence[Part]]) -> Path:
    """The folder with its experts in these formats by turns."""
    streamed = Streamed(folder)
    rows = []
    for number, (layer, expert) in enumerate(packable(streamed.config)):
        format = formats[number % len(formats)]
        rows.append(Row(layer=layer, expert=expert, bits=format.bits, group=format.group))
    job = Alike(streamed, Plan(rows=tuple(rows)))
    job.once = once
    job.run(target)
    return target


def bytes_of_experts(engine: Engine) -> int:
    """That one token reads."""
    banks = [bank for layer in engine.runner.model.moe_layers.values() for bank in layer.banks]
    chosen = engine.runner.model.config.all_layers[0].moe.router.select.k
    return sum((b.gate_up_proj.nbytes + b.down_proj.nbytes) * chosen // b.config.num_experts for b in banks)


def main() -> None:
    """Writes, opens, measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    shapes.SHAPES["here"] = shapes.SHAPES["olmoe-1b"] | {"num_hidden_layers": given.layers, "vocab_size": 2048}
    sampling = Sampling(temperature=0, max_tokens=given.tokens, ignore_end=True)
    with TemporaryDirectory() as place:
        folder, made = Path(place) / "model", dict[Format, Sequence[Part]]()
        shapes.write_random("here", folder)
        asked = {f"--weights {w}": (folder, Settings(weights=w, max_running=1)) for w in WEIGHTS}
        for name, formats in [*((format.name, [format]) for format in FORMATS), ("mixed", MIXED)]:
            asked[name] = packed(folder, formats, Path(place) / name, made), Settings(max_running=1)
        rates, sizes = {name: list[float]() for name in asked}, dict[str, int]()
        for number in range(given.rounds):
            print(f"round {number + 1} of {given.rounds}", flush=True)
            for name, (path, settings) in asked.items():
                with open_engine(path, settings) as engine:
                    list(engine.write([0], sampling))  # the first one touches memory
                    start = time.perf_counter()
                    list(engine.write([0], sampling))
                    rates[name].append(given.tokens / (time.perf_counter() - start))
                    sizes[name] = bytes_of_experts(engine)
        found = {}
        for name, all_of in rates.items():
            found[name] = {"tokens_per_second": statistics.median(all_of), "least": min(all_of), "most": max(all_of)}
            found[name] |= {"expert_bytes_per_token": sizes[name]}
            print(f"{name:15} {found[name]}", flush=True)
    write("packed_speed", {"layers": given.layers, "tokens": given.tokens, "rounds": given.rounds, "found": found})


if __name__ == "__main__":
    main()
