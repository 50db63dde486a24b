"""What the verbs share: the two kinds of failure, how messages are spelled, and how results are printed."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

# Newer typers carry their own copy of click: its classes are found through the one that typer always exports.
CLICK_ERRORS = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")
Abort = typer.Abort

#: Options that every verb has.
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout, and nothing else there.")]
Dtype = Annotated[
    str, typer.Option("--dtype", help="Float type of all that is not packed: auto, float32, float16 or bfloat16.")
]
Device = Annotated[str, typer.Option("--device", help="auto (a GPU where there is one), cpu, cuda or cuda:N.")]
#: Options of the verbs of `bench`.
Out = Annotated[str | None, typer.Option("--out", help="File for the JSON record.")]
Table = Annotated[str | None, typer.Option("--table", help="File for the rows, .csv or .md.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")]


class WrongUsage(Exception):
    """The caller can put it right: exit code 2."""


class Failed(Exception):
    """It was asked for rightly and did not work: exit code 1, the message alone."""


@contextlib.contextmanager
def checking_input() -> Iterator[None]:
    """What the library refuses in this block is wrong usage: its ValueErrors say what it wants."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise WrongUsage(str(error)) from error


def check_new_file(flag: str, path: str | None, overwrite: bool) -> None:
    """A file that is to be written must not be there, and its folder must."""
    if path is None:
        return
    if not Path(path).parent.is_dir():
        raise WrongUsage(f"{flag} must lie in a folder that exists, {str(Path(path).parent)!r} does not")
    if Path(path).is_dir():
        raise WrongUsage(f"{flag} must be a file, {path!r} is a folder")
    if Path(path).exists() and not overwrite:
        raise WrongUsage(f"{flag} {path!r} is there already: give --overwrite to replace it")


def check_record(out: str | None, resume: bool, overwrite: bool) -> None:
    """`check_new_file` for the `--out` of a verb that can go on with what is there."""
    if out is not None and Path(out).is_file() and not (resume or overwrite):
        raise WrongUsage(f"--out {out!r} is there already: give --resume to go on with it, --overwrite to replace it")
    check_new_file("--out", out, overwrite or resume)


def check_table(path: str | None, overwrite: bool) -> None:
    """`check_new_file` for the `--table` of a verb of `bench`, and its ending."""
    if path is not None:
        from dqkernels.bench import tables

        with checking_input():
            tables.check_name(path)
    check_new_file("--table", path, overwrite)


def wrote(result: dict, out: str | None, table: str | None) -> None:
    """Writes the rows into `--table`, and says which files there are: the library has written the record."""
    if out is not None:
        say(f"wrote {out}")
    if table is not None:
        from dqkernels.bench import tables

        tables.write_table(result, table)
        say(f"wrote {table}")


def numbers(flag: str, text: str, separator: str, count: int, form: str | None = None) -> tuple[int, ...]:
    """`1x768x768` as numbers above 0; `form` is how the help spells it."""
    parts = text.strip().split(separator)
    if len(parts) != count or not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        form = form or separator.join("N" * count)
        raise WrongUsage(f"{flag} must be {form} with numbers above 0, comma-separated, got {text!r}")
    return tuple(map(int, parts))


def sizes(flag: str, text: str, tokens: bool = False) -> list[tuple[int, ...]]:
    """`768x768,llama-7b-linear` as (out, in) pairs; with `tokens`, `1x768x768,16xllama-7b-linear` as triples, and a
    preset that comes without tokens as pairs."""
    from dqkernels.bench.shapes import PRESETS

    found: list[tuple[int, ...]] = []
    form = f"{'NxNxN' if tokens else 'NxN'} (or {', '.join(PRESETS)})"
    for part in text.split(","):
        head, _, name = part.strip().rpartition("x")
        if part.strip() in PRESETS:
            found += PRESETS[part.strip()]
        elif tokens and name in PRESETS and head.isascii() and head.isdigit() and int(head) > 0:
            found += [(int(head), *pair) for pair in PRESETS[name]]
        else:
            found.append(numbers(flag, part, "x", 3 if tokens else 2, form))
    return found


def choices(flag: str, text: str, allowed: tuple[int, ...]) -> tuple[int, ...]:
    """`8,4` as numbers out of `allowed`."""
    parts = tuple(part.strip() for part in text.split(","))
    if bad := [part for part in parts if part not in map(str, allowed)]:
        names = sorted(allowed)
        words = f"{', '.join(map(str, names[:-1]))} or {names[-1]}"
        raise WrongUsage(f"{flag} must be {words}, comma-separated, got {bad[0]!r}")
    return tuple(map(int, parts))


def spelled_as_flags(message: str, command) -> str:
    """`weight_bits must be ...` as the command line spells it: `--weight_bits must be ...`."""
    flags = set()
    todo = [command]
    while todo:
        one = todo.pop()
        todo += getattr(one, "commands", {}).values()
        names = (name for p in one.params for name in [*p.opts, *p.secondary_opts])
        flags.update(name for name in names if name.startswith("--"))

    def flag(match: re.Match[str]) -> str:
        return ("--" if "--" + match[1] in flags else "") + match[1]

    # A name with an underscore is no English word; one without is a name where it opens the sentence.
    message = re.sub(r"^([a-z]+)(?= must )", flag, message)
    return re.sub(r"(?<![\w/.-])([a-z]+(?:_[a-z]+)+)\b", flag, message)


def say(*lines: str) -> None:
    """A line for people, on stderr: stdout belongs to results."""
    print(*lines, sep="\n", file=sys.stderr, flush=True)


def print_json(result: Any) -> None:
    """The machine's copy of a result, on stdout."""
    print(json.dumps(result, indent=1, ensure_ascii=False))


class _Stderr(logging.StreamHandler):
    """Writes to what sys.stderr is at the time."""

    stream = property(lambda self: sys.stderr)

    def __init__(self):
        logging.Handler.__init__(self)


def show_log(warnings_only: bool = False) -> None:
    """Lines of the library's logger on stderr, for verbs that work for long."""
    logger = logging.getLogger("dqkernels")
    if not logger.handlers:
        handler = _Stderr()
        handler.setFormatter(logging.Formatter("dqkernels: %(message)s"))
        logger.addHandler(handler)
        # A library that gives the root logger a handler later on would say each line twice.
        logger.propagate = logging.getLogger().hasHandlers()
    logger.setLevel(logging.WARNING if warnings_only else logging.INFO)


def quiet_transformers() -> None:
    """Turns off the loading bars of transformers; its warnings stay."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def console(stderr: bool = False):
    """A rich console: no colour and no cursor movement where its stream is no terminal."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False)


def plain(found: Any) -> Any:
    """A result as JSON takes it."""
    return found.to_dict() if hasattr(found, "to_dict") else found


def show(found: Any, json_output: bool) -> None:
    """A result as JSON, or as it prints itself."""
    if json_output:
        print_json(plain(found))
    else:
        print(found)
