"""pairwise.py: every pair is there, nothing forbidden is, and the rows are few."""

import pairwise
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

AXES = st.lists(st.integers(1, 6), min_size=2, max_size=7)


@given(AXES, st.integers(0, 5))
@settings(max_examples=60)
def test_every_pair_of_values_meets(sizes, seed):
    values = {f"axis {i}": list(range(size)) for i, size in enumerate(sizes)}
    rows = pairwise.covering(values, seed=seed)
    assert pairwise.met(values, rows) == set(pairwise.wanted(values))
    largest, second = sorted(sizes, reverse=True)[:2]
    assert len(rows) <= 3 * largest * second, "hardly fewer rows than all combinations"
    assert rows == pairwise.covering(values, seed=seed)


@given(AXES, st.sets(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=3))
@settings(max_examples=60)
def test_what_is_forbidden_is_in_no_row(sizes, forbidden):
    """Zeros may always meet, so that a row with any pair exists only where the rule allows one."""
    values = {f"axis {i}": list(range(size)) for i, size in enumerate(sizes)}

    def allowed(partial):
        pair = partial.get("axis 0"), partial.get("axis 1")
        return pair not in forbidden or 0 in pair

    rows = pairwise.covering(values, allowed)
    assert all(allowed(row) for row in rows)
    assert pairwise.met(values, rows) == set(pairwise.wanted(values, allowed))


def test_a_missing_row_shows():
    values = {"a": [1, 2, 3], "b": ["x", "y"], "c": [None, 0.5]}
    rows = pairwise.covering(values)
    assert len(rows) == 6
    for i in range(len(rows)):
        assert pairwise.met(values, rows[:i] + rows[i + 1 :]) < set(pairwise.wanted(values))


def test_a_rule_on_three_axes_is_an_error_not_a_gap():
    values = {"a": [1, 2], "b": [1, 2], "c": [1]}
    with pytest.raises(ValueError, match="'a': 2, 'b': 2"):
        pairwise.covering(values, lambda partial: not (partial.get("a") == partial.get("b") == 2 and "c" in partial))
