"""How fast a machine could write at best: to make a token it must read every weight that the token uses."""

import os
import time
from typing import Any

from moeforge.cli.amounts import in_bytes, short

SIZE = 256 << 20
"""Bytes that are summed up: well beyond what caches hold."""


CACHED = 32 << 20
"""Bytes that may stay in a cache from one token to the next."""


def read_bandwidth() -> float:
    """Bytes per second that torch's threads read from memory: the best of five sums over ``SIZE``, a fraction of a
    second."""
    import torch

    values, best = torch.ones(SIZE // 4), float("inf")
    for _ in range(5):
        start = time.perf_counter()
        values.sum()
        best = min(best, time.perf_counter() - start)
    return SIZE / best


def show_speed(tree: dict[str, Any]) -> None:
    """Prints the most tokens per second of one document on this machine, or that its memory is too small."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if tree["weight_bytes"] > memory:
        print(f"decoding         not on this machine: its memory is {in_bytes(memory)}")
        return
    read = tree["read_bytes"]
    if read < CACHED:
        print(f"decoding         {in_bytes(read)} of weights per token: so few that memory does not bound it")
        return
    bandwidth = read_bandwidth()
    speed = f"at most {short(bandwidth / read)} tokens/s on this machine"
    print(f"decoding         {speed}: {in_bytes(read)} of weights each, {in_bytes(bandwidth)}/s measured")
