"""Which tile a GEMM takes: the one measured on this GPU where there is a record of it, else the rule of `tiles.choose`.

A record is a JSON file that `dqkernels tune` wrote on the GPU it names. It is looked for in `DQKERNELS_TILES`, then in
the user's cache folder, then among those that ship (`tables/`). Whatever it says, no result changes: it may only name
tiles of `tiles.candidates`, and none of them ever changes a bit. Nothing is timed here.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from . import tiles

VARIABLE = "DQKERNELS_TILES"
KIND = "tiles"
_SCHEMA_VERSION = 1
_SHIPPED = Path(__file__).parent / "tables"
_TOKENS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
_GRAIN = 256  # N and K are rounded up to it: the layers of a model keep their own entries, odd sizes share one
_MAX_BYTES = 16 << 20

Key = tuple[int, int, int, int, int]


class TableError(ValueError):
    """A record of tiles that is not what it should be; the message names file, row and key."""


@dataclass(frozen=True)
class Table:
    """The measured tiles of one GPU.

    Attributes:
        source: `DQKERNELS_TILES`, `yours` or `shipped`.
        gpu, capability: of the GPU it was measured on, as torch names them.
        triton: the version that compiled what was measured.
        entries: tile and number of K splits by (bits, group_size, *bucket(m, n, k)).
    """

    source: str
    gpu: str
    capability: str
    triton: str | None
    entries: dict[Key, tuple[tiles.Config, int]]


def bucket(m: int, n: int, k: int) -> tuple[int, int, int]:
    """The sizes that share an entry: the next of `_TOKENS`, N and K rounded up to 256."""
    tokens = next((limit for limit in _TOKENS if limit >= m), _TOKENS[-1])
    return tokens, -(-n // _GRAIN) * _GRAIN, -(-k // _GRAIN) * _GRAIN


def choose(m: int, n: int, k: int, bits: int, group_size: int, device: torch.device) -> tuple[tiles.Config, int]:
    """Tile and number of K splits for [M, K] x [N, K]^T on `device`: measured, or by the rule."""
    table = table_of(device)
    found = None if table is None else table.entries.get((bits, group_size, *bucket(m, n, k)))
    if found is not None:
        return found
    return tiles.choose(m, n, k, bits, group_size, tiles.family(device), tiles.multiprocessors(device))


@functools.cache
def table_of(device: torch.device) -> Table | None:
    """The record in use for a device, read at its first GEMM; None where none speaks of this GPU.

    Raises:
        TableError: for a file named by DQKERNELS_TILES that cannot be read. One found elsewhere is left aside with a
            warning, and so is any that another Triton measured.
    """
    table, why, stale = _find(device)
    if stale:
        warnings.warn(f"a table of tiles is left aside, the tiles are chosen by rule: {why}", stacklevel=2)
    return table


def in_use(device: torch.device) -> str:
    """One sentence for people: which choice of tiles is in use, and why."""
    if device.type != "cuda":
        return "by rule: only GPUs have measured tables"
    try:
        table, why, _ = _find(device)
    except TableError as error:
        return f"none, every GEMM will refuse: {error}"
    if table is None:
        return f"by rule: {why}"
    return f"{len(table.entries)} measured on this {table.gpu} ({table.source}, Triton {table.triton}), else by rule"


def refresh() -> None:
    """Forgets what was read; for `tune` and for tests."""
    table_of.cache_clear()


def user_file(gpu: str) -> Path:
    """Where `dqkernels tune` writes for this GPU, and where the table is then found."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "dqkernels" / "tiles" / file_name(gpu)


def file_name(gpu: str) -> str:
    """`nvidia-h200.json` for `NVIDIA H200`."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json"


def _find(device: torch.device) -> tuple[Table | None, str, bool]:
    """The table for a device, or None and the reason; and whether there is a file for it that cannot be used."""
    if device.type != "cuda":
        return None, "no GPU", False
    gpu = torch.cuda.get_device_name(device)
    capability = "{}.{}".format(*torch.cuda.get_device_capability(device))
    asked = os.environ.get(VARIABLE, "")
    if asked == "off":
        return None, f"{VARIABLE}=off", False
    places = [(user_file(gpu), "yours"), (_SHIPPED / file_name(gpu), "shipped")]
    if asked:
        places = [(Path(asked), VARIABLE)]
    why, stale = f"nobody has measured the {gpu} yet (dqkernels tune does)", False
    for path, source in places:
        if not path.is_file() and not asked:
            continue
        try:
            table = read(path, source)
        except TableError as error:
            if asked:
                raise
            why, stale = str(error), True
            continue
        if (table.gpu, table.capability) == (gpu, capability):
            compiler = _triton()
            if _minor(table.triton) == _minor(compiler):
                return table, "", False
            stale = True
            why = f"{path.name} was measured with Triton {table.triton}, this is {compiler}: dqkernels tune once more"
            continue
        why = f"{path.name} was measured on {table.gpu} (sm_{table.capability}), this is {gpu} (sm_{capability})"
    return None, why, stale


def _triton() -> str | None:
    """The installed version; asked for without importing it."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


def _minor(version: str | None) -> list[str] | None:
    """`3.9` of `3.9.1`: what a tile compiles to, and how fast that is, changes with it."""
    return None if version is None else version.split(".")[:2]


def read(path: str | os.PathLike[str], source: str = "yours") -> Table:
    """Reads and checks a record.

    Raises:
        TableError: if the file is not there, is no such record, or names a tile that this release does not know.
    """
    path = Path(path)
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise TableError(f"{path.name} must be a table of tiles, it has more than {_MAX_BYTES >> 20} MiB")
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, TableError):
            raise
        raise TableError(f"{path.name} is no table of tiles: {error}") from None
    if not isinstance(record, dict) or record.get("kind") != KIND or record.get("schema_version") != _SCHEMA_VERSION:
        kind = record.get("kind") if isinstance(record, dict) else type(record).__name__
        version = record.get("schema_version") if isinstance(record, dict) else None
        raise TableError(
            f"{path.name} must be a record of kind {KIND!r} and schema_version {_SCHEMA_VERSION}, "
            f"got {kind!r} and {version!r}: dqkernels tune writes one"
        )
    environment, settings, rows = (record.get(key) for key in ("environment", "settings", "rows"))
    if not (isinstance(environment, dict) and isinstance(settings, dict) and isinstance(rows, list)):
        raise TableError(f"{path.name} lacks its environment, settings or rows")
    gpu, capability = environment.get("gpu"), settings.get("compute_capability")
    named = isinstance(gpu, str) and isinstance(capability, str) and re.fullmatch(r"[0-9]+\.[0-9]+", capability)
    if not named or not isinstance(environment.get("triton"), str | None):
        raise TableError(f"{path.name} must name the GPU and its compute_capability, got {gpu!r} and {capability!r}")
    entries = dict(_entry(f"{path.name}, row {index}", row, capability) for index, row in enumerate(rows))
    return Table(source, gpu, capability, environment.get("triton"), entries)


def _entry(where: str, row: object, capability: str) -> tuple[Key, tuple[tiles.Config, int]]:
    if not isinstance(row, dict):
        raise TableError(f"{where} must be an object, got {type(row).__name__}")

    def number(key: str) -> int:
        value = row.get(key)
        if not isinstance(value, int) or isinstance(value, bool):
            raise TableError(f"{where}: {key} must be a whole number, got {value!r}")
        return value

    bits, group_size = number("bits"), number("group_size")
    tile, split = tiles.Config(*map(number, tiles.Config._fields)), number("split_k")
    sizes = number("m"), number("n"), number("k")
    if min(sizes) < 1:
        raise TableError(f"{where}: m, n, k must be 1 or more, got {list(sizes)}")
    if (bits, group_size != -1) not in tiles.FORMATS or group_size not in (-1, 32, 64, 128):
        raise TableError(f"{where}: no kernel has bits={bits} with group_size={group_size}")
    arch = tiles.family_of(int(capability.split(".")[0]))
    if tile not in tiles.candidates(arch, bits, group_size):
        raise TableError(f"{where}: {tuple(tile)} is no tile of this release for bits={bits}")
    if split not in tiles.SPLITS or (split > 1 and sizes[0] > tiles.SPLIT_M):
        raise TableError(
            f"{where}: split_k must be one of {list(tiles.SPLITS)}, 1 beyond {tiles.SPLIT_M} tokens, got {split}"
        )
    return (bits, group_size, *bucket(*sizes)), (tile, split)
