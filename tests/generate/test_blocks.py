"""The pool of blocks, against what a dictionary of whole prefixes would answer."""

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from moeforge.generate.blocks import Pool

SIZE, TOTAL = 2, 6
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=9)
OWNERS = st.sampled_from(["", "a"])


class Texts(RuleBasedStateMachine):
    """Texts that come, are read block by block and go; ``content`` is what really lies in each block."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = Pool(TOTAL, SIZE)
        self.texts: list[tuple[str, list[int], list[int]]] = []
        self.content: dict[int, tuple[str, tuple[int, ...]]] = {}

    @rule(owner=OWNERS, tokens=TOKENS)
    def come(self, owner: str, tokens: list[int]) -> None:
        blocks: list[int] = []
        self.texts.append((owner, tokens, blocks))
        self._go_on(owner, tokens, blocks)

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def read(self, data: st.DataObject) -> None:
        owner, tokens, blocks = data.draw(st.sampled_from(self.texts))
        if len(blocks) * SIZE >= len(tokens):
            return
        free = self.pool.free
        block = self.pool.take()
        assert (block is None) == (free == 0)
        if block is None:
            return
        assert all(block not in others for _, _, others in self.texts)
        done = len(blocks) * SIZE
        blocks.append(block)
        self.content[block] = owner, tuple(tokens[: done + SIZE])
        self.pool.fill(blocks, tokens, done, min(len(tokens), done + SIZE), owner)
        self._go_on(owner, tokens, blocks)

    def _go_on(self, owner: str, tokens: list[int], blocks: list[int]) -> None:
        """What is found is of the same owner, holds exactly these tokens after these, and leaves one to read."""
        if len(blocks) * SIZE > len(tokens):
            return
        found = self.pool.match(tokens, owner, blocks)
        for index, block in enumerate(found, len(blocks) + 1):
            assert self.content[block] == (owner, tuple(tokens[: index * SIZE]))
        blocks += found
        assert not found or len(blocks) * SIZE < len(tokens)

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        text = self.texts.pop(data.draw(st.integers(0, len(self.texts) - 1)))
        self.pool.give_back(text[2])

    @invariant()
    def every_block_is_somewhere_once(self) -> None:
        used = {block for _, _, blocks in self.texts for block in blocks}
        assert self.pool.used == len(used)
        assert self.pool.used + self.pool.free == TOTAL


TestTexts = Texts.TestCase


def read(pool: Pool, tokens: list[int], owner: str = "") -> list[int]:
    blocks = pool.match(tokens, owner)
    done = len(blocks) * pool.block_size
    while len(blocks) * pool.block_size < len(tokens):
        block = pool.take()
        assert block is not None
        blocks.append(block)
    pool.fill(blocks, tokens, done, len(tokens), owner)
    return blocks


@given(TOKENS)
def test_the_same_text_again_finds_all_but_the_block_of_its_last_token(tokens: list[int]) -> None:
    pool = Pool(TOTAL, SIZE)
    pool.give_back(read(pool, tokens))
    assert len(pool.match(tokens)) == (len(tokens) - 1) // SIZE


def test_nobody_finds_what_another_owner_left() -> None:
    pool = Pool(TOTAL, SIZE)
    pool.give_back(read(pool, [1, 2, 3, 4, 5], owner="a"))
    assert pool.match([1, 2, 3, 4, 5], owner="b") == []
    assert len(pool.match([1, 2, 3, 4, 5], owner="a")) == 2


def test_without_reuse_nothing_is_kept() -> None:
    pool = Pool(TOTAL, SIZE, reuse=False)
    pool.give_back(read(pool, [1, 2, 3, 4, 5]))
    assert pool.match([1, 2, 3, 4, 5]) == [] and pool.cached == 0


def test_two_who_read_the_same_at_once_are_both_gone_on_from() -> None:
    """The second one's blocks are twins of the first one's; what it reads beyond is found all the same."""
    pool = Pool(TOTAL, SIZE)
    first, second = ([pool.take() for _ in range(2)] for _ in range(2))
    pool.fill(first, [1, 2, 7, 7], 0, 4)  # type: ignore[arg-type]
    pool.fill(second, [1, 2, 3, 4], 0, 4)  # type: ignore[arg-type]
    assert pool.match([1, 2, 3, 4, 5]) == [first[0], second[1]]


def test_the_end_of_what_was_left_longest_ago_goes_first() -> None:
    pool = Pool(4, SIZE)
    pool.give_back(read(pool, [1, 2, 3, 4]))
    pool.give_back(read(pool, [5, 6, 7, 8]))
    assert (pool.free, pool.cached, pool.used) == (4, 4, 0)
    pool.take()
    assert len(pool.match([1, 2, 3, 4, 0])) == 1
    assert len(pool.match([5, 6, 7, 8, 0])) == 2
