"""`dqkernels plot`: the pictures of records, redrawn from the files alone. Reading and writing; no measuring, no torch.

Records are untrusted: what they lack or hold wrongly is named by file, row and key, and nothing is written then.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dqkernels.bench import picture_draw, picture_layers, picture_models, picture_scores, record
from dqkernels.bench.picture import Picture, Row
from dqkernels.bench.record import RecordError
from dqkernels.bench.words import BUSY, machine_words, slowed_by

#: Kinds of records that have pictures, and what they show. `demo` and `dq_docstrings` are files without a `kind`.
KINDS: dict[str, tuple[Callable[[dict, str], list[Picture]], str]] = {
    "linear": (picture_layers.of_layers, "time by tokens, bytes, share of the floor"),
    "gemm": (picture_layers.of_layers, "time by tokens with the floor, bytes, share of the floor"),
    "kernels": (picture_layers.of_kernels, "share of the floor of each op"),
    "generate": (picture_models.of_generate, "ms per token, tokens a second, memory"),
    "model": (picture_models.of_generate, "ms per token"),
    "size": (picture_models.of_size, "file sizes"),
    "training": (picture_models.of_training, "time and activations of a step"),
    "quality": (picture_scores.of_quality, "score by bits, against ratio where it is known"),
    "demo": (picture_scores.of_demo, "score against ratio, file sizes"),
    "dq_docstrings": (picture_scores.of_docstrings, "score against ratio"),
}
STYLES = tuple(picture_draw.STYLES)
FORMATS = picture_draw.FORMATS
#: Larger files are none of this project's records.
_LARGEST_BYTES = 64 << 20


class PlotError(ValueError):
    """A record that cannot be drawn, or a place that cannot be written to; the message names the file."""


@dataclass(frozen=True)
class Loaded:
    """A record that was read and checked.

    Attributes:
        name: its file's name without the ending: what files that are made of it begin with.
        file: its file's name.
        kind: of `KINDS`, or another one of record.schema.json.
        data: what the file holds.
        environment: of the machine; of `dq_docstrings`, that of the first run.
    """

    name: str
    file: str
    kind: str
    data: dict
    environment: dict

    @property
    def machine(self) -> str:
        """`NVIDIA H200`, `AMD EPYC, 2 threads`."""
        try:
            return machine_words(self.environment)
        except (KeyError, TypeError):
            return "an unnamed machine"

    @property
    def footer(self) -> str:
        """The line below every picture: file, machine, date, commit, and a warning where the machine was busy."""
        found = self.environment
        date = str(self.data.get("created_utc", ""))[:10]
        parts = [
            f"{self.file}: {self.machine}",
            date,
            f"torch {found.get('torch')}",
            f"dqkernels {found.get('dqkernels')}",
        ]
        commit = found.get("git_commit")
        if isinstance(commit, str):
            parts.append(f"commit {commit[:10]}" + (" and changes" if found.get("git_dirty") else ""))
        before = self.data.get("protocol", {}).get("before") if isinstance(self.data.get("protocol"), dict) else None
        load = before.get("load_fraction") if isinstance(before, dict) else None
        if isinstance(load, int | float) and load >= BUSY:
            parts.append(f"the machine was busy before the run (load {load:.2f} per core)")
        if reasons := slowed_by(self.data["protocol"]) if isinstance(before, dict) else []:
            parts.append(f"the GPU was throttled ({', '.join(reasons)})")
        return "; ".join(part for part in parts if part) + "."


def load(path: str | os.PathLike) -> Loaded:
    """Reads one record of any kind.

    Raises:
        PlotError: naming the file, and the key where one is at fault.
        OSError: for a file that cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        what = "it is a folder" if path.is_dir() else "it is not there"
        raise PlotError(f"{str(path)!r} must be a record: {what}")
    if path.stat().st_size > _LARGEST_BYTES:
        raise PlotError(f"{path.name} must be a record: it is larger than {_LARGEST_BYTES >> 20} MiB")
    try:
        data = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise PlotError(f"{path.name} is not a record: {error or type(error).__name__}") from None
    try:
        kind, environment = _identified(data)
    except RecordError as error:
        raise PlotError(f"{path.name}: {error}") from None
    return Loaded(path.stem, path.name, kind, data, environment)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no figure")


def _identified(data: Any) -> tuple[str, dict]:
    """Kind and environment; files with a kind keep the whole schema, the two without one what is checked here."""
    if not isinstance(data, dict):
        raise RecordError(f"a record is a JSON object, got {type(data).__name__}")
    if "kind" in data:
        record.check(data)
        return data["kind"], data["environment"]
    version = data.get("schema_version")
    if version != record.SCHEMA_VERSION or isinstance(version, bool):
        raise RecordError(f"schema_version is {version!r}, this dqkernels reads schema_version {record.SCHEMA_VERSION}")
    for kind, keys in (("demo", ("settings", "rows", "samples")), ("dq_docstrings", ("runs", "not_run"))):
        if all(key in data for key in keys):
            if kind == "demo":
                return kind, Row(data, "the record").sub("environment").data
            runs = data["runs"] if isinstance(data["runs"], list) else []
            return kind, Row(runs[0], "runs[0]").sub("machine").data if runs else {}
    raise RecordError("it has no 'kind', and is neither a demo.json nor a dq_docstrings.json")


def pictures(loaded: Loaded) -> list[Picture]:
    """The pictures of a record; none where its kind has none, or nothing in it was timed.

    Raises:
        PlotError: for rows that lack what their kind has; the message names file, row and key.
    """
    if loaded.kind not in KINDS:
        return []
    try:
        found = KINDS[loaded.kind][0](loaded.data, loaded.machine)
    except RecordError as error:
        raise PlotError(f"{loaded.file}: {error}") from None
    # What the record says against itself belongs under its pictures.
    protocol = loaded.data.get("protocol")
    note = protocol.get("note") if isinstance(protocol, dict) else None
    if not isinstance(note, str):
        return found
    return [dataclasses.replace(one, caption=(*one.caption, f"Note in the record: {note}.")) for one in found]


def need_pictures(loaded: Loaded) -> list[Picture]:
    """As `pictures`, for who asked for them.

    Raises:
        PlotError: also where there are none, with the kinds that have some.
    """
    if loaded.kind not in KINDS:
        known = "; ".join(f"{kind} ({what})" for kind, (_, what) in KINDS.items())
        raise PlotError(f"{loaded.file} is of kind {loaded.kind!r}, which has no picture; those with one: {known}")
    found = pictures(loaded)
    if not found:
        raise PlotError(f"{loaded.file} holds no row with a figure, so there is nothing to draw")
    return found


# ---------------------------------------------------------------------------------------------------------- files


def run(
    records: Sequence[str | os.PathLike],
    output_dir: str | os.PathLike | None = ".",
    *,
    styles: Sequence[str] = STYLES,
    kind: str = "png",
    html: str | os.PathLike | None = None,
    overwrite: bool = False,
) -> list[Path]:
    """Draws every picture of every record, and returns the files written, in order.

    Everything is read, drawn and checked before the first file is written; each is written whole or not at all.

    Args:
        records: files; two of one name would give files of one name, and are refused.
        output_dir: folder of the pictures, made if needed; None for no pictures.
        styles: of `STYLES`.
        kind: of `FORMATS`.
        html: a page with tables and pictures of all records, or None.
        overwrite: replace files that no `dqkernels plot` has written; its own are replaced in any case.

    Raises:
        PlotError: for a record that cannot be drawn, or a file that must not be replaced.
        NoMatplotlib: where matplotlib is missing.
        OSError: for a file that cannot be read, or a folder that cannot be written to.
    """
    from dqkernels.bench import plot_page

    picture_draw.need_matplotlib()
    loaded = [load(path) for path in records]
    names = [one.name for one in loaded]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise PlotError(f"records must have different names, {twice[0]!r} stands there twice: their pictures would too")
    made: list[tuple[Path, Callable[[], bytes]]] = []
    if output_dir is not None:
        if Path(output_dir).exists() and not Path(output_dir).is_dir():
            raise PlotError(f"output_dir must be a folder, {str(output_dir)!r} is a file")
        for one in loaded:
            for picture, style in ((p, s) for p in need_pictures(one) for s in styles):
                made.append(
                    (Path(output_dir) / file_name(one, picture, style, kind), _drawing(one, picture, style, kind))
                )
    if html is not None:
        made.append((Path(html), lambda: plot_page.page(loaded).encode()))
    for path, _ in made:
        check_place(path, overwrite)
    if output_dir is not None:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
    drawn = [(path, draw()) for path, draw in made]
    for path, data in drawn:
        record.replace(path, data)
    return [path for path, _ in drawn]


def _drawing(one: Loaded, picture: Picture, style: str, kind: str) -> Callable[[], bytes]:
    def draw() -> bytes:
        try:
            return picture_draw.draw(picture, style, kind, one.footer)
        except (ValueError, ArithmeticError) as error:  # of matplotlib: figures that fit no axis together
            raise PlotError(f"{one.file}: its picture {picture.name!r} cannot be drawn: {error}") from error

    return draw


def file_name(one: Loaded, picture: Picture, style: str, kind: str = "png") -> str:
    """`generate-zen3-memory-dark.png`."""
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '_', one.name).lstrip('.') or 'record'}-{picture.name}-{style}.{kind}"


def check_place(path: Path, overwrite: bool) -> None:
    """Refuses a file that is there and was not written by `dqkernels plot`.

    Raises:
        PlotError: naming it.
    """
    if path.is_dir():
        raise PlotError(f"{str(path)!r} is a folder, and a file of that name is to be written")
    if path.exists() and not overwrite and not is_own(path):
        raise PlotError(f"{str(path)!r} is there already, and not by dqkernels plot: give --overwrite to replace it")


def is_own(path: Path) -> bool:
    """Whether `dqkernels plot` wrote a file: by its stamp."""
    return stamp(path) is not None


def stamp(path: str | os.PathLike) -> str | None:
    """What a drawn file says of itself (`picture_draw.stamp_of`; of a page, its generator), or None."""
    with open(path, "rb") as file:
        head = file.read(1 << 16)
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        texts = [data for kind, data in _chunks(head) if kind in (b"tEXt", b"iTXt")]
        found = next((text for text in texts if text.startswith(b"Identifier\0")), b"")
        return _stamped(found.partition(b"\0")[2])
    return _stamped(head)


def _stamped(text: bytes) -> str | None:
    found = re.search(rb"dqkernels plot (?:(?:light|dark) sha256:[0-9a-f]{64}|page)", text)
    return None if found is None else found[0].decode()


def _chunks(head: bytes) -> Iterator[tuple[bytes, bytes]]:
    place = 8
    while place + 8 <= len(head):
        length, kind = struct.unpack(">I4s", head[place : place + 8])
        if kind == b"IDAT":
            return
        yield kind, head[place + 8 : place + 8 + length]
        place += 12 + length
