"""Attention over a pool of blocks: the keys and values of many texts, each in blocks of its own wherever they lie."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """The rows of one pass: which text each is of, where it stands there, and where what it leaves behind is stored."""

    text: Tensor
    """[T] int32: row of ``table``."""
    position: Tensor
    """[T] int64: it sees the positions 0 to this one of its text, itself included."""
    table: Tensor
    """[R, B] int32: the blocks of each text in order; what lies beyond a text's last block is never read."""
    slot: Tensor
    """[T] int64: block * block size + place in the block."""


def store(pool: Tensor, rows: Rows, new_THW: Tensor) -> None:
    """Writes [T, heads, width] into a pool [blocks, block size, heads, width], in the pool's type."""
    pool.flatten(0, 1)[rows.slot] = new_THW.to(pool.dtype)


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

    Queries [T, Q, W]; pools of keys [blocks, block size, H, W] and values [.., H, V] may be the same memory; queries
    that share a key head stand side by side. With a ``window`` a row sees so many positions, itself included.
    ``sinks_Q`` are logits of one more key, whose value is zero. A row's bits depend on its own text alone: not on the
    other rows, on where blocks lie, or on how many rows of its text come in one pass.
    """
    out = []
    for row, (text, position) in enumerate(zip(rows.text.tolist(), rows.position.tolist(), strict=True)):
        first = 0 if window is None else max(0, position + 1 - window)
        places = torch.arange(first, position + 1)
        block, inside = rows.table[text, places // keys.shape[1]].long(), places % keys.shape[1]
        seen_SHW, seen_SHV = keys[block, inside].float(), values[block, inside].float()
        asked_HGW = queries_TQW[row].float().unflatten(0, (keys.shape[2], -1))
        logits_HGS = (asked_HGW[:, :, None] * seen_SHW.transpose(0, 1)[:, None]).sum(-1) * scale
        if sinks_Q is not None:
            logits_HGS = torch.cat((logits_HGS, sinks_Q.float().unflatten(0, logits_HGS.shape[:2])[..., None]), -1)
        shares_HGS = logits_HGS.softmax(-1)[..., : len(places)]
        out.append((shares_HGS[..., None] * seen_SHV.transpose(0, 1)[:, None]).sum(2).flatten(0, 1))
    if not out:
        return queries_TQW.new_empty(0, queries_TQW.shape[1], values.shape[3])
    return torch.stack(out).to(queries_TQW.dtype)
