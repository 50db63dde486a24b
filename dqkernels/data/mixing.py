"""One training set of several: teacher outputs with gold pairs, a small set repeated beside a large one."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import numpy as np

from dqkernels.data.sources import need_datasets


def mix(parts: Sequence[tuple[Any, float]], seed: int = 0) -> Any:
    """All parts in one shuffled `datasets.Dataset`, the same for the same parts and seed.

    Args:
        parts: `(dataset, amount)` each. A whole number is that many rows; a number with a point is that many times
            the dataset: `1.0` is all of it once, `0.25` a quarter, `2.5` all of it twice and half of it once more.
            Rows that do not make a full round are drawn without replacement.
        seed: of the draws and of the final shuffle.

    Returns:
        the columns that all parts have, in the order of the first part.

    Raises:
        ValueError: for no parts, an empty part, an amount that is not above 0, or parts without a common column.
    """
    datasets = need_datasets()
    if not parts:
        raise ValueError("parts must hold at least one (dataset, amount)")
    common = [name for name in parts[0][0].column_names if all(name in part.column_names for part, _ in parts)]
    if not common:
        columns = "; ".join(", ".join(part.column_names) for part, _ in parts)
        raise ValueError(f"the parts of a mix must have a column in common, they have {columns}")
    drawn = []
    for number, (part, amount) in enumerate(parts):
        if len(part) == 0:
            raise ValueError(f"part {number} of the mix has no rows")
        if isinstance(amount, bool) or not amount > 0:
            raise ValueError(f"the amount of part {number} must be above 0, got {amount!r}")
        wanted = int(amount) if isinstance(amount, Integral) else max(1, round(float(amount) * len(part)))
        rounds, rest = divmod(wanted, len(part))
        extra = np.random.default_rng([seed, number]).permutation(len(part))[:rest]
        rows = np.concatenate([np.tile(np.arange(len(part)), rounds), np.sort(extra)])
        drawn.append(part.select_columns(common).select(rows))
    first = drawn[0].features
    drawn = [part if part.features == first else part.cast(first) for part in drawn]
    return datasets.concatenate_datasets(drawn).shuffle(seed=seed)
