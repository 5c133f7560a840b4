"""The integer program against every choice there is; orders of pruning."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeforge.compress.solve import choose
from moeforge.errors import UserError

TABLES = st.integers(1, 5).flatmap(
    lambda units: st.tuples(
        st.lists(st.lists(st.integers(0, 1000), min_size=3, max_size=3), min_size=units, max_size=units),
        st.lists(st.lists(st.integers(1, 50), min_size=3, max_size=3), min_size=units, max_size=units),
        st.integers(0, 260),
    )
)


@settings(max_examples=60)
@given(TABLES)
def test_no_other_choice_within_the_budget_loses_less(table: tuple[list[list[int]], list[list[int]], int]) -> None:
    loss, cost, budget = table
    every = list(itertools.product(range(3), repeat=len(loss)))
    spent = {choice: sum(unit[c] for unit, c in zip(cost, choice, strict=True)) for choice in every}
    fitting = [choice for choice in every if spent[choice] <= budget]
    if not fitting:
        with pytest.raises(UserError, match=f"needs {min(spent.values()):,} bytes"):
            choose(loss, cost, budget)
        return
    chosen = tuple(choose(loss, cost, budget))
    lost = {choice: sum(unit[c] for unit, c in zip(loss, choice, strict=True)) for choice in fitting}
    assert spent[chosen] <= budget
    assert lost[chosen] <= min(lost.values()) * 1.001
