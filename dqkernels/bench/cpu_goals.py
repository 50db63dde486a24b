"""What a CPU has to reach, and whether a run of `bench cpu` says that it does."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

#: What a process may take beyond the bytes of its file.
BEYOND_BYTES = 60_000_000
#: Fewer samples decide no goal.
SAMPLES = 5
_PEER = "ctranslate2 int8"


@dataclass(frozen=True)
class Goal:
    """One line of the table.

    Attributes:
        name: in words.
        limit: the figure wanted.
        unit: suffix of the record's keys: `ratio`, `fraction`, `ms`, `us` or `bytes`.
        least: whether `limit` is the least or the most.
        figures: of the rows of a record, each with its place in words.
    """

    name: str
    limit: float
    unit: str
    least: bool
    figures: Callable[[list[dict]], list[tuple[float, str]]]


def goals() -> list[Goal]:
    """All of them, in the order of the parts."""
    found = []
    for cache, words in (("cold", "from memory"), ("warm", "from the cache")):
        found.append(
            Goal(f"GEMV {words}, of the reader", 0.8, "fraction", True, _of("gemv", "read_fraction", cache=cache))
        )
    found += [
        Goal("GEMM W8, M >= 256, of torch._int_mm", 0.7, "ratio", True, _of("gemm", "int_mm_ratio", _large(8))),
        Goal("GEMM W4, M >= 256, of our W8", 0.9, "ratio", True, _of("gemm", "w8_ratio", _large(4))),
        Goal("GEMM W2, M >= 256, of our W8", 0.9, "ratio", True, _of("gemm", "w8_ratio", _large(2))),
        Goal(
            "between native steps, batch 1 greedy",
            500.0,
            "us",
            False,
            _of("step", "median_us", batch_size=1, num_beams=1),
        ),
        Goal("behind torch's threads, of alone", 0.9, "ratio", True, _of("threads", "alone_ratio")),
        Goal("process beyond its file", float(BEYOND_BYTES), "bytes", False, _beyond),
        Goal("decode W4, batch 1, a token", 2.5, "ms", False, _tokens(4)),
        Goal("decode W4, batch 1, over CTranslate2 int8", 4.0, "ratio", True, _over(_PEER, 4, 1, 1)),
        Goal("decode W2, batch 1, over CTranslate2 int8", 5.0, "ratio", True, _over(_PEER, 2, 1, 1)),
        Goal("decode W4, batch 8, over CTranslate2 int8", 2.5, "ratio", True, _over(_PEER, 4, 8, 1)),
        Goal("decode W4, 4 beams, over CTranslate2 int8", 2.5, "ratio", True, _over(_PEER, 4, 1, 4)),
    ]
    for tokens in (256, 1024):
        for peer, words, limit in ((_PEER, "CTranslate2 int8", 1.5), ("torch fp32", "torch fp32", 4.0)):
            figures = _over(peer, 4, 1, 1, "first_token_ms", tokens)
            found.append(Goal(f"encoder W4, {tokens} tokens, over {words}", limit, "ratio", True, figures))
    return found


def judged(rows: Iterable[dict]) -> list[dict]:
    """Every goal with its verdict, met, not met or not measured, and the worst figure with its place."""
    rows = [row for row in rows if row["status"] == "timed" and row.get("samples", SAMPLES) >= SAMPLES]
    return [_verdict(goal, rows) for goal in goals()]


def _verdict(goal: Goal, rows: list[dict]) -> dict:
    line = {"goal": goal.name, "least": goal.least, f"wanted_{goal.unit}": goal.limit}
    about = goal.figures(rows)
    if not about:
        return {**line, f"found_{goal.unit}": None, "verdict": "not measured", "where": None}
    figure, place = (min if goal.least else max)(about)
    met = figure >= goal.limit if goal.least else figure <= goal.limit
    where = place if len(about) == 1 else f"{place}, worst of {len(about)}"
    return {**line, f"found_{goal.unit}": figure, "verdict": "met" if met else "not met", "where": where}


def place(row: dict) -> str:
    """A row's work, in words."""
    if row["part"] in ("gemv", "gemm", "threads"):
        return f"{row['tokens']}x{row['out_features']}x{row['in_features']} W{row['bits']}"
    if row["part"] == "memory":
        return f"W{row['bits']}"
    return f"batch {row['batch_size']}, {row['num_beams']} beams, {row['source_tokens']} tokens"


def _of(part: str, key: str, holds: Callable[[dict], bool] = lambda row: True, **fields):
    """Of our rows of a part that have these fields."""

    def figures(rows: list[dict]) -> list[tuple[float, str]]:
        mine = [row for row in rows if row["part"] == part and row["candidate"].startswith("dqkernels")]
        mine = [row for row in mine if holds(row) and all(row.get(name) == value for name, value in fields.items())]
        return [(row[key], place(row)) for row in mine if row.get(key) is not None]

    return figures


def _large(bits: int) -> Callable[[dict], bool]:
    return lambda row: row["bits"] == bits and row["tokens"] >= 256


def _beyond(rows: list[dict]) -> list[tuple[float, str]]:
    mine = [row for row in rows if row["part"] == "memory"]
    return [(row["growth_bytes"] - row["file_bytes"], place(row)) for row in mine]


def _cell(rows: list[dict], bits: int, batch: int, beams: int, tokens: int) -> dict[str, dict]:
    """Rows by candidate of one cell of work, ours of these bits as `ours`."""
    wanted = {"part": "generate", "batch_size": batch, "num_beams": beams, "source_tokens": tokens}
    found = [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]
    cell = {row["candidate"]: row for row in found}
    cell.update(("ours", row) for row in found if row["family"] == "ours" and row["weight_bits"] == bits)
    return cell


def _tokens(bits: int):
    def figures(rows: list[dict]) -> list[tuple[float, str]]:
        ours = _cell(rows, bits, 1, 1, 256).get("ours", {})
        return [(ours["decode_ms_per_token"], place(ours))] if ours.get("decode_ms_per_token") else []

    return figures


def _over(peer: str, bits: int, batch: int, beams: int, key: str = "decode_ms_per_token", tokens: int = 256):
    """How many times the peer's time is ours."""

    def figures(rows: list[dict]) -> list[tuple[float, str]]:
        cell = _cell(rows, bits, batch, beams, tokens)
        both = [cell.get(name, {}).get(key) for name in (peer, "ours")]
        return [(float(f"{both[0] / both[1]:.4g}"), place(cell["ours"]))] if all(both) else []

    return figures
