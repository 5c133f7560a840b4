"""What Linux can be asked about memory: to keep what is freed, and to lay out weights in huge pages."""

import ctypes
import math
import mmap
import sys

import torch
from torch import Tensor

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
HUGE = 2 << 20
"""Bytes of a huge page."""


def keep_freed_memory() -> bool:
    """Tells glibc to reuse large blocks instead of returning each to the kernel; True where that worked.

    Most of the cost of large short-lived tensors is page faults.
    Only our own programs call it (train, demo, benchmarks), never an import: it changes the whole process.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 64 << 20))
    return all([mallopt(name, value) == 1 for name, value in settings])


def return_freed_memory() -> None:
    """Gives what is free, and what small blocks in use have kept from being returned so far, back to the system."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def blank(like: Tensor, *shape: int) -> Tensor:
    """Zeros of the type of ``like``, where that is; on a CPU they take memory, and time, when they are written to."""
    size = math.prod(shape) * like.element_size()
    if like.device.type != "cpu" or not size:
        return like.new_zeros(shape)
    memory = torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)
    return ask_for_huge_pages(memory).view(like.dtype).view(shape)


def ask_for_huge_pages(fresh: Tensor) -> Tensor:
    """The tensor, its memory to come in huge pages where the system grants them; ask before anything is written to it.

    Weights that are read once per token touch more ordinary pages than a processor keeps the addresses of: from huge
    ones they are read faster, and filling them takes a page fault per 2 MiB.
    """
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is not None and fresh.device.type == "cpu" and fresh.nbytes >= HUGE:
        start = -(-fresh.data_ptr() // HUGE) * HUGE
        size = (fresh.data_ptr() + fresh.nbytes - start) // HUGE * HUGE
        if size > 0:  # a refusal changes nothing
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), advice)
    return fresh
