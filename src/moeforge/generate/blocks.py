"""Blocks of keys and values: which are free, which belong to whom, and which hold the start of a text that may come
again."""

from collections import OrderedDict
from collections.abc import Sequence

Key = tuple[int | str, tuple[int, ...]]
"""The name of the block before, or of a first one the owner, and this block's tokens: exact, so that no text is taken
for another, and nobody learns from what was reused what others have asked."""


class Pool:
    """Counts who uses each block. A full block keeps its content when nobody does, until the memory is needed."""

    def __init__(self, blocks: int, block_size: int, reuse: bool = True) -> None:
        self.total, self.block_size, self.reuse = blocks, block_size, reuse
        self._free = list(range(blocks - 1, -1, -1))
        self._users = [0] * blocks
        self._known: dict[Key, int] = {}
        self._key: dict[int, Key] = {}
        self._name: dict[int, int] = {}  # of what a block holds with all before it; twins have the same
        self._names = 0
        self._idle: OrderedDict[int, None] = OrderedDict()  # known blocks that nobody uses, oldest first

    @property
    def cached(self) -> int:
        """Blocks that nobody uses and that still hold something."""
        return len(self._idle)

    @property
    def used(self) -> int:
        """Blocks that somebody uses."""
        return self.total - len(self._free) - len(self._idle)

    @property
    def free(self) -> int:
        """Blocks that can be taken."""
        return len(self._free) + len(self._idle)

    def match(self, tokens: Sequence[int], owner: str = "", blocks: Sequence[int] = ()) -> list[int]:
        """Takes the blocks that hold the start of ``tokens`` already, after its first ``blocks``, which are full.

        Never all: the last token has to be read.
        """
        found: list[int] = []
        name = self._name.get(blocks[-1]) if blocks else owner
        for start in range(len(blocks) * self.block_size, len(tokens) - self.block_size, self.block_size):
            block = None if name is None else self._known.get((name, tuple(tokens[start : start + self.block_size])))
            if block is None:
                break
            found.append(block)
            name = self._name[block]
        for block in found:
            self._users[block] += 1
            self._idle.pop(block, None)
        return found

    def take(self) -> int | None:
        """A block to write into, or None: all are in use. What nobody uses for longest is forgotten first."""
        if self._free:
            block = self._free.pop()
        elif self._idle:
            block, _ = self._idle.popitem(last=False)
            self._forget(block)
        else:
            return None
        self._users[block] = 1
        return block

    def fill(self, blocks: Sequence[int], tokens: Sequence[int], done: int, now: int, owner: str = "") -> None:
        """Remembers which tokens the blocks of a text hold that became full between ``done`` and ``now`` tokens."""
        if not self.reuse:
            return
        size = self.block_size
        for index in range(done // size, now // size):
            block, before = blocks[index], self._name[blocks[index - 1]] if index else owner
            key = before, tuple(tokens[index * size : (index + 1) * size])
            twin = self._known.get(key)
            if twin is None:
                self._known[key], self._key[block] = block, key
                self._name[block], self._names = self._names, self._names + 1
            else:
                self._name[block] = self._name[twin]

    def give_back(self, blocks: Sequence[int]) -> None:
        """One user less of each; the end of a text is forgotten before its start."""
        for block in reversed(blocks):
            self._users[block] -= 1
            if self._users[block]:
                continue
            if block in self._key:
                self._idle[block] = None
            else:
                self._name.pop(block, None)
                self._free.append(block)

    def _forget(self, block: int) -> None:
        self._name.pop(block)
        self._known.pop(self._key.pop(block))
