"""What ``moeforge bench serve`` measures: texts written by our engine and its peers in turns, for 1 client and more."""

import itertools
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, Self

from moeforge.cli.contestants import Job, Texts
from moeforge.errors import UserError

OURS, HTTP, LLAMA, TRANSFORMERS = "moeforge", "moeforge over HTTP", "llama.cpp", "transformers"
MODULES = {OURS: "engine", HTTP: "over_http", LLAMA: "llama_cpp_batch", TRANSFORMERS: "transformers_generate"}
NEEDS = {
    LLAMA: {"llama_cpp": "llama-cpp-python", "gguf": "'moeforge[gguf]'"},
    TRANSFORMERS: {"transformers": "'moeforge[hf]'"},
    HTTP: {"fastapi": "'moeforge[serve]'"},
}
"""Of each contestant: what it imports, and what pip calls it."""
BITS = {"bf16": "bf16", "float32": "float32", "int8": "Q8_0", "int4": "Q4_0"}
"""Our weights -> llama.cpp's of the same bits."""
FLOATS = ("bf16", "float32")
READ = 1024
"""Tokens of the prompt whose reading is timed."""
FIGURES = ("tokens/s", "first token s", "ms per token", "all tokens/s")


@dataclass(frozen=True)
class Case:
    """One thing to ask of each contestant."""

    name: str
    clients: int
    prompt: int
    """Tokens of each prompt."""
    new: int
    """Tokens to write after it."""


@dataclass(frozen=True)
class Plan:
    """What to measure with what."""

    path: Path
    against: tuple[str, ...]
    weights: tuple[str, ...]
    clients: tuple[int, ...]
    http: bool
    prompt: int
    new: int
    rounds: int
    threads: int
    vocab_size: int
    active_share: float
    """Of the weights, those that one token reads."""
    keep: Path
    """Where files for llama.cpp are, or are put."""

    @property
    def cases(self) -> list[Case]:
        """Writing for each number of clients, then reading."""
        writing = [Case(f"{n} client{'s' * (n > 1)}", n, self.prompt, self.new) for n in self.clients]
        return [*writing, Case(f"read {READ} tokens", 1, READ, 1)]

    def job(self, path: Path, weights: str) -> Job:
        """What each contestant is started with."""
        length = max(case.prompt + case.new for case in self.cases)
        return Job(str(path), weights, self.threads, max(self.clients), length, self.active_share)

    def contestants(self) -> list[tuple[str, str]]:
        """Who, with which weights: those of the same bits one after the other."""
        found = []
        for weights in self.weights:
            found += [(OURS, weights), *[(HTTP, weights)] * self.http]
            found += [(peer, weights) for peer in self.against if peer != TRANSFORMERS or weights in FLOATS]
        return found


@contextmanager
def folder_of(model: Path | None, shape: str | None, keep: Path | None) -> Iterator[tuple[Path, Path]]:
    """(the model's folder, a folder for what is made), which is gone afterwards where it is not to be kept."""
    if (model is None) == (shape is None):
        raise UserError("name a model folder, or a shape with --random")
    with ExitStack() as stack:
        kept = keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="moeforge-bench-")))
        folder = model or kept / str(shape)
        if shape is not None and not folder.exists():
            from moeforge.hub.shapes import write_random

            write_random(shape, folder)
        yield folder, kept


def asked(
    folder: Path,
    kept: Path,
    *,
    against: str,
    weights: str,
    clients: str,
    prompt: int,
    new: int,
    rounds: int,
    threads: int | None,
    http: bool,
) -> Plan:
    """What the options say. Raises UserError for what they cannot mean, before anything is opened."""
    from moeforge.hub import read_config
    from moeforge.models import measure as count

    peers = _listed("--against", against, (TRANSFORMERS, LLAMA))
    kinds = _listed("--weights", weights, tuple(BITS))
    if not clients.replace(",", "").isdecimal():
        raise UserError(f"--clients are numbers between commas, not '{clients}'")
    numbers = sorted({int(number) for number in clients.split(",")})
    missing([*peers, *[HTTP] * http])
    if TRANSFORMERS in peers and not {*kinds} & {*FLOATS}:
        raise UserError(f"transformers has no {weights} weights of ours to compare with: add bf16 to --weights")
    config, _ = read_config(folder)
    size = count(config)
    share = (size.active.all if config.tie_embeddings else size.active.without_input_embedding) / size.total.all
    threads = threads or os.cpu_count() or 1
    plan = Plan(
        folder, peers, kinds, tuple(numbers), http, prompt, new, rounds, threads, config.vocab_size or 0, share, kept
    )
    longest = max(case.prompt + case.new for case in plan.cases)
    if longest > config.max_seq_len:
        raise UserError(
            f"texts of {longest} tokens are to be written, and this model's context has {config.max_seq_len}"
        )
    return plan


def _listed(option: str, given: str, known: tuple[str, ...]) -> tuple[str, ...]:
    names = tuple(name for name in given.split(",") if name)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(f"{option} takes {', '.join(known)}, not '{unknown[0]}'")
    return names


def missing(names: Sequence[str]) -> None:
    """Raises UserError with the line that installs what the contestants need."""
    for name in names:
        absent = [package for module, package in NEEDS.get(name, {}).items() if find_spec(module) is None]
        if absent:
            raise UserError(f"{name} is not installed: pip install {' '.join(absent)}")


class Contestant:
    """A process that writes."""

    def __init__(self, name: str, job: Job) -> None:
        """Starts it and has it write one token: ``start_s`` is how long that takes from nothing."""
        self.name, self._log = name, tempfile.TemporaryFile()  # noqa: SIM115 - closed on exit
        started = time.perf_counter()
        command = [sys.executable, "-m", f"moeforge.cli.contestants.{MODULES[name]}", json.dumps(asdict(job))]
        environment = {**os.environ, "OMP_NUM_THREADS": str(job.threads)}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment
        )
        try:
            self.active_bytes = float(self._hear()["active_bytes"])
            self.write([[1] * 8], 1)
        except BaseException:
            self.close()
            raise
        self.start_s = time.perf_counter() - started

    def write(self, prompts: Sequence[Sequence[int]], new: int) -> Texts:
        """What it wrote, and when."""
        print(json.dumps({"prompts": prompts, "new": new}), file=self._stdin, flush=True)
        return self._hear()

    def peak_bytes(self) -> int:
        """The most that it had in memory so far, mapped files and processes of its own among it."""
        processes = [self._process.pid]
        for pid in processes:  # grows as it goes
            processes += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split())
        status = (Path(f"/proc/{pid}/status").read_text(encoding="ascii") for pid in processes)
        return sum(1024 * int(text.split("VmHWM:")[1].split()[0]) for text in status)

    @property
    def _stdin(self) -> IO[str]:
        assert self._process.stdin is not None
        return self._process.stdin

    def _hear(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._log.seek(0)
            last = self._log.read().decode(errors="replace").strip().splitlines()[-1:]
            raise UserError(f"{self.name} has stopped: {''.join(last) or self._process.returncode}")
        return json.loads(line)

    def close(self) -> None:
        """Ends the process: it stops when nobody can ask it any more."""
        with self._log:
            self._stdin.close()
            try:
                self._process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                self._process.kill()
            with self._process:  # closes its pipes
                pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def measure(plan: Plan) -> dict[str, Any]:
    """The machine's reading speed, then of each contestant how long it takes to start, alone and in turns, and of each
    case every figure: median, least and most."""
    files = _gguf(plan) if LLAMA in plan.against else {}
    jobs = {
        f"{name} {BITS[weights] if name == LLAMA else weights}": (
            name,
            plan.job(files[weights] if name == LLAMA else plan.path, weights),
        )
        for name, weights in plan.contestants()
    }
    starts: dict[str, list[tuple[float, int]]] = {label: [] for label in jobs}
    for number in range(plan.rounds):
        for label in _in_turn(list(jobs), number):
            print(f"start {number + 1} of {plan.rounds}: {label}", file=sys.stderr, flush=True)
            with Contestant(*jobs[label]) as one:
                starts[label].append((one.start_s, one.peak_bytes()))
    with ExitStack() as stack:
        opened = {}
        for label, job in jobs.items():
            print(f"opening {label}", file=sys.stderr, flush=True)
            opened[label] = stack.enter_context(Contestant(*job))
        limits = {"read GB/s": _read_speed(plan.threads)}
        rounds = [_round(plan, opened, number) for number in range(plan.rounds)]
        limits["read GB/s"] = max(limits["read GB/s"], _read_speed(plan.threads))
    facts = {
        name: {
            "start_s": spread(seconds for seconds, _ in starts[name]),
            "start_peak_bytes": max(peak for _, peak in starts[name]),
            "active_bytes": one.active_bytes,
        }
        for name, one in opened.items()
    }
    return {
        "plan": _written(plan),
        "machine": _machine(),
        "limits": limits,
        "contestants": _summary(facts, rounds, plan),
        "rounds": rounds,
    }


def _machine() -> dict[str, Any]:
    found = {"date": time.strftime("%Y-%m-%d"), "cores": os.cpu_count(), "processor": platform.machine()}
    for package in ("torch", "transformers", "llama-cpp-python"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _written(plan: Plan) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(plan).items()}


def _round(plan: Plan, opened: dict[str, Contestant], number: int) -> dict[str, dict[str, dict[str, float]]]:
    """Figures by contestant and case: each case is asked of all, beginning with another one each round."""
    found: dict[str, dict[str, dict[str, float]]] = {name: {} for name in opened}
    names = list(opened)
    for case in plan.cases:
        prompts = _prompts(case, plan.vocab_size, number)
        for name in _in_turn(names, number):
            print(f"round {number + 1} of {plan.rounds}, {case.name}: {name}", file=sys.stderr, flush=True)
            found[name][case.name] = figures(case, opened[name].write(prompts, case.new))
    return found


def _in_turn(names: list[str], number: int) -> list[str]:
    return names[number % len(names) :] + names[: number % len(names)]


def _prompts(case: Case, vocab_size: int, number: int) -> list[list[int]]:
    """Other ones each round, so that no one remembers them, and the same for all."""
    draw = random.Random(f"{case.name} {number}")
    return [[draw.randrange(vocab_size) for _ in range(case.prompt)] for _ in range(case.clients)]


def figures(case: Case, texts: Texts) -> dict[str, float]:
    """What the moments of the tokens come to.

    ``tokens/s``: written between the moment when every text has its first token and the end; of a case that writes one
    token, prompt tokens read until then. ``all tokens/s``: all that was written over the time from asking to the end.
    """
    times = texts["times"]
    if any(len(moments) != case.new for moments in times):
        raise UserError(f"{case.name}: {case.new} tokens were to be written, and {min(map(len, times))} were")
    first, end = [moments[0] for moments in times], max(moments[-1] for moments in times)
    found = {"first token s": statistics.median(first), "all tokens/s": case.clients * case.new / end}
    if case.new == 1:
        return found | {"tokens/s": case.clients * case.prompt / max(first)}
    after = sum(moment > max(first) for moments in times for moment in moments)
    gaps = [later - sooner for moments in times for sooner, later in itertools.pairwise(moments)]
    return found | {"ms per token": 1e3 * statistics.median(gaps), "tokens/s": after / (end - max(first))}


def spread(values: Iterable[float]) -> list[float]:
    """Median, least and most."""
    found = sorted(values)
    return [statistics.median(found), found[0], found[-1]]


def _summary(facts: dict[str, dict[str, Any]], rounds: list[Any], plan: Plan) -> dict[str, Any]:
    return {
        name: fact
        | {
            "cases": {
                case.name: {
                    figure: spread(one[name][case.name][figure] for one in rounds)
                    for figure in FIGURES
                    if figure in rounds[0][name][case.name]
                }
                for case in plan.cases
            }
        }
        for name, fact in facts.items()
    }


def _read_speed(threads: int) -> float:
    """In a process of its own: the machine's reading speed in GB/s."""
    program = "import torch; from moeforge.cli.speed import read_bandwidth"
    program += f"; torch.set_num_threads({threads}); print(read_bandwidth() / 1e9)"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    return float(done.stdout)


def _gguf(plan: Plan) -> dict[str, Path]:
    """Of each kind of weights a file for llama.cpp."""
    plan.keep.mkdir(parents=True, exist_ok=True)
    files = {weights: plan.keep / f"{plan.path.name}-{BITS[weights]}.gguf" for weights in plan.weights}
    for weights, file in files.items():
        if not file.exists():
            print(f"writing {file}", file=sys.stderr, flush=True)
            _write_gguf(plan, weights, file)
    return files


def _write_gguf(plan: Plan, weights: str, file: Path) -> None:
    """By our exporter, and from bf16 by llama.cpp's own quantiser."""
    source = file if weights in FLOATS else file.with_name(f"{plan.path.name}-{BITS['bf16']}.gguf")
    if not source.exists():
        dtype = "fp32" if weights == "float32" else "bf16"
        command = ["-m", "moeforge", "convert", str(plan.path), str(source), "--dtype", dtype]
        _run(command)
    if weights not in FLOATS:
        module = f"moeforge.cli.contestants.{MODULES[LLAMA]}"
        call = f"from {module} import quantise; quantise({str(source)!r}, {str(file)!r}, {weights[3:]}, {plan.threads})"
        _run(["-c", call])


def _run(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(done.stderr.strip().splitlines()[-1].removeprefix("error: "))
