"""The tables of `bench cpu`, in 80 columns."""

from __future__ import annotations

from collections.abc import Iterable

from dqkernels.bench import protocol
from dqkernels.bench.cpu_goals import place


def render(result: dict):
    """Rich tables of a record: a part each, then the goals; and what was not measured."""
    from rich.console import Group

    rows = result["rows"]
    shown = [table for name, draw in _TABLES.items() if (table := draw([row for row in rows if row["part"] == name]))]
    notes = _notes(rows)
    warning = protocol.busy_words(result["protocol"])
    words = [
        f"{protocol.machine_words(result['environment'])}, {result['protocol']['isa']}, {result['settings']['shape']}"
    ]
    return Group(*words, *shown, *notes, *([] if warning is None else [warning]))


def _table(title: str, columns: Iterable[str], lines: list[tuple[str, ...]]):
    from rich import box
    from rich.table import Table

    if not lines:
        return None
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    for i, name in enumerate(columns):
        table.add_column(
            name, justify="right" if i and name not in ("candidate", "") else "left", no_wrap=name != "goal"
        )
    for line in lines:
        table.add_row(*line)
    return table


def _timed(rows: list[dict]) -> list[dict]:
    return [row for row in rows if row["status"] == "timed"]


def _figure(value: float | None, form: str = ".3g") -> str:
    return "-" if value is None else format(value, form)


def _cells(rows: list[dict]) -> dict[str, dict[str, dict]]:
    """Rows by their work and, within it, by their candidate."""
    found: dict[str, dict[str, dict]] = {}
    for row in rows:
        sizes = f"{row['tokens']}x{row['out_features']}x{row['in_features']}"
        key = f"{sizes} W{row['bits']} {row['cache']}" if "cache" in row else sizes
        found.setdefault(key, {})[row["candidate"]] = row
    return found


def _gemv(rows: list[dict]):
    lines = []
    for key, cell in _cells(_timed(rows)).items():
        ours = next((row for name, row in cell.items() if name.startswith("dqkernels")), {})
        rates = [_figure(cell.get(name, {}).get("gb_per_s")) for name in ("read loop", "torch sum")]
        sizes, width, cache = key.split(" ")
        figures = (_figure(ours.get("median_us"), ".1f"), _figure(ours.get("gb_per_s")), *rates)
        lines.append((sizes[2:], width, cache, *figures, _percent(ours.get("read_fraction"))))
    title = "GEMV: GB/s of ours, of a loop that reads, of torch's sum; share of the faster"
    return _table(title, ("NxK", "", "", "us", "GB/s", "loop", "sum", "share"), lines)


def _gemm(rows: list[dict]):
    names = ("dqkernels W8", "dqkernels W4", "dqkernels W2", "torch._int_mm", "torch fp32")
    lines = []
    for sizes, cell in _cells([row for row in rows if "median_us" in row]).items():
        times = [_figure(cell.get(name, {}).get("median_us"), ".0f") for name in names]
        ratios = [_figure(cell.get("dqkernels W8", {}).get(key)) for key in ("int_mm_ratio", "fp32_ratio")]
        lines.append((sizes, *times, *ratios))
    title = "GEMM: us; how many times as fast as torch's int8 and fp32 our W8 is"
    table = _table(title, ("MxNxK", "W8", "W4", "W2", "_int_mm", "fp32", "x int8", "x fp32"), lines)
    shares = _multiply_shares(rows)
    from rich.console import Group

    return table if shares is None else Group(table, shares)


def _multiply_shares(rows: list[dict]):
    """Of the loop that only multiplies, ours; nothing where no row has it (older records, no loop for this CPU)."""
    names = ("dqkernels W8", "dqkernels W4", "dqkernels W2")
    lines, instruction = [], None
    for sizes, cell in _cells([row for row in rows if row.get("multiply_fraction") is not None]).items():
        loop = cell.get("multiply loop", {})
        instruction = loop.get("instruction") or instruction
        shares = [_percent(cell.get(name, {}).get("multiply_fraction")) for name in names]
        lines.append((sizes, _figure(loop.get("median_us"), ".0f"), *shares))
    if not lines:
        return None
    title = f"GEMM: us of a loop that only multiplies ({instruction}), and its share"
    return _table(title, ("MxNxK", "loop", "W8", "W4", "W2"), lines)


def _step(rows: list[dict]):
    lines = [
        (f"batch {row['batch_size']}, {row['num_beams']} beams", _figure(row["median_us"], ".0f"),
         _figure(row["p20_us"], ".0f"), _figure(row["native_us"], ".0f"))
        for row in _timed(rows)
    ]  # fmt: skip
    return _table("Steps: us between two native calls, and of them", ("work", "between", "p20", "native"), lines)


def _threads(rows: list[dict]):
    lines = [
        (
            place(row),
            row["candidate"].split(" ", 2)[2],
            _figure(row["median_us"], ".0f"),
            _figure(row.get("alone_ratio")),
        )
        for row in _timed(rows)
    ]
    return _table("Beside torch's threads", ("MxNxK", "candidate", "us", "of alone"), lines)


def _memory(rows: list[dict]):
    lines = [
        (f"W{row['bits']}", *(_figure(row[key] / 1e6, ".1f") for key in ("file_bytes", "loaded_bytes", "growth_bytes")))
        for row in _timed(rows)
    ]
    return _table("A fresh process, MB", ("bits", "file", "loaded", "growth"), lines)


def _models(rows: list[dict]):
    lines = [
        (f"{row['batch_size']}x{row['num_beams']}, {row['source_tokens']}+{row['new_tokens']}", row["candidate"],
         _figure(row["first_token_ms"], ".0f"), _figure(row["decode_ms_per_token"]), _figure(row["speedup_ratio"]))
        for row in _timed(rows)
    ]  # fmt: skip
    title = "Models: ms to the first token, ms a token behind it, times torch"
    return _table(title, ("batch x beams", "candidate", "first", "token", "x"), lines)


def _goals(rows: list[dict]):
    lines = []
    for row in rows:
        unit = next(key for key in row if key.startswith("wanted_")).removeprefix("wanted_")
        sign = ">=" if row["least"] else "<="
        found, wanted = _with_unit(row[f"found_{unit}"], unit), _with_unit(row[f"wanted_{unit}"], unit)
        lines.append((row["goal"], f"{sign} {wanted}", found, row["verdict"]))
    return _table("Goals", ("goal", "wanted", "found", "verdict"), lines)


def _with_unit(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    if unit == "bytes":
        return f"{value / 1e6:.0f} MB"
    return _percent(value) if unit == "fraction" else f"{value:.3g}{'x' if unit == 'ratio' else ' ' + unit}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f}%"


def _notes(rows: list[dict]) -> list[str]:
    """What was not measured, each reason once."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["status"] not in ("timed", "goal"):
            name = " ".join(filter(None, [row["part"], row.get("candidate")]))
            found.setdefault((row["status"], row["reason"]), []).append(name)
    return [f"{', '.join(dict.fromkeys(names))}: {status} ({reason})" for (status, reason), names in found.items()]


_TABLES = {
    "gemv": _gemv,
    "gemm": _gemm,
    "step": _step,
    "threads": _threads,
    "memory": _memory,
    "generate": _models,
    "goal": _goals,
}
