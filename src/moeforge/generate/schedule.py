"""Who is in the next pass, with how many tokens, and who has to make room."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter

from moeforge.generate.blocks import Pool
from moeforge.generate.request import Request


@dataclass(eq=False)
class Text:
    """One request's text on its way: what of it is read, and where its keys and values lie."""

    request: Request
    tokens: list[int]
    """Prompt and what was written."""
    reuses: bool = True
    """Whether it may start from blocks of others: not where something is wanted of every token of the prompt."""
    owner: str = ""
    """Blocks are shared among texts of one owner."""
    read: int = 0
    """Tokens whose keys and values are there."""
    reused: int = 0
    preempted: bool = False
    blocks: list[int] = field(default_factory=list)
    submitted: float = field(default_factory=perf_counter)
    started: float | None = None
    first: float | None = None


@dataclass(frozen=True)
class Piece:
    """What one text has in a pass: tokens ``start`` to ``end``."""

    text: Text
    start: int
    end: int

    @property
    def complete(self) -> bool:
        """Whether the next token follows from it."""
        return self.end == len(self.text.tokens)


class Schedule:
    """First come, first served: texts being written before prompts, prompts in chunks that fit the budget.

    A text starts when there is room for all that it has so far. When blocks run out, the text that came last gives up
    its own and is read again later: the same tokens give the same keys and values, so nobody can tell.
    """

    def __init__(self, pool: Pool, max_running: int, token_budget: int) -> None:
        self.pool, self.max_running, self.token_budget = pool, max_running, token_budget
        self.running: list[Text] = []
        self.waiting: deque[Text] = deque()
        self.preemptions = 0

    def next_pass(self) -> list[Piece]:
        """Pieces of the next pass, with blocks for all their tokens; none when there is nothing to do."""
        while self.waiting and len(self.running) < self.max_running and self._fits(self.waiting[0]):
            self._admit(self.waiting.popleft())
        left, pieces = self.token_budget, []
        writing = [text for text in self.running if text.read == len(text.tokens) - 1]
        reading = [text for text in self.running if text.read < len(text.tokens) - 1]
        for text in (*writing, *reading):
            if left == 0 or text not in self.running:  # it had to make room for one before it
                continue
            self._reuse(text)
            count = self._with_room(text, min(left, len(text.tokens) - text.read))
            if count:
                pieces.append(Piece(text, text.read, text.read + count))
                left -= count
        return [piece for piece in pieces if piece.text in self.running]

    def done(self, pieces: Sequence[Piece]) -> None:
        """The pieces were read."""
        for piece in pieces:
            piece.text.read = piece.end
            self.pool.fill(piece.text.blocks, piece.text.tokens, piece.start, piece.end, piece.text.owner)

    def remove(self, text: Text) -> None:
        """It is finished, or nobody waits for it."""
        if text in self.running:
            self.running.remove(text)
            self._release(text)
        else:
            self.waiting.remove(text)

    def _fits(self, text: Text) -> bool:
        """Else it would be pushed out by those before it, again and again."""
        if not self.running:
            return True
        held = self.pool.match(text.tokens, text.owner) if text.reuses and self.pool.reuse else []
        fits = sum(map(self._missing, (text, *self.running))) - len(held) <= self.pool.free
        self.pool.give_back(held)
        return fits

    def _missing(self, text: Text) -> int:
        """Blocks until all its tokens are read."""
        return -(-len(text.tokens) // self.pool.block_size) - len(text.blocks)

    def _admit(self, text: Text) -> None:
        text.started = text.started or perf_counter()
        self.running.append(text)
        self._reuse(text)

    def _reuse(self, text: Text) -> None:
        """Goes on from what is there already: also while it is read, as others may be ahead with the same text."""
        size = self.pool.block_size
        if not self.pool.reuse or not text.reuses or text.read != len(text.blocks) * size:
            return
        found = self.pool.match(text.tokens, text.owner, text.blocks)
        text.blocks += found
        text.read += len(found) * size
        if not text.preempted:
            text.reused += len(found) * size

    def _with_room(self, text: Text, count: int) -> int:
        """How many of ``count`` tokens there are blocks for, after others who came later made room."""
        while len(text.blocks) * self.pool.block_size < text.read + count:
            block = self.pool.take()
            if block is not None:
                text.blocks.append(block)
                continue
            last = max(self.running, key=lambda other: other.submitted)
            if last is text:
                break
            self._preempt(last)
        return max(0, min(count, len(text.blocks) * self.pool.block_size - text.read))

    def _preempt(self, text: Text) -> None:
        self.running.remove(text)
        self._release(text)
        text.preempted = True
        self.waiting.appendleft(text)
        self.preemptions += 1

    def _release(self, text: Text) -> None:
        self.pool.give_back(text.blocks)
        text.blocks, text.read = [], 0
