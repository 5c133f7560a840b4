"""Processes that stay up for a whole test session and run one function after another, all at once, on every rank."""

import multiprocessing
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

IMPORTED = ["torch.distributed.fsdp", "torch.distributed.checkpoint", "moeforge.parallel.together", "moeforge.train"]
"""Once for all ranks, which takes seconds."""


class Processes:
    """``size`` ranks of one gloo group on this machine."""

    def __init__(self, size: int, store: Path) -> None:
        self.size = size
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTED)
        self.ends, self.processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, str(store), theirs), daemon=True)
            process.start()
            self.ends.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """``function(*arguments)`` on every rank, with the random seed that tests have; what each returned, by rank."""
        for end in self.ends:
            end.send((function, arguments))
        answers = [end.recv() for end in self.ends]
        failed = [f"rank {rank}: {answer}" for rank, (well, answer) in enumerate(answers) if not well]
        assert not failed, "\n".join(failed)
        return [answer for _, answer in answers]

    def close(self) -> None:
        """Ends them."""
        for end in self.ends:
            end.send(None)
        for process in self.processes:
            process.join()


def _serve(rank: int, size: int, store: str, end: Connection) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    import torch.distributed as dist

    from moeforge.parallel.mesh import Mesh

    torch.set_num_threads(1)
    Mesh.build = cache(Mesh.build)  # type: ignore[method-assign]  # the threads of a new one's groups would never end
    patience = timedelta(seconds=20)  # for the others, when a test fails on one rank
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=patience)
    while (call := end.recv()) is not None:
        function, arguments = call
        torch.manual_seed(0)
        try:
            end.send((True, function(*arguments)))
        except BaseException:
            end.send((False, traceback.format_exc()))
    os._exit(0)  # nothing to take down in order; the interpreter's own end takes seconds


def start(*arguments: object) -> subprocess.Popen[str]:
    """A program of its own, ``python -m ...``."""
    command = [sys.executable, "-m", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def children(pid: int) -> dict[int, int]:
    """Process ids by rank."""
    found = {}
    for line in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        environment = dict(part.partition("=")[::2] for part in Path(f"/proc/{line}/environ").read_text().split("\0"))
        if "RANK" in environment:
            found[int(environment["RANK"])] = int(line)
    return found


def until(condition: Callable[[], object], process: subprocess.Popen[str], seconds: float = 90) -> None:
    """Waits for something that the process does."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, process.communicate(timeout=30)
        time.sleep(0.05)
