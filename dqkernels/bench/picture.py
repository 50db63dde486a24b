"""What a picture shows, before anything is drawn: panels of series, in plain numbers. No matplotlib here.

A `Picture` is made of a record alone (`picture_layers`, `picture_models`, `picture_scores`) and drawn by
`picture_draw`. Its `digest` goes into the file that is drawn, so that a test can tell whether a committed image is that
of the committed record.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from dqkernels.bench.record import RecordError

#: Part of every digest: raised when the same numbers are drawn in another way.
DRAWING = 1
#: Nothing that is measured here is larger; a record is untrusted, and an axis has to hold its figures.
_LARGEST = 1e18
#: As `above`: 0 and more.
NOT_NEGATIVE = -5e-324
#: Peers by the word in their names that says whose they are; the rest of what is no `dqkernels` is torch's.
_PEERS = ("ctranslate2", "bitsandbytes", "gemlite", "humming", "bitblas", "torchao", "onnx")


@dataclass(frozen=True)
class Series:
    """Points of one kind: all measured, or all computed, never both.

    Attributes:
        label: as the legend has it; "" for none.
        family: what its colour stands for, see `family_of`.
        points: (x, y); of bars (name, length).
        low, high: ends of the whiskers, one per point, or empty.
        notes: a text beside each point or bar, or empty.
        measured: False for floors, projections and other arithmetic.
        lines: points are connected.
        variant: which stroke, among series of one family.
    """

    label: str
    family: str
    points: tuple[tuple[Any, float], ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    notes: tuple[str, ...] = ()
    measured: bool = True
    lines: bool = True
    variant: int = 0


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        kind: `lines` (points over numbers), `bars` (lengths beside names, top down) or `heat` (shares in cells).
        title: a line above, or "".
        x_label, y_label: with units.
        series: of lines and bars.
        x_ticks: (place, text) where these are not the numbers themselves.
        x_log, y_log: logarithmic.
        levels: (text, y) of dashed horizontal lines.
        rows, columns, cells: of a heat map; a cell without a figure is None.
    """

    kind: str
    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...] = ()
    x_ticks: tuple[tuple[float, str], ...] = ()
    x_log: bool = False
    y_log: bool = False
    levels: tuple[tuple[str, float], ...] = ()
    rows: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    cells: tuple[tuple[float | None, ...], ...] = ()


@dataclass(frozen=True)
class Picture:
    """A file.

    Attributes:
        name: what the file's name has behind the record's.
        title: above all panels.
        panels: in reading order.
        across: panels side by side.
        caption: sentences below: what was measured, how often, where.
        alt: one sentence for who cannot see it.
    """

    name: str
    title: str
    panels: tuple[Panel, ...]
    across: int
    caption: tuple[str, ...]
    alt: str

    def digest(self) -> str:
        """SHA-256 of everything that is drawn."""
        plain = json.dumps([DRAWING, dataclasses.asdict(self)], sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(plain.encode()).hexdigest()


# ------------------------------------------------------------------------------------------------- untrusted rows


class Row:
    """A row of a record, read by keys that name themselves when they are missing or hold something else."""

    def __init__(self, data: Any, where: str):
        if not isinstance(data, dict):
            raise RecordError(f"{where} must be an object, got {type(data).__name__}")
        self.data, self.where = data, where

    def __contains__(self, key: str) -> bool:
        return self.data.get(key) is not None

    def number(self, key: str, above: float = -math.inf) -> float:
        """A finite number above `above`.

        Raises:
            RecordError: naming the row and the key.
        """
        value = self._needed(key)
        if not _is_number(value) or not above < value < _LARGEST:
            limit = {-math.inf: "", NOT_NEGATIVE: " not below 0"}.get(above, f" above {above:g}")
            raise RecordError(f"{self.where}.{key} must be a finite number{limit}, got {_shown(value)}")
        return value

    def numbers(self, *keys: str, above: float = -math.inf) -> tuple[float, ...]:
        return tuple(self.number(key, above) for key in keys)

    def maybe(self, key: str, above: float = -math.inf) -> float | None:
        """As `number`; None where the row has nothing."""
        return self.number(key, above) if key in self else None

    def text(self, key: str) -> str:
        """A string.

        Raises:
            RecordError: naming the row and the key.
        """
        value = self._needed(key)
        if not isinstance(value, str):
            raise RecordError(f"{self.where}.{key} must be a string, got {_shown(value)}")
        return value

    def words(self, key: str) -> str:
        """A string or a whole number, as text."""
        value = self._needed(key)
        return str(value) if _is_number(value) and value == int(value) else self.text(key)

    def sub(self, key: str) -> Row:
        """An object inside the row."""
        return Row(self._needed(key), f"{self.where}.{key}")

    def _needed(self, key: str) -> Any:
        if self.data.get(key) is None:
            raise RecordError(f"{self.where} has no {key!r}")
        return self.data[key]


def _is_number(value: Any) -> bool:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and (isinstance(value, int) or math.isfinite(value))
    )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def rows_of(found: Any, key: str = "rows") -> list[Row]:
    """The rows of a record, each with its place.

    Raises:
        RecordError: if they are no list of objects.
    """
    if not isinstance(found.get(key), list):
        raise RecordError(f"{key} must be a list, got {_shown(found.get(key))}")
    return [Row(row, f"{key}[{index}]") for index, row in enumerate(found[key])]


def timed(rows: Iterable[Row]) -> list[Row]:
    """Those with figures, measured or projected."""
    return [row for row in rows if row.data.get("status") in ("timed", "projected")]


def spread(row: Row, middle: str, low: str, high: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Ends of the whiskers of one bar; none where there was one sample, or nobody says.

    Raises:
        RecordError: if they do not stand around the middle.
    """
    if low not in row or high not in row or row.maybe("samples") == 1:
        return (), ()
    least, value, most = row.numbers(low, middle, high, above=0)
    if not least <= value <= most:
        raise RecordError(f"{row.where}: {low}, {middle} and {high} must rise, got {least:g}, {value:g}, {most:g}")
    return (least,), (most,)


def measured(row: Row) -> bool:
    """False for a row that stands for arithmetic: a card that nobody has run."""
    return row.data.get("status") != "projected"


# ------------------------------------------------------------------------------------------------------- words


def family_of(candidate: str, bits: Any = None) -> str:
    """What the colour of a candidate stands for: `ours 8`, `ours 4`, `ours 2`, `float`, `torch int8`, or a peer."""
    name = candidate.lower()
    for peer in _PEERS:
        if peer in name:
            return peer
    if name.startswith("dqkernels"):
        return f"ours {bits}" if bits in (8, 4, 2) else "ours"
    return "torch int8" if "int8" in name or "int_mm" in name else "float"


def without_maker(candidate: str) -> str:
    """`dqkernels 4-4-8` is `ours 4-4-8` in a legend, where it stands beside others."""
    return "ours" + candidate[len("dqkernels") :] if candidate.startswith("dqkernels") else candidate


def listed(words: Sequence[str], most: int = 8) -> str:
    """`a, b, c and 4 more`."""
    words = list(dict.fromkeys(words))
    return ", ".join(words) if len(words) <= most else f"{', '.join(words[:most])} and {len(words) - most} more"


def counts(samples: Iterable[float | None]) -> str:
    """`n = 5`, `n = 1 to 5`, or nothing."""
    known = sorted({int(count) for count in samples if count is not None})
    if not known:
        return ""
    return f"n = {known[0]}" if len(known) == 1 else f"n = {known[0]} to {known[-1]}"


def short(value: float) -> str:
    """Three figures and no exponent: `0.123`, `12.0`, `12,345`."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:#.3g}"


def megabytes(count: float) -> str:
    """`31.3 MB`."""
    return f"{count / 1e6:,.1f} MB" if count < 1e9 else f"{count / 1e6:,.0f} MB"
