"""The two orders in which a rotary head's rows are kept: pairs side by side (Meta, GGUF), or in two halves (here)."""

from torch import Tensor


def halved(rows: Tensor, num_heads: int) -> Tensor:
    """[num_heads * head_dim, ...] from pairs (2i, 2i + 1) to pairs (i, i + head_dim / 2)."""
    return rows.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def paired(rows: Tensor, num_heads: int) -> Tensor:
    """What ``halved`` undoes."""
    return rows.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).flatten(0, 2)
