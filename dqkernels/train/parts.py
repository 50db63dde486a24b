"""What a long run has written so far: shards of whole lines that only grow, and the one file made of them.

A folder `OUT.parts/` holds `run.json` (what decides the outputs) and one `NNNNN.jsonl` per process, whose lines are
`{"index": number of the source, "records": [...]}`. A line that a kill cut short counts as not written.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import numpy as np

FORMATS = (".jsonl", ".parquet")
_ROWS = 10_000  # records of a parquet row group
NO_SHARD = -1


def check(folder: Path, identity: dict[str, Any]) -> None:
    """Refuses parts that another teacher, other texts or other settings left behind."""
    path = folder / "run.json"
    if not path.is_file():
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        before = {}
    for name in dict.fromkeys([*identity, *before]):
        if before.get(name) != identity.get(name):
            was, now = before.get(name), identity.get(name)
            short = "" if isinstance(now, dict) or name in ("texts", "model") else f": {was!r}, now {now!r}"
            raise ValueError(
                f"output_file has parts of a run with another {name}{short} in {str(folder)!r}: give what that run "
                "was given, or another output_file, or no_resume to start over"
            )


def start(folder: Path, identity: dict[str, Any], resume: bool) -> None:
    """Makes the folder, or keeps one that `check` accepted if `resume`."""
    path = folder / "run.json"
    if folder.exists() and (not resume or not path.is_file()):
        ours = folder.is_dir() and (
            path.is_file() or all(file.name.startswith("run.json") for file in folder.iterdir())
        )
        if not ours:
            raise ValueError(f"output_file keeps its parts in {str(folder)!r}, and something else is there")
        for lock in folder.glob("*.lock"):
            _acquire(lock).release()
        shutil.rmtree(folder)
    folder.mkdir(exist_ok=True)
    if not path.is_file():
        partial = folder / "run.json.partial"
        partial.write_text(json.dumps(identity, indent=1), encoding="utf-8")
        os.replace(partial, path)


@contextlib.contextmanager
def shard_of_process(folder: Path, index: int) -> Iterator[Any]:
    """The shard of a process, open behind its last whole line."""
    lock = _acquire(folder / f"{index:05d}.lock")
    try:
        path = folder / f"{index:05d}.jsonl"
        path.touch()
        with open(path, "r+b") as shard:
            shard.truncate(_whole(shard))
            shard.seek(0, os.SEEK_END)
            yield shard
    finally:
        lock.release()


def _acquire(path: Path) -> filelock.BaseFileLock:
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise ValueError(f"output_file is being written by another run: {str(path)!r} is locked") from None
    return lock


def _whole(shard) -> int:
    """Length of a file up to its last line end."""
    end = shard.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - (1 << 16))
        shard.seek(start)
        cut = shard.read(end - start).rfind(b"\n")
        if cut >= 0:
            return start + cut + 1
        end = start
    return 0


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("[0-9]*.jsonl"))


def find(folder: Path, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Shard number (-1: none) and offset of the line of every source."""
    shard_of, offset_of = np.full(count, NO_SHARD, np.int64), np.zeros(count, np.int64)
    for number, path in enumerate(_shards(folder)):
        with open(path, "rb") as shard:
            offset = 0
            for line in shard:
                index = _index(line)
                if index is not None and shard_of[index] == NO_SHARD:
                    shard_of[index], offset_of[index] = number, offset
                offset += len(line)
    return shard_of, offset_of


def _index(line: bytes) -> int | None:
    """Of a whole line, the number of its source; None for a torn one."""
    if not line.endswith(b"\n"):
        return None
    try:
        return int(json.loads(line)["index"])
    except (ValueError, TypeError, KeyError):
        return None


def merge(folder: Path, output: Path, count: int, order: list[int]) -> tuple[int, int]:
    """Writes the final file in the order of the sources; numbers of records and of sources without one."""
    shard_of, offset_of = find(folder, count)
    if missing := int((shard_of[order] == NO_SHARD).sum()):
        raise RuntimeError(f"{missing} sources have no outputs in {str(folder)!r}: did a process end early?")
    found = {"records": 0, "sources": 0}

    def records() -> Iterator[dict[str, Any]]:
        with contextlib.ExitStack() as stack:
            shards = [stack.enter_context(open(path, "rb")) for path in _shards(folder)]
            for number in range(count):
                if shard_of[number] == NO_SHARD:
                    continue  # a blank source
                shard = shards[shard_of[number]]
                shard.seek(offset_of[number])
                here = json.loads(shard.readline())["records"]
                found["records"] += len(here)
                found["sources"] += bool(here)
                yield from here

    partial = folder / f"final{output.suffix}"
    (_write_parquet if output.suffix == ".parquet" else _write_jsonl)(partial, records())
    if not found["records"]:
        raise RuntimeError(f"no record is left of {count} sources: every output is empty or was filtered out")
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, output)
    return found["records"], count - found["sources"]


def _write_jsonl(path: Path, records: Iterator[dict[str, Any]]) -> None:
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def need_pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("parquet needs the package pyarrow: pip install 'dqkernels[train]'") from error
    return pyarrow


def _write_parquet(path: Path, records: Iterator[dict[str, Any]]) -> None:
    pyarrow = need_pyarrow()
    text_type = pyarrow.string()
    types = {"source": text_type, "target": text_type, "reference": text_type}
    schema = pyarrow.schema({**types, "score": pyarrow.float64(), "rank": pyarrow.int32()})
    rows: list[dict[str, Any]] = []
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        for record in records:
            rows.append(record)
            if len(rows) == _ROWS:
                writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema))
                rows = []
        if rows:
            writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema))
