"""Files that the verbs read and write: texts in, JSON lines out, complete or absent."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


class InputError(ValueError):
    """A line of an input file that is not what it should be; the message names file and line."""


def column_of(path: str | os.PathLike[str], column: str | None = None) -> str | None:
    """The column to read: the one asked for, else `text` for a file named as JSON lines, else none."""
    return column or ("text" if str(path).endswith((".jsonl", ".ndjson")) else None)


def read_texts(path: str | os.PathLike[str], column: str | None = None) -> Iterator[str]:
    """Texts of a UTF-8 file (`-` is stdin): one per line, or with `column` that field of each JSON line.

    Raises:
        InputError: naming the file and the line.
    """
    name = "stdin" if path == "-" else str(path)
    # Only \n ends a line: a text may hold any other separator.
    target = 0 if path == "-" else path
    with open(target, encoding="utf-8-sig", newline="\n", closefd=path != "-") as stream:
        number = 0
        while True:
            number += 1
            try:
                line = next(stream)
            except StopIteration:
                return
            except UnicodeDecodeError as error:
                raise InputError(f"{name} must be UTF-8 text, after line {number - 1}: {error.reason}") from None
            if column is None:
                yield line.rstrip("\r\n")
            elif line.strip():
                yield _column_of(line, column, f"{name} line {number}")


def _column_of(line: str, column: str, where: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where} is not JSON: {error.msg} at character {error.pos}") from None
    if not isinstance(record, dict):
        raise InputError(f"{where} must be a JSON object, got {type(record).__name__}")
    if column not in record:
        raise InputError(f"{where} has no column {column!r}; it has {', '.join(map(repr, record)) or 'none'}")
    if not isinstance(record[column], str):
        raise InputError(f"{where}: column {column!r} must be a string, got {type(record[column]).__name__}")
    return record[column]


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well, and goes away when not.

    What a kill leaves behind is named `.NAME.partial-*`, never `NAME`.
    """
    path = Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.partial-", suffix=path.suffix)
    os.close(handle)
    try:
        yield Path(name)
        # mkstemp is private to its owner; a new file follows the umask.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def check_new_folder(path: str | os.PathLike[str], overwrite: bool, name: str = "OUT") -> None:
    """Refuses, before the work and not after it, a folder that must not be written to.

    Raises:
        ValueError: if `path` has no parent, is there already (without `overwrite`), or is no model folder.
    """
    path = Path(path)
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{name} must lie in a folder that exists, {str(path.parent)!r} does not")
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise ValueError(f"{name} must be a folder, {str(path)!r} is something else")
    if not path.exists() or not any(path.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"{name} {str(path)!r} is there already: give --overwrite to replace it")
    if not (path / "config.json").is_file():
        # A wrong word behind --overwrite must not cost a home folder.
        raise ValueError(f"{name} {str(path)!r} has no config.json: only model folders are replaced")
