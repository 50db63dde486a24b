"""What the decode GEMM has to reach on a GPU, and whether a run of `bench gemm` says that it does."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

#: The numbers of tokens that have goals.
TOKENS = (1, 16, 64)
#: Weights from which on a layer counts as large: N * K.
LARGE = 64_000_000
#: (out_features, in_features) of BART-base and -large; the heads are no layers of theirs.
BART = {(1024, 1024), (4096, 1024), (1024, 4096), (3072, 1024), (768, 768), (2304, 768), (3072, 768), (768, 3072)}
#: At least this many times torch fp16, for large layers: by bits and tokens.
RATIOS = {2: (6.5, 5.0, 3.3), 4: (3.4, 3.4, 2.4), 8: (1.8, 1.8, 1.5)}
#: At most so many microseconds a call for BART's layers, at 1 and 16 tokens; and on the host.
BART_US = 2.5
BART_TOKENS = (1, 16)
HOST_US = 10.0
#: Fewer samples decide no goal.
SAMPLES = 200


@dataclass(frozen=True)
class Goal:
    """One line of the table.

    Attributes:
        name: in words.
        limit: the figure wanted.
        unit: `x` or `us`.
        least: whether `limit` is the least (a ratio) or the most (a time).
        holds: which rows it is about.
        figure: of a row; None where it has none.
    """

    name: str
    limit: float
    unit: str
    least: bool
    holds: Callable[[dict], bool]
    figure: Callable[[dict], float | None]


def concerns(tokens: int, n: int, k: int) -> bool:
    """Whether any goal is about this GEMM."""
    return (n * k >= LARGE and tokens in TOKENS) or ((n, k) in BART and tokens in BART_TOKENS)


def goals() -> list[Goal]:
    """All of them, in the order of the issue's table."""
    found = []
    for bits, limits in RATIOS.items():
        for tokens, limit in zip(TOKENS, limits, strict=True):
            name = f"W{bits}A8, N*K >= 64M, M={tokens}"
            found.append(Goal(name, limit, "x", True, _large(bits, tokens), lambda row: row.get("speedup_ratio")))
    for tokens in BART_TOKENS:
        name = f"BART layers, any bits, M={tokens}"
        found.append(Goal(name, BART_US, "us", False, _bart(tokens), lambda row: row.get("median_us")))
    found.append(Goal("host time of a call", HOST_US, "us", False, _bart(None), lambda row: row.get("host_us")))
    return found


def judged(rows: Iterable[dict]) -> list[dict]:
    """Every goal with its verdict: met, not met or not measured, and the worst figure with its place.

    Of each GEMM the fastest of ours counts, cold, with one scale per channel; of all GEMMs that a goal is about, the
    worst does. Fewer samples than `SAMPLES` decide nothing.

    Args:
        rows: of a record, measured on a GPU.
    """
    fastest: dict[tuple, dict] = {}
    for row in rows:
        ours = row.get("backend") is not None and row["status"] == "timed" and row.get("cache") == "cold"
        if not ours or row.get("samples", 0) < SAMPLES or row["group_size"] != -1:
            continue
        key = (row["tokens"], row["out_features"], row["in_features"], row["bits"])
        if key not in fastest or row["median_us"] < fastest[key]["median_us"]:
            fastest[key] = row
    return [_verdict(goal, fastest.values()) for goal in goals()]


def _verdict(goal: Goal, rows: Iterable[dict]) -> dict:
    line = {"goal": goal.name, "least": goal.least, _key(goal, "wanted"): goal.limit}
    about = [(goal.figure(row), row) for row in rows if goal.holds(row) and goal.figure(row) is not None]
    if not about:
        return {**line, _key(goal, "found"): None, "verdict": "not measured", "where": None}
    figure, row = (min if goal.least else max)(about, key=lambda pair: pair[0])
    met = figure >= goal.limit if goal.least else figure <= goal.limit
    how = f"{row['backend']} overlapped" if row.get("candidate", "").endswith(" overlapped") else row["backend"]
    place = f"{row['out_features']}x{row['in_features']} W{row['bits']} {how}"
    return {
        **line,
        _key(goal, "found"): figure,
        "verdict": "met" if met else "not met",
        "where": place if len(about) == 1 else f"{place}, worst of {len(about)}",
    }


def _key(goal: Goal, word: str) -> str:
    return f"{word}_ratio" if goal.unit == "x" else f"{word}_us"


def _large(bits: int, tokens: int) -> Callable[[dict], bool]:
    def holds(row: dict) -> bool:
        large = row["out_features"] * row["in_features"] >= LARGE
        return large and row["bits"] == bits and row["tokens"] == tokens

    return holds


def _bart(tokens: int | None) -> Callable[[dict], bool]:
    def holds(row: dict) -> bool:
        return (row["out_features"], row["in_features"]) in BART and tokens in (None, row["tokens"])

    return holds
