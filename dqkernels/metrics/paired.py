"""Two systems on the same texts: what their scores differ by, and how sure that is."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def paired_difference(scores: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """The mean of `scores - others`, pair by pair, and its standard error (0 for one pair).

    Pairs are of different difficulty; taking the difference within each leaves that out.

    Raises:
        ValueError: for unequal numbers of scores, or none.
    """
    if len(scores) != len(others):
        raise ValueError(f"scores and others must be of the same pairs, got {len(scores)} and {len(others)}")
    if not scores:
        raise ValueError("scores must be of at least one pair, got none")
    gaps = [mine - theirs for mine, theirs in zip(scores, others, strict=True)]
    error = statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else 0.0
    return statistics.fmean(gaps), error
