"""What the system is asked about memory."""

import sys
from pathlib import Path

import pytest
import torch

from moeforge.kernels.allocator import HUGE, ask_for_huge_pages, blank

GRANTED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def huge_kib(tensor: torch.Tensor) -> int:
    """KiB in huge pages of the mapping that holds the middle of ``tensor``."""
    middle, inside = tensor.data_ptr() + tensor.nbytes // 2, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        span = line.split()[0]
        if "-" in span:
            low, high = (int(end, 16) for end in span.split("-"))
            inside = low <= middle < high
        elif inside and span == "AnonHugePages:":
            return int(line.split()[1])
    return 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="madvise is Linux's")
@pytest.mark.skipif(not GRANTED.exists() or "[never]" in GRANTED.read_text(), reason="this system grants none")
def test_large_tensors_come_in_huge_pages() -> None:
    tensor = ask_for_huge_pages(torch.empty(16 * HUGE, dtype=torch.uint8)).fill_(7)
    assert huge_kib(tensor) >= HUGE >> 10 and int(tensor.float().mean()) == 7


@pytest.mark.parametrize("tensor", [torch.zeros(3), torch.zeros(0), torch.empty(HUGE, device="meta")])
def test_what_is_small_or_elsewhere_is_left_alone(tensor: torch.Tensor) -> None:
    assert ask_for_huge_pages(tensor) is tensor


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")
def test_blank_memory_is_zero_and_comes_when_it_is_written_to() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = resident()
    pool = blank(torch.empty(0, dtype=torch.bfloat16), 64, HUGE // 2)
    assert pool.shape == (64, HUGE // 2) and pool.dtype == torch.bfloat16 and resident() - before < 8 * HUGE
    pool[3] = 1
    assert float(pool[2:5].sum()) == HUGE // 2 and resident() - before < 16 * HUGE
    assert blank(torch.empty(3), 0, 4).shape == (0, 4) and blank(torch.empty(1, device="meta"), 2).device.type == "meta"
