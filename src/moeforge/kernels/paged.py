"""Attention over a pool of blocks: the keys and values of many texts, each in blocks of its own wherever they lie."""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from moeforge.kernels.native import engine
from moeforge.kernels.native.decoder import Paged


@dataclass(frozen=True)
class Rows:
    """The rows of one pass: which text each is of, where it stands there, and where what it leaves behind is stored.

    Rows of one text stand together, in order.
    """

    text: Tensor
    """[T] int32: row of ``table``."""
    position: Tensor
    """[T] int64: it sees the positions 0 to this one of its text, itself included."""
    table: Tensor
    """[R, B] int32: the blocks of each text in order; what lies beyond a text's last block is never read."""
    slot: Tensor
    """[T] int64: block * block size + place in the block."""


def store(pool: Tensor, rows: Rows, new_THW: Tensor) -> None:
    """Writes [T, heads, width] into a pool [blocks, heads, block size, width], in the pool's type."""
    size = pool.shape[2]
    pool[rows.slot // size, :, rows.slot % size] = new_THW.to(pool.dtype)


def attend_blocks(
    queries_TQW: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: Rows,
    scale: float,
    window: int | None = None,
    sinks_Q: Tensor | None = None,
) -> Tensor:
    """[T, Q, V] in the queries' type: each row attends to its own text, computed in float32.

    Queries [T, Q, W]; pools of keys [blocks, H, block size, W] and values [.., V] may be the same memory; queries
    that share a key head stand side by side. With a ``window`` a row sees so many positions, itself included.
    ``sinks_Q`` are logits of one more key, whose value is zero. A row's bits depend on its own text alone: not on the
    other rows, on where blocks lie, or on how many rows of its text come in one pass.
    """
    if queries_TQW.dtype == keys.dtype and keys.dtype in engine.TYPES and engine.why_not(keys, keys, keys) is None:
        return _native(queries_TQW, keys, values, rows, scale, window, sinks_Q)
    return attend_in_turn(queries_TQW, keys, values, rows, scale, window, sinks_Q)


def _native(
    queries_TQW: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: Rows,
    scale: float,
    window: int | None,
    sinks_Q: Tensor | None,
) -> Tensor:
    lib = engine.open_library()
    num_rows, num_queries, width = queries_TQW.shape
    queries, sinks = queries_TQW.contiguous(), None if sinks_Q is None else sinks_Q.float().contiguous()
    out = queries.new_empty(num_rows, num_queries, values.shape[3])
    paged = Paged(scale=scale, rows=num_rows, queries=num_queries, heads=keys.shape[1], width=width)
    paged.queries_in, paged.keys, paged.values = queries.data_ptr(), keys.data_ptr(), values.data_ptr()
    paged.sinks = None if sinks is None else sinks.data_ptr()
    paged.text, paged.table, paged.position = (t.data_ptr() for t in (rows.text, rows.table, rows.position))
    paged.value_width, paged.key_stride, paged.value_stride = values.shape[3], keys.stride(2), values.stride(2)
    paged.block_size, paged.table_width, paged.threads = keys.shape[2], rows.table.shape[1], torch.get_num_threads()
    paged.window = window or 0
    engine.check(lib.moeforge_attend(ctypes.byref(paged), int(keys.dtype == torch.bfloat16), engine.address(out)))
    return out


def attend_in_turn(
    queries_TQW: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: Rows,
    scale: float,
    window: int | None = None,
    sinks_Q: Tensor | None = None,
) -> Tensor:
    """``attend_blocks``, row by row: what it is tested against."""
    out = []
    for row, (text, position) in enumerate(zip(rows.text.tolist(), rows.position.tolist(), strict=True)):
        first = 0 if window is None else max(0, position + 1 - window)
        places = torch.arange(first, position + 1)
        block, inside = rows.table[text, places // keys.shape[2]].long(), places % keys.shape[2]
        seen_SHW, seen_SHV = keys[block, :, inside].float(), values[block, :, inside].float()
        asked_HGW = queries_TQW[row].float().unflatten(0, (keys.shape[1], -1))
        logits_HGS = (asked_HGW[:, :, None] * seen_SHW.transpose(0, 1)[:, None]).sum(-1) * scale
        if sinks_Q is not None:
            logits_HGS = torch.cat((logits_HGS, sinks_Q.float().unflatten(0, logits_HGS.shape[:2])[..., None]), -1)
        shares_HGS = logits_HGS.softmax(-1)[..., : len(places)]
        out.append((shares_HGS[..., None] * seen_SHV.transpose(0, 1)[:, None]).sum(2).flatten(0, 1))
    if not out:
        return queries_TQW.new_empty(0, queries_TQW.shape[1], values.shape[3])
    return torch.stack(out).to(queries_TQW.dtype)
