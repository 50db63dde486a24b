"""What moved between two records of one benchmark, beyond its noise: `dqkernels bench compare before.json after.json`.

Two runs do not take turns, so their times differ by whatever the machine did in between. Within a run the candidates do
take turns. What is compared is therefore a candidate's time over that of a yardstick in the same group of the same
run, torch's own layer or model unless another is named; where a group has none, the bare times, and the result says so.
A yardstick's own time is told and never a loss: it is what the machine did.

The noise of a ratio is that of its medians. One sample's spread is taken from p20 and p80 as of a normal distribution;
a median of n has 1.25 of it over the root of n, and 5/n of that on top, since few samples say little of their spread. A
row has moved when its ratio is off 1 by more than a normal one would be in one comparison of a thousand, all its rows
together (Bonferroni), and by more than `FLOOR`: runs differ by more than their samples say.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from dqkernels.bench import record

#: What a repeated run differs by without a reason, whatever its samples say.
FLOOR = 0.03
#: Chance that a comparison of two equal runs names a row at all.
CHANCE = 0.001
#: Losses up to here are told, and are no failure.
THRESHOLD = 0.05

#: A peak of memory that moved by less has not.
_PEAK_MOOD_MB = 2
#: Keys of a median, and what is before the unit of its percentiles.
_TIMES = {"median_us": "us", "median_ms": "ms", "latency_ms_per_token": "ms_per_token"}
_BYTES = ("weights_bytes", "file_bytes", "memory_bytes", "activation_bytes", "cache_bytes", "peak_bytes", "peak_mb")
#: Found out by a run, or said of a candidate: no part of what was asked.
_OUTCOME = {"status", "reason", "timer", "samples", "kernel", "backend", "floor_bound", "step_goal_met", "goal_met"}
_OF_CANDIDATE = {
    "candidate", "family", "bits", "group_size", "weight_bits", "embedding_bits", "weight_scales", "foreign", "dtype",
    "loop", "peer", "version",
}  # fmt: skip
#: One sample's deviation, from p80 - p20 of a normal distribution; a median's, from that of a mean.
_BETWEEN = 2 * statistics.NormalDist().inv_cdf(0.8)
_OF_MEDIAN = math.sqrt(math.pi / 2)

Key = tuple[tuple[str, Any], ...]


class CompareError(ValueError):
    """Two records that cannot be compared; the message says what each is."""


class _Time(NamedTuple):
    """Of a row: its median, the relative standard error of that (None without its percentiles), and the unit."""

    median: float
    error: float | None
    unit: str


def compare(before: dict, after: dict, *, against: str | None = None, threshold: float = THRESHOLD) -> dict:
    """What moved from one record to the other.

    Args:
        before, after: records of one kind, as `record.read` gives them.
        against: the candidate that is the yardstick; default: the first of a group whose name begins with `torch`.
        threshold: a row that became slower, or larger, by more than this share is a loss.

    Returns:
        A dict for JSON: `rows` (what was compared, with `ratio`, below 1 where it became slower or larger,
        `noise_ratio` and `verdict`: same, faster, slower, smaller, larger, lost), `losses` (how many are past the
        threshold), `warnings`, `only_before`, `only_after` and `not_timed` (labels).

    Raises:
        CompareError: for records of two kinds, without a row in common, or without the yardstick asked for.
    """
    if before["kind"] != after["kind"]:
        raise CompareError(f"records of one kind can be compared, got {before['kind']!r} and {after['kind']!r}")
    if before["kind"] == "projected":
        raise CompareError("a projection has no measured row: there is nothing to compare")
    if not 0 < threshold < 1:
        raise CompareError(f"threshold must be a share between 0 and 1, got {threshold:g}")
    first, second = _by_key(before["rows"], "the first"), _by_key(after["rows"], "the second")
    common = [key for key in first if key in second]
    if not common:
        raise CompareError(
            f"no row is in both records ({len(first)} and {len(second)} rows): they were asked for other sizes, widths "
            "or candidates"
        )
    names = {dict(key).get("candidate") for key in common}
    if against is not None and against not in names:
        raise CompareError(f"against must be a candidate of both records, got {against!r}: {sorted(map(str, names))}")
    varying = _varying([*first, *second])
    sides = tuple(_Side(rows, common, against) for rows in (first, second))
    rows, not_timed = [], []
    for key in common:
        found = _compared(key, *sides)
        rows += [{"label": _label(key, varying), **row} for row in found]
        if not found:
            not_timed.append(_label(key, varying))
    timed = sum(row["what"] == "time" and row["verdict"] is None for row in rows)
    limit = statistics.NormalDist().inv_cdf(1 - CHANCE / (2 * max(timed, 1)))
    for row in rows:
        _judge(row, limit, threshold)
    return {
        "kind": before["kind"],
        "threshold_fraction": threshold,
        "rows": rows,
        "losses": sum(row["is_loss"] for row in rows),
        "warnings": [*_warnings(before, after, rows), *_unseen(rows, threshold)],
        "only_before": [_label(key, varying) for key in first if key not in second],
        "only_after": [_label(key, varying) for key in second if key not in first],
        "not_timed": not_timed,
    }


def read_and_compare(before: str | os.PathLike, after: str | os.PathLike, **options) -> dict:
    """`compare` of two files.

    Raises:
        CompareError: as `compare`, and for a file that is not there.
        record.RecordError: for a file that is no record.
        OSError: for one that cannot be read.
    """
    for name, path in (("before", before), ("after", after)):
        if not Path(path).is_file():
            what = "is a folder" if Path(path).is_dir() else "is not there"
            raise CompareError(f"{name} must be a record of dqkernels bench, {os.fspath(path)!r} {what}")
    return compare(record.read(before), record.read(after), **options)


class _Side:
    """One record: its rows by key, and the yardstick of each group."""

    def __init__(self, rows: dict[Key, dict], common: Iterable[Key], against: str | None):
        self.rows, self.yardsticks = rows, {}
        for key in common:
            name = str(rows[key].get("candidate", ""))
            wanted = name == against if against is not None else name.startswith("torch")
            if wanted and _time(rows[key]) is not None:
                self.yardsticks.setdefault(_group(key), key)


def _compared(key: Key, before: _Side, after: _Side) -> list[dict]:
    """The comparisons of one row, not judged yet: of its time, and of every number of bytes that both have."""
    old, new = before.rows[key], after.rows[key]
    found = []
    times = _time(old), _time(new)
    if None not in times:
        found.append(_timed(key, times, before, after))
    elif times[0] is not None and new.get("status") not in (None, "timed", "not reached", "not run"):
        reason = new.get("reason") or "no reason given"
        found.append({**_blank("time"), "verdict": "lost", "reason": f"{new['status']}: {reason}"})
    for name in _BYTES:
        if old.get(name) and new.get(name):
            sizes = {"before": old[name], "after": new[name], "ratio": old[name] / new[name]}
            found.append({**_blank(name, name.rpartition("_")[2]), **sizes})
    return found


def _timed(key: Key, times: tuple[_Time, _Time], before: _Side, after: _Side) -> dict:
    """The comparison of one row's times, over those of its group's yardstick where both runs have the same one."""
    ratio = times[0].median / times[1].median
    parts, yardstick = list(times), before.yardsticks.get(_group(key))
    if yardstick is not None and yardstick == after.yardsticks.get(_group(key)):
        if yardstick == key:
            return {
                **_blank("yardstick", times[0].unit),
                "before": times[0].median,
                "after": times[1].median,
                "ratio": ratio,
            }
        theirs = _time(before.rows[yardstick]), _time(after.rows[yardstick])
        ratio *= theirs[1].median / theirs[0].median
        parts += theirs
    else:
        yardstick = None
    errors = [part.error for part in parts]
    error = None if None in errors else math.sqrt(sum(error**2 for error in errors))
    name = None if yardstick is None else dict(yardstick)["candidate"]
    return {
        **_blank("time", times[0].unit), "before": times[0].median, "after": times[1].median, "ratio": ratio,
        "error": error, "against": name,
    }  # fmt: skip


def _blank(what: str, unit: str | None = None) -> dict:
    return {
        "unit": unit,
        "what": what, "before": None, "after": None, "ratio": None, "error": None, "against": None, "verdict": None,
        "reason": None,
    }  # fmt: skip


def _judge(row: dict, limit: float, threshold: float) -> None:
    """Gives a row its verdict, in place."""
    error = row.pop("error")
    if row["verdict"] == "lost":
        row.update(noise_ratio=None, is_loss=True)
        return
    timed = row["what"] in ("time", "yardstick")
    # Bytes are counted, not measured; but an allocator has its moods. Without percentiles nobody knows: a tenth.
    peak = row["what"].startswith("peak")
    noise = (0.1 if error is None else max(FLOOR, limit * error)) if timed else FLOOR * peak
    moved = abs(math.log(row["ratio"])) > math.log1p(noise)
    if peak and abs(row["after"] - row["before"]) < _PEAK_MOOD_MB * (1 if row["unit"] == "mb" else 1e6):
        moved = False
    words = ("slower", "faster") if timed else ("larger", "smaller")
    row["verdict"] = words[row["ratio"] > 1] if moved else "same"
    row["noise_ratio"] = round(noise, 4)
    row["is_loss"] = moved and 1 / row["ratio"] > 1 + threshold and row["what"] != "yardstick"
    row["ratio"] = float(f"{row['ratio']:.4g}")


def _warnings(before: dict, after: dict, rows: list[dict]) -> Iterable[str]:
    """What a reader has to know before believing a row."""
    for key in ("gpu", "cpu_model", "threads", "torch", "triton"):
        old, new = (each["environment"].get(key) for each in (before, after))
        if old != new:
            yield f"{key} differs: {old} before, {new} after"
    bare = sum(row["what"] == "time" and row["ratio"] is not None and row["against"] is None for row in rows)
    if bare:
        yield f"{bare} times stand for themselves: nothing in both runs was timed beside them as a yardstick"
    drift = [row["ratio"] for row in rows if row["what"] == "yardstick"]
    if drift and not 0.9 < statistics.median(drift) < 1.1:
        yield f"the machine changed: the yardsticks' own times went by a factor of {1 / statistics.median(drift):.2f}"


def _unseen(rows: list[dict], threshold: float) -> Iterable[str]:
    """How many rows could have lost more than the threshold without being named."""
    noises = [row["noise_ratio"] for row in rows if row["what"] == "time" and row["noise_ratio"] is not None]
    if blind := sum(noise > threshold for noise in noises):
        yield (
            f"{blind} of {len(noises)} times have more noise (up to {max(noises):.0%}) than the threshold of "
            f"{threshold:.0%}: a loss of that size would not be seen in them; measure longer, on an idle machine"
        )


def _time(row: dict) -> _Time | None:
    """The time of a row that was timed."""
    for name, unit in _TIMES.items():
        median = row.get(name)
        if row.get("status", "timed") == "timed" and median:
            low, high, n = row.get(f"p20_{unit}"), row.get(f"p80_{unit}"), row.get("samples")
            if low is None or high is None or not n:
                return _Time(median, None, unit)
            error = _OF_MEDIAN * (high - low) / _BETWEEN / median / math.sqrt(n) * (1 + 5 / n)
            return _Time(median, error, unit)
    return None


def _by_key(rows: list[dict], which: str) -> dict[Key, dict]:
    found: dict[Key, dict] = {}
    for row in rows:
        # The sizes of an op of `bench kernels` are a list.
        asked = {k: "x".join(map(str, v)) if isinstance(v, list) and k == "shape" else v for k, v in row.items()}
        key = tuple((k, v) for k, v in sorted(asked.items()) if _asks(k, v))
        if key in found:
            raise CompareError(
                f"{which} record has two rows of {_label(key, set(dict(key)))}: nobody knows which to take"
            )
        found[key] = row
    return found


def _asks(key: str, value: Any) -> bool:
    """Whether a field says what was asked for, not what was found."""
    return not record.UNIT.search(key) and key not in _OUTCOME and isinstance(value, str | int | bool)


def _group(key: Key) -> Key:
    return tuple((k, v) for k, v in key if k not in _OF_CANDIDATE)


def _varying(keys: Iterable[Key]) -> set[str]:
    """The fields that are needed to tell rows apart."""
    seen: dict[str, set] = {}
    for key in keys:
        for name, value in key:
            seen.setdefault(name, set()).add(value)
    return {name for name, values in seen.items() if len(values) > 1} | {"candidate"}


def _label(key: Key, varying: set[str]) -> str:
    """`1x1024x1024 cold, dqkernels W4 triton`: sizes first, then the candidate."""
    fields = dict(key)
    name = str(fields.pop("candidate", ""))
    sizes = [fields.pop(each, None) for each in ("tokens", "out_features", "in_features")]
    words = ["x".join(map(str, sizes))] if None not in sizes else []
    if None in sizes:
        fields |= {k: v for k, v in key if k in ("tokens", "out_features", "in_features")}
    # A candidate's name says its bits.
    rest = {
        k: v for k, v in fields.items() if k in varying and not (name and k in _OF_CANDIDATE - {"dtype", "group_size"})
    }
    words += [v if isinstance(v, str) else f"{k}={v}" for k, v in rest.items()]
    return ", ".join(filter(None, [" ".join(words), name]))


def render(result: dict, everything: bool = False):
    """What moved (every row, if asked) as a rich table, and a summary below it."""
    from rich import box
    from rich.console import Group
    from rich.table import Table

    words = "\n".join(_words(result))
    shown = [row for row in result["rows"] if everything or row["verdict"] != "same"]
    if not shown:
        return words
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=f"{result['kind']}: what moved", title_justify="left")
    table.add_column("row", overflow="fold")
    for name in ("before", "after", "x", "noise", "verdict"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in sorted(shown, key=lambda row: (not row["is_loss"], row["ratio"] or 0)):
        label = row["label"] + ("" if row["what"] == "time" else f": {row['what']}")
        verdict = row["verdict"] + (" !" if row["is_loss"] else "")
        if row["ratio"] is None:
            table.add_row(f"{label} ({row['reason']})", "", "", "", "", verdict)
            continue
        cells = [*_figures(row), f"{row['ratio']:.3f}", f"{row['noise_ratio']:.0%}"]
        table.add_row(label, *cells, verdict)
    return Group(table, words)


def _figures(row: dict) -> list[str]:
    """Both figures with their unit; bytes as MB of 10^6."""
    unit, scale = (row["unit"], 1) if row["unit"] != "bytes" else ("MB", 1e6)
    words = {"us": "us", "ms": "ms", "ms_per_token": "ms/tok", "mb": "MB", "MB": "MB"}[unit]
    return [f"{row[key] / scale:.4g} {words}" for key in ("before", "after")]


def _words(result: dict) -> list[str]:
    """The summary, a sentence a line."""
    rows = result["rows"]
    counts = {word: sum(row["verdict"] == word for row in rows) for word in
              ("slower", "larger", "lost", "faster", "smaller", "same")}  # fmt: skip
    told = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
    words = [f"{len(rows)} figures: {told or 'none'}. {result['losses']} past the threshold of "
             f"{result['threshold_fraction']:.0%} (!)."]  # fmt: skip
    yardsticks = sorted({row["against"] for row in rows if row["against"]})
    if yardsticks:
        words.append(f"x: old time over new, each over {' or '.join(yardsticks)} of its own run.")
    for name, what in (("not_timed", "timed in neither or not reached"), ("only_before", "in the first record alone"),
                       ("only_after", "in the second record alone")):  # fmt: skip
        if result[name]:
            few = "; ".join(result[name][:3]) + ("; ..." if len(result[name]) > 3 else "")
            words.append(f"{len(result[name])} {what}: {few}")
    return words + [f"warning: {warning}" for warning in result["warnings"]]
