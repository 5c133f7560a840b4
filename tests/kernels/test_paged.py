"""Attention over blocks: against the plain loop and torch's own, and that a row's bits are its text's alone."""

from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from moeforge.kernels.native import engine
from moeforge.kernels.paged import Rows, attend_blocks, attend_in_turn, store

TYPES = [torch.float32, torch.bfloat16]
CLOSE = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (0.016, 0.016)}
"""bf16: the native product takes pairs of bf16, the loop float32; both round once at the end."""
BLOCK = 16


class Text(NamedTuple):
    """All of one text [S, heads, width]: a query, a key and a value at every position."""

    queries: Tensor
    keys: Tensor
    values: Tensor

    @classmethod
    def of(cls, length: int, queries: int, heads: int, width: int, value_width: int, dtype: torch.dtype) -> "Text":
        shapes = (queries, width), (heads, width), (heads, value_width)
        return cls(*(torch.randn(length, *shape).to(dtype) for shape in shapes))


def laid(texts: list[Text], cuts: list[tuple[int, int]], size: int = BLOCK) -> tuple[Tensor, Tensor, Tensor, Rows]:
    """Texts in blocks that lie anywhere, and the queries of rows start to end of each."""
    first = texts[0]
    needed = [-(-end // size) for _, end in cuts]
    order = torch.randperm(sum(needed) + 3).tolist()
    table = torch.full((len(texts), max(needed)), 10**6, dtype=torch.int32)  # what is never read may be anything
    keys, values = (
        torch.full((len(order), t.shape[1], size, t.shape[2]), torch.nan).to(t.dtype)
        for t in (first.keys, first.values)
    )
    text, position, slot, queries = [], [], [], []
    for index, (one, (start, end)) in enumerate(zip(texts, cuts, strict=True)):
        table[index, : needed[index]] = torch.tensor([order.pop() for _ in range(needed[index])])
        places = torch.arange(end)
        slots = table[index, places // size].long() * size + places % size
        whole = Rows(torch.full((end,), index).int(), places, table, slots)
        store(keys, whole, one.keys[:end]), store(values, whole, one.values[:end])
        text.append(whole.text[start:]), position.append(places[start:]), slot.append(slots[start:])
        queries.append(one.queries[start:end])
    return torch.cat(queries), keys, values, Rows(torch.cat(text), torch.cat(position), table, torch.cat(slot))


def alone(text: Text, position: int, window: int | None, sinks: Tensor | None) -> Tensor:
    """One row, by itself."""
    queries, keys, values, rows = laid([text], [(position, position + 1)])
    return attend_blocks(queries, keys, values, rows, 0.3, window, sinks)[0]


@pytest.mark.parametrize("dtype", TYPES)
@given(data=st.data())
def test_it_is_the_plain_loop(dtype: torch.dtype, data: st.DataObject) -> None:
    heads, group = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 2, 7]))
    width, value_width = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 70))
    ends = data.draw(st.lists(st.integers(1, 80), min_size=1, max_size=3))
    cuts = [(data.draw(st.integers(0, end - 1)), end) for end in ends]
    window = data.draw(st.none() | st.integers(1, 90))
    sinks = torch.randn(heads * group) if data.draw(st.booleans()) else None
    texts = [Text.of(end, heads * group, heads, width, value_width, dtype) for end in ends]
    arguments = (*laid(texts, cuts, data.draw(st.sampled_from([1, 5, 16, 48]))), width**-0.5, window, sinks)
    exact, found = attend_in_turn(*arguments), attend_blocks(*arguments)
    assert found.shape == exact.shape and found.dtype == dtype
    rtol, atol = CLOSE[dtype]
    torch.testing.assert_close(found.float(), exact.float(), rtol=rtol, atol=atol)


@pytest.mark.parametrize("attend", [attend_blocks, attend_in_turn])
@pytest.mark.parametrize("window", [None, 9])
def test_it_is_what_torch_computes_of_a_whole_text(attend: object, window: int | None) -> None:
    text = Text.of(70, 6, 2, 24, 24, torch.float32)
    found = attend(*laid([text], [(0, 70)]), 0.2, window)  # type: ignore[operator]
    mask = torch.ones(70, 70, dtype=torch.bool).tril()
    mask = mask if window is None else mask.triu(1 - window)
    parts = (part.transpose(0, 1)[None] for part in text)
    exact = F.scaled_dot_product_attention(*parts, mask, scale=0.2, enable_gqa=True)[0].transpose(0, 1)
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", TYPES)
@given(data=st.data())
def test_a_row_is_the_same_alone_and_in_any_company(dtype: torch.dtype, data: st.DataObject) -> None:
    heads, group, width = data.draw(st.sampled_from([(1, 1, 16), (2, 3, 40), (1, 8, 7), (4, 1, 64)]))
    window = data.draw(st.sampled_from([None, None, 1, 17, 33]))
    sinks = torch.randn(heads * group) if data.draw(st.booleans()) else None
    ends = data.draw(st.lists(st.integers(1, 150), min_size=1, max_size=4))
    texts = [Text.of(end, heads * group, heads, width, width, dtype) for end in ends]
    whole = attend_blocks(*laid(texts, [(0, end) for end in ends]), 0.3, window, sinks).split(ends)
    for text, end, rows in zip(texts, ends, whole, strict=True):
        for position in [*data.draw(st.lists(st.integers(0, end - 1), max_size=3)), end - 1]:
            assert torch.equal(alone(text, position, window, sinks), rows[position])


@pytest.mark.parametrize("dtype", TYPES)
def test_nor_does_it_matter_how_a_prompt_is_cut(dtype: torch.dtype) -> None:
    text = Text.of(200, 4, 2, 32, 32, dtype)
    whole = attend_blocks(*laid([text], [(0, 200)]), 0.3)
    for cuts in ([0, 7, 8, 100, 200], [0, 64, 128, 192, 200], [0, 199, 200]):
        parts = [attend_blocks(*laid([text], [cut]), 0.3) for cut in pairwise(cuts)]
        assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("size", [32, 48])
def test_nor_how_large_the_blocks_are(size: int) -> None:
    text = Text.of(150, 4, 2, 32, 32, torch.bfloat16)
    small, large = (attend_blocks(*laid([text], [(0, 150)], blocks), 0.3) for blocks in (16, size))
    assert torch.equal(small, large)


@pytest.mark.parametrize("threads", [2, 3])
def test_nor_how_many_threads_there_are(threads: int) -> None:
    torch.manual_seed(1)
    texts = [Text.of(90, 4, 2, 32, 32, torch.bfloat16) for _ in range(5)]
    arguments = (*laid(texts, [(0, 90), (80, 90), (89, 90), (1, 2), (5, 60)]), 0.3)
    one, before = attend_blocks(*arguments), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(attend_blocks(*arguments), one)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", TYPES)
def test_keys_may_be_the_values_too(dtype: torch.dtype) -> None:
    """As latent attention has it: the first part of a row is what is summed up, its last only a key."""
    text = Text.of(40, 3, 1, 40, 40, dtype)
    queries, rows, _, where = laid([text], [(20, 40)])
    exact = attend_in_turn(queries, rows, rows, where, 0.3)
    rtol, atol = CLOSE[dtype]
    for values in (rows, rows[..., :32]):
        found = attend_blocks(queries, rows, values, where, 0.3)
        torch.testing.assert_close(found, exact[..., : values.shape[3]], rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", TYPES)
def test_large_and_missing_scores(dtype: torch.dtype) -> None:
    text = Text.of(50, 2, 2, 16, 16, dtype)
    for scale in (1e4, -1e4, 0.0):
        arguments = (*laid([text], [(0, 50)]), scale)
        found = attend_blocks(*arguments)
        assert bool(found.isfinite().all())
        torch.testing.assert_close(found, attend_in_turn(*arguments), rtol=0.02, atol=0.02)
    sinks = torch.tensor([-torch.inf, 1e6])
    found = attend_blocks(*laid([text], [(0, 50)]), 0.3, None, sinks)
    plain = attend_blocks(*laid([text], [(0, 50)]), 0.3)
    assert torch.equal(found[:, 0], plain[:, 0]) and not found[:, 1].any()


def test_rows_are_stored_where_they_belong() -> None:
    text = Text.of(37, 4, 2, 8, 12, torch.float32)
    _, keys, values, rows = laid([text], [(0, 37)])
    for place in range(37):
        block = rows.table[0, place // BLOCK]
        assert torch.equal(keys[block, :, place % BLOCK], text.keys[place])
        assert torch.equal(values[block, :, place % BLOCK], text.values[place])


def test_what_is_no_number_stays_in_its_row() -> None:
    text = Text.of(40, 2, 1, 16, 16, torch.float32)
    text.queries[35] = torch.nan
    found = attend_blocks(*laid([text], [(30, 40)]), 0.3)
    assert found.isnan().all(-1).all(-1).tolist() == [row == 5 for row in range(10)]


@pytest.mark.parametrize("attend", [attend_blocks, attend_in_turn])
def test_no_rows(attend: object) -> None:
    queries, keys, values, rows = laid([Text.of(4, 2, 2, 8, 12, torch.float32)], [(3, 4)])
    nothing = replace(rows, text=rows.text[:0], position=rows.position[:0], slot=rows.slot[:0])
    assert attend(queries[:0], keys, values, nothing, 0.3).shape == (0, 2, 12)  # type: ignore[operator]


def test_without_the_native_engine_the_loop_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (*laid([Text.of(20, 2, 1, 8, 8, torch.float32)], [(3, 20)]), 0.3)
    monkeypatch.setattr(engine, "why_not", lambda *_: "no compiler")
    assert torch.equal(attend_blocks(*arguments), attend_in_turn(*arguments))


def test_other_types_go_through_the_loop_with_the_same_bits_alone() -> None:
    text = Text.of(40, 2, 1, 8, 8, torch.float64)
    whole = attend_blocks(*laid([text], [(0, 40)]), 0.3)
    assert all(torch.equal(alone(text, position, None, None), whole[position]) for position in (0, 17, 39))
