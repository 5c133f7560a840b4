"""In how many chunks rows are exchanged: as given, or what proved fastest in the first steps (arXiv:2501.10714)."""

import time
from statistics import median

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

CANDIDATES = (1, 2, 4)
"""More chunks hide more of the exchange, and make more, smaller messages and matrix products."""
TRIES = 5
"""Steps with each; the first warms up and is not counted."""


class Chunks:
    """``now`` is read by every exchange; it must be the same on all processes, and so it is."""

    def __init__(self, given: int) -> None:
        """0: each of ``CANDIDATES`` is tried in turn; the one stays whose steps the slowest process finished first."""
        self.now = given or CANDIDATES[0]
        self.seconds: dict[int, list[float]] = {} if given else {number: [] for number in CANDIDATES}
        """Of the steps with each number, until one is chosen."""

    def begin(self) -> None:
        """A step."""
        self.started = time.perf_counter()

    def end(self, group: ProcessGroup, device: str) -> None:
        """The step is done. Collective when all have been tried; what this sends is not counted."""
        if not self.seconds:
            return
        self.seconds[self.now].append(time.perf_counter() - self.started)
        trying = [number for number, times in self.seconds.items() if len(times) < TRIES]
        if trying:
            self.now = trying[0]
            return
        slowest = torch.tensor([median(times[1:]) for times in self.seconds.values()], device=device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX, group=group)
        self.now = CANDIDATES[int(slowest.argmin())]
        self.seconds = {}
