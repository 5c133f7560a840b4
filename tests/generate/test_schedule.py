"""Who is in a pass: budgets, room, order, and that everybody is served in the end."""

from hypothesis import given
from hypothesis import strategies as st

from moeforge.generate import Sampling
from moeforge.generate.blocks import Pool
from moeforge.generate.request import Request
from moeforge.generate.schedule import Schedule, Text

SIZE = 4


def text(*tokens: int, owner: str = "") -> Text:
    return Text(Request(tokens, Sampling(), put=lambda event: None), [*tokens], owner=owner)


def schedule(blocks: int = 16, max_running: int = 8, budget: int = 8, reuse: bool = True) -> Schedule:
    return Schedule(Pool(blocks, SIZE, reuse), max_running, budget)


def step(plan: Schedule) -> list[tuple[Text, int, int]]:
    """One pass; who has read all gets a token."""
    pieces = plan.next_pass()
    plan.done(pieces)
    for piece in pieces:
        if piece.complete:
            piece.text.tokens.append(0)
    return [(piece.text, piece.start, piece.end) for piece in pieces]


@given(
    lengths=st.lists(st.tuples(st.integers(1, 14), st.integers(1, 10)), min_size=1, max_size=8),
    blocks=st.integers(6, 12),
    max_running=st.integers(1, 5),
    budget=st.integers(1, 12),
    reuse=st.booleans(),
)
def test_all_are_served_within_the_limits(
    lengths: list[tuple[int, int]], blocks: int, max_running: int, budget: int, reuse: bool
) -> None:
    plan = schedule(blocks, max_running, budget, reuse)
    goals = {text(*[1] * prompt): prompt + more for prompt, more in lengths}
    plan.waiting.extend(goals)
    for _ in range(2000):
        pieces = plan.next_pass()
        if not goals:
            break
        assert pieces, "somebody always goes on"
        assert len(plan.running) <= max_running
        assert sum(piece.end - piece.start for piece in pieces) <= budget
        assert len({piece.text for piece in pieces}) == len(pieces)
        slots = [piece.text.blocks[at // SIZE] * SIZE + at % SIZE for piece in pieces for at in range(*span(piece))]
        assert len(set(slots)) == len(slots), "no two rows are stored in one place"
        plan.done(pieces)
        for piece in pieces:
            if piece.complete:
                piece.text.tokens.append(1)
            if len(piece.text.tokens) >= goals[piece.text]:
                plan.remove(piece.text)
                goals.pop(piece.text)
    assert not goals and plan.pool.used == 0


def span(piece: object) -> tuple[int, int]:
    return piece.start, piece.end  # type: ignore[attr-defined]


def test_texts_being_written_come_before_prompts_and_prompts_in_chunks() -> None:
    plan, one, other = schedule(), text(1, 2), text(*range(3, 23))
    plan.waiting.append(one)
    assert step(plan) == [(one, 0, 2)]
    plan.waiting.append(other)
    assert step(plan) == [(one, 2, 3), (other, 0, 7)]
    assert step(plan) == [(one, 3, 4), (other, 7, 14)]
    assert step(plan) == [(one, 4, 5), (other, 14, 20)]


def test_the_last_to_come_makes_room_and_reads_again() -> None:
    plan, one, other = schedule(blocks=4, reuse=False), text(*range(7)), text(*range(10, 17))
    plan.waiting.extend([one, other])
    for _ in range(4):
        step(plan)
    assert plan.preemptions == 1 and plan.running == [one] and [*plan.waiting] == [other]
    assert (other.blocks, other.read) == ([], 0)
    plan.remove(one)
    assert step(plan)[0][:2] == (other, 0)


def test_a_text_waits_until_there_is_room_for_what_it_has() -> None:
    """Else it would be let in and pushed out again pass by pass."""
    plan, one, other = schedule(blocks=4, reuse=False, budget=64), text(*range(9)), text(*range(20, 29))
    plan.waiting.extend([one, other])
    for _ in range(5):
        step(plan)
    assert plan.running == [one] and plan.preemptions == 0
    plan.remove(one)
    assert step(plan) == [(other, 0, 9)]


def test_who_comes_at_once_with_the_same_text_shares_what_one_reads() -> None:
    plan, prompt = schedule(budget=8), range(17)
    one, other = text(*prompt), text(*prompt)
    plan.waiting.extend([one, other])
    assert [step(plan) for _ in range(3)] == [
        [(one, 0, 8)],
        [(one, 8, 16)],
        [(one, 16, 17), (other, 16, 17)],
    ]
    assert other.blocks[:4] == one.blocks[:4] and other.blocks[4] != one.blocks[4]
    assert (one.reused, other.reused) == (0, 16)


def test_not_with_another_owner_and_not_who_wants_every_token() -> None:
    plan, prompt = schedule(budget=64), range(9)
    first = text(*prompt, owner="a")
    plan.waiting.append(first)
    step(plan)
    stranger, whole = text(*prompt, owner="b"), text(*prompt, owner="a")
    whole.reuses = False
    plan.waiting.extend([stranger, whole])
    assert step(plan)[1:] == [(stranger, 0, 9), (whole, 0, 9)]


def test_removing_who_runs_and_who_waits() -> None:
    plan, one, other = schedule(max_running=1), text(1, 2, 3), text(4)
    plan.waiting.extend([one, other])
    step(plan)
    plan.remove(other)
    plan.remove(one)
    assert plan.pool.used == 0 and plan.next_pass() == []
