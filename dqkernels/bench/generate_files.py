"""The rows of a generate record for other programs and for pages: CSV and Markdown. No measuring here."""

from __future__ import annotations

import csv
import io
from pathlib import Path

#: Columns of the Markdown table: the field, its heading, and what a value is divided by.
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
    """Every row into a file: `.csv` has all fields, `.md` those of the printed tables.

    Raises:
        ValueError: for another ending.
    """
    check_name(path)
    made = _csv(result["rows"]) if Path(path).suffix == ".csv" else _markdown(result["rows"])
    Path(path).write_text(made, encoding="utf-8")


def _csv(rows: list[dict]) -> str:
    """Fields in the order in which they first occur; what a row lacks, or has as null, is empty."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def _markdown(rows: list[dict]) -> str:
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
