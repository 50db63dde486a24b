"""The rows of any benchmark's result for other programs and for pages: CSV and Markdown. No measuring here.

CSV has every field. Markdown has, of whole models, the columns that are printed; of the rest every field that some row
has, without the details of its statistics, a table for each part of a record.
"""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

from dqkernels.bench import record

#: Fields that Markdown leaves out: CSV and the record have them.
_DETAILS = frozenset(
    "p10_us p90_us mean_us p10_ms p90_ms mean_ms timer rotated_bytes kernel foreign backend signature took_s".split()
)
#: Columns of the Markdown table of whole models: the field, its heading, and what a value is divided by.
_COLUMNS = (
    ("candidate", "candidate", None),
    ("batch_size", "batch", None),
    ("num_beams", "beams", None),
    ("source_tokens", "source", None),
    ("new_tokens", "new", None),
    ("layers", "layers", None),
    ("latency_ms_per_token", "ms/token", 1),
    ("p20_ms_per_token", "p20", 1),
    ("p80_ms_per_token", "p80", 1),
    ("tokens_per_s", "tokens/s", 1),
    ("speedup_ratio", "x", 1),
    ("first_token_ms", "first ms", 1),
    ("samples", "n", None),
    ("weights_bytes", "weights MB", 1e6),
    ("cache_bytes", "cache MB", 1e6),
    ("peak_bytes", "peak MB", 1e6),
    ("process_growth_bytes", "process MB", 1e6),
)
SUFFIXES = (".csv", ".md")


def check_name(path: str | Path) -> None:
    """Refuses a name that ends in neither of `SUFFIXES`.

    Raises:
        ValueError: naming it.
    """
    if Path(path).suffix not in SUFFIXES:
        raise ValueError(f"table must end in {' or '.join(SUFFIXES)}, got {str(path)!r}")


def write_table(result: dict, path: str | Path) -> None:
    """Every row into a file, by a temporary file and a rename: `.csv` has all fields, `.md` those for people.

    Args:
        result: with `rows`; with `kind`, if it is a record.
        path: a name that ends in one of `SUFFIXES`.

    Raises:
        ValueError: for another ending.
    """
    check_name(path)
    made = _csv(result["rows"]) if Path(path).suffix == ".csv" else markdown(result)
    record.replace(Path(path), made.encode())


def _csv(rows: list[dict]) -> str:
    """Fields in the order in which they first occur; what a row lacks, or has as null, is empty; lists are JSON."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: json.dumps(v) if isinstance(v, list | dict) else v for k, v in row.items()})
    return buffer.getvalue()


def markdown(result: dict) -> str:
    """The rows as one table; of a record in parts, as one under the name of each."""
    rows = result["rows"]
    if result.get("kind") == "generate":
        return _of_models(rows)
    parts: dict[str | None, list[dict]] = {}
    for row in rows:
        parts.setdefault(row.get("part"), []).append(row)
    tables = [_of_part(found) for found in parts.values()]
    if list(parts) == [None]:
        return tables[0]
    return "\n".join(f"### {name}\n\n{table}" for name, table in zip(parts, tables, strict=True))


def _of_part(rows: list[dict]) -> str:
    """Every field that some row has a single value for; state and reason only where not all were timed."""
    names = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in _DETAILS | {"part"}]
    names = [key for key in names if any(not isinstance(row.get(key), list | dict | None) for row in rows)]
    if all(row.get("status") == "timed" for row in rows):
        names = [key for key in names if key not in ("status", "reason")]
    figures = {key for key in names if all(isinstance(row.get(key), int | float | None) for row in rows)}
    lines = [f"| {' | '.join(names)} |", "|" + "".join("---:|" if key in figures else "---|" for key in names)]
    lines += [f"| {' | '.join(_plain(row.get(key)) for key in names)} |" for row in rows]
    return "\n".join(lines) + "\n"


def _plain(value) -> str:
    """A field as it is; what a page would take for a new cell or line is not one."""
    if value is None or isinstance(value, list | dict):
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.5g}" if isinstance(value, float) else str(value).replace("|", "\\|").replace("\n", " ")


def _of_models(rows: list[dict]) -> str:
    """What has no time says why in place of it."""
    lines = [f"| {' | '.join(head for _, head, _ in _COLUMNS)} |", "|---" + "|---:" * (len(_COLUMNS) - 1) + "|"]
    for row in rows:
        cells = [_cell(row.get(name), unit) for name, _, unit in _COLUMNS]
        if row["status"] != "timed":
            cells[6] = f"{row['status']}: {row['reason']}".replace("|", "\\|").replace("\n", " ")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(value, unit: float | None) -> str:
    if value is None:
        return ""
    return str(value) if unit is None else f"{value / unit:.4g}"
