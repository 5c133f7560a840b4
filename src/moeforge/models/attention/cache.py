"""What attention keeps of the tokens before, so that each is computed once: of a batch that grows in step, or of many
texts, in blocks."""

import torch
from torch import Tensor
from torch.nn import functional as F

from moeforge.kernels.allocator import blank
from moeforge.kernels.paged import Rows, attend_blocks, store


class LayerCache:
    """Tensors of one layer, [B, heads, room, width] each, filled from the left; ``room`` doubles up to ``max_len``.

    With a ``window`` only what a later token can still see is kept, [B, heads, window - 1, width] at most.
    """

    def __init__(
        self, batch_size: int, max_len: int, shapes: tuple[tuple[int, int], ...], like: Tensor, window: int | None
    ) -> None:
        """``shapes`` are (heads, width) of each tensor, as ``attention.cached`` says them."""
        self.kept = None if window is None or window > max_len else window - 1
        self.max_len, self.length = max_len, 0
        self.tensors = [like.new_zeros(batch_size, heads, 0, width) for heads, width in shapes]

    def append(self, *news: Tensor) -> list[Tensor]:
        """Stores [B, heads, L, width] each, and returns what these tokens may look at, themselves last."""
        end = self.length + news[0].shape[2]
        if self.kept is None:
            self._make_room(end)
            for tensor, new in zip(self.tensors, news, strict=True):
                tensor[:, :, self.length : end] = new
            seen = [tensor[:, :, :end] for tensor in self.tensors]
        else:
            seen = [torch.cat((tensor, new), 2) for tensor, new in zip(self.tensors, news, strict=True)]
            self.tensors = [tensor[:, :, max(0, tensor.shape[2] - self.kept) :].clone() for tensor in seen]
        self.length = end
        return seen

    def _make_room(self, end: int) -> None:
        """In tensors of its own, so that who holds the ones before can go back to them."""
        room = self.tensors[0].shape[2]
        if room < end:
            more = min(max(end, 2 * room), self.max_len) - room
            self.tensors = [F.pad(tensor, (0, 0, 0, more)) for tensor in self.tensors]


class BlockLayer:
    """The same for the rows of many texts in one pass, [1, heads, T, width]: pools of blocks, which texts share out.

    A pool is [blocks, heads, block size, width]. ``rows`` of the pass are set before it.
    """

    def __init__(
        self, blocks: int, block_size: int, shapes: tuple[tuple[int, int], ...], like: Tensor, window: int | None
    ) -> None:
        self.pools = [blank(like, blocks, heads, block_size, width) for heads, width in shapes]
        self.window = window
        self.rows: Rows | None = None

    def attend(self, queries: Tensor, news: tuple[Tensor, ...], scale: float | None, sinks: Tensor | None) -> Tensor:
        """Stores ``news``, keys and values or one tensor for both, and attends; the rows say who sees whom."""
        assert self.rows is not None
        for pool, new in zip(self.pools, news, strict=True):
            store(pool, self.rows, new[0].transpose(0, 1))
        scale = queries.shape[3] ** -0.5 if scale is None else scale
        asked_TQW = queries[0].transpose(0, 1)
        mixed = attend_blocks(asked_TQW, self.pools[0], self.pools[-1], self.rows, scale, self.window, sinks)
        return mixed.transpose(0, 1)[None]
