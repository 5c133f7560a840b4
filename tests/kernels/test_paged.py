"""Attention over blocks: the native passes against the loop, and rows that do not know each other."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moeforge.kernels.native import engine
from moeforge.kernels.paged import Rows, attend_blocks, attend_in_turn, store

pytestmark = pytest.mark.skipif(engine.missing() is not None, reason="needs the native engine")

CASES = {
    "each query its own key": {"queries": 4, "heads": 4, "width": 16, "value_width": 16},
    "queries share keys": {"queries": 6, "heads": 2, "width": 33, "value_width": 17},
    "one key for all": {"queries": 64, "heads": 1, "width": 24, "value_width": 24},
    "a window": {"queries": 4, "heads": 2, "width": 8, "value_width": 12, "window": 5},
    "a window and sinks": {"queries": 4, "heads": 2, "width": 8, "value_width": 8, "window": 20, "sinks": True},
    "sinks": {"queries": 6, "heads": 3, "width": 16, "value_width": 16, "sinks": True},
    "keys are values": {"queries": 4, "heads": 1, "width": 40, "value_width": 40, "shared": True},
}
LENGTHS, NEWS = (1, 37, 100, 7, 64), (1, 30, 3, 7, 1)
"""Of each text, and how many of its last tokens are in the pass."""


class Case:
    """Queries, pools and rows of five texts whose blocks lie anywhere."""

    def __init__(self, dtype: torch.dtype, block_size: int = 16, seed: int = 0, **options: object) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.options = {"window": options.get("window"), "scale": 0.3, "sinks_Q": None}
        queries, heads, width, value_width = (int(str(options[n])) for n in "queries heads width value_width".split())
        needed = [-(-length // block_size) for length in LENGTHS]
        order = torch.randperm(sum(needed) + 3, generator=draw).tolist()
        table = [[order.pop() for _ in range(count)] + [0] * (max(needed) - count) for count in needed]
        shape = (len(order) + sum(needed), heads, block_size)
        self.keys = torch.randn(*shape, width, generator=draw).to(dtype)
        self.values = self.keys if options.get("shared") else torch.randn(*shape, value_width, generator=draw).to(dtype)
        text = torch.cat([torch.full((count,), index) for index, count in enumerate(NEWS)])
        position = torch.cat([torch.arange(end - count, end) for end, count in zip(LENGTHS, NEWS, strict=True)])
        tables = torch.tensor(table)
        slot = tables[text, position // block_size] * block_size + position % block_size
        self.rows = Rows(text.int(), position, tables.int(), slot)
        self.queries = torch.randn(len(text), queries, width, generator=draw).to(dtype)
        if options.get("sinks"):
            self.options["sinks_Q"] = torch.randn(queries, generator=draw)

    def native(self, some: Tensor | slice = slice(None)) -> Tensor:
        rows = Rows(self.rows.text[some], self.rows.position[some], self.rows.table, self.rows.slot[some])
        return attend_blocks(self.queries[some], self.keys, self.values, rows, **self.options)


@pytest.mark.parametrize("dtype", engine.TYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_the_native_pass_is_the_loop(case: str, dtype: torch.dtype) -> None:
    made = Case(dtype, **CASES[case])
    wanted = attend_in_turn(made.queries, made.keys, made.values, made.rows, **made.options)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(made.native(), wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", engine.TYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_a_rows_bits_are_its_own(case: str, dtype: torch.dtype) -> None:
    made = Case(dtype, **CASES[case])
    together = made.native()
    for row in range(len(together)):
        assert torch.equal(made.native(slice(row, row + 1))[0], together[row])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(made.native(), together)
    finally:
        torch.set_num_threads(before)


@given(block_size=st.sampled_from([16, 32, 48]), case=st.sampled_from(sorted(CASES)))
def test_nor_do_they_depend_on_where_blocks_lie(block_size: int, case: str) -> None:
    one, other = Case(torch.float32, **CASES[case]), Case(torch.float32, block_size, seed=1, **CASES[case])
    other.queries, other.options = one.queries, one.options
    for mine, theirs in ((one.keys, other.keys), (one.values, other.values)):
        for text, length in enumerate(LENGTHS):
            for place in range(length):
                from_block, to_block = one.rows.table[text, place // 16], other.rows.table[text, place // block_size]
                theirs[to_block, :, place % block_size] = mine[from_block, :, place % 16]
    assert torch.equal(one.native(), other.native())


def test_what_was_never_written_is_never_read() -> None:
    """A block holds what another text left there: even where that is no number."""
    made = Case(torch.float32, **CASES["queries share keys"])
    wanted = made.native()
    for text, length in enumerate(LENGTHS):
        for place in range(length, -(-length // 16) * 16):
            made.keys[made.rows.table[text, place // 16], :, place % 16] = torch.nan
            made.values[made.rows.table[text, place // 16], :, place % 16] = torch.nan
    assert torch.equal(made.native(), wanted)


def test_rows_are_stored_where_they_belong() -> None:
    made = Case(torch.float32, **CASES["sinks"])
    new = torch.randn(len(made.rows.text), 3, 16)
    store(made.keys, made.rows, new)
    for row, (text, place) in enumerate(zip(made.rows.text, made.rows.position, strict=True)):
        assert torch.equal(made.keys[made.rows.table[text, place // 16], :, place % 16], new[row])


def test_no_rows() -> None:
    made = Case(torch.float32, **CASES["sinks"])
    assert made.native(slice(0, 0)).shape == (0, 6, 16)
