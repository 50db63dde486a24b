"""Covering arrays: few rows in which every two values of every two axes meet. The same rows in every run."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence

Values = dict[str, Sequence]


def anything(partial: dict) -> bool:
    return True


def wanted(values: Values, allowed: Callable[[dict], bool] = anything) -> dict[tuple, None]:
    """Every pair ((axis, place of its value), (axis, place)) that may meet, as the keys of a dict: in order."""
    each = [[(axis, place) for place in range(len(choices))] for axis, choices in values.items()]
    return {
        pair: None
        for one, other in itertools.combinations(each, 2)
        for pair in itertools.product(one, other)
        if allowed({axis: values[axis][place] for axis, place in pair})
    }


def met(values: Values, rows: list[dict]) -> set[tuple]:
    """The pairs that occur in `rows`."""
    found = set()
    for row in rows:
        places = [(axis, list(choices).index(row[axis])) for axis, choices in values.items()]
        found.update(itertools.combinations(places, 2))
    return found


def covering(
    values: Values, allowed: Callable[[dict], bool] = anything, seed: int = 0, candidates: int = 6
) -> list[dict]:
    """Rows {axis: value} in which every pair of values meets that `allowed` admits.

    Greedy (Cohen, Dalal, Fredman and Patton, "The AETG system", 1997): a row starts from a pair that is missing, then
    each other axis, in a random order, takes the value that completes most missing pairs; of `candidates` rows the
    best is kept.

    Args:
        values: the axes, and what each may be.
        allowed: judges a row while it is filled: a dict of some of the axes. False for two values that must not meet;
            what it refuses, no row holds. A rule on three axes may leave a pair that fits into no row.

    Raises:
        ValueError: for such a pair.
    """
    draw = random.Random(seed)
    missing = wanted(values, allowed)
    rows = []

    def fill(start):
        places = dict(start)
        new = 1
        for axis in draw.sample(list(values), len(values)):
            if axis in places:
                continue
            order = {name: at for at, name in enumerate(values)}
            best, gain = None, -1
            for place in draw.sample(range(len(values[axis])), len(values[axis])):
                partial = {name: values[name][at] for name, at in places.items()} | {axis: values[axis][place]}
                if not allowed(partial):
                    continue
                pairs = (sorted(((axis, place), other), key=lambda one: order[one[0]]) for other in places.items())
                count = sum(tuple(pair) in missing for pair in pairs)
                if count > gain:
                    best, gain = place, count
            if best is None:
                return None, 0
            places[axis] = best
            new += gain
        return places, new

    while missing:
        start = draw.choice(list(missing)[:50])
        found = max((fill(start) for _ in range(candidates)), key=lambda filled: filled[1])[0]
        if found is None:
            named = {axis: values[axis][place] for axis, place in start}
            raise ValueError(f"no row can hold {named}: the rule is not one on pairs")
        rows.append({axis: choices[found[axis]] for axis, choices in values.items()})
        for pair in itertools.combinations(((axis, found[axis]) for axis in values), 2):
            missing.pop(pair, None)
    return rows
