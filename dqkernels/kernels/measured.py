"""What was measured on this GPU: the tile of a Triton GEMM, the plan of a skinny CUDA GEMM, and which is the faster.

A record is a JSON file that `dqkernels tune` wrote on the GPU it names. It is looked for in `DQKERNELS_TILES`, then in
the user's cache folder, then among those that ship (`tables/`). Where none speaks, the rules of `tiles.choose` and of
the compiled core do. Whatever it says, no result changes: it may only name tiles of `tiles.candidates` and plans that
`plans.fits` has room for, and none of them ever changes a bit. Nothing is timed here.

Tiles hold for the Triton that compiled them, plans for the CUDA kernels of one release. One file may hold both, and
what has become invalid in it leaves the rest in use.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dqkernels.config import VERSION

from . import native, plans, tiles

VARIABLE = "DQKERNELS_TILES"
KIND = "tiles"
_SCHEMA_VERSION = 1
_SHIPPED = Path(__file__).parent / "tables"
_TOKENS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
_GRAIN = 256  # N and K are rounded up to it: the layers of a model keep their own entries, odd sizes share one
_MAX_BYTES = 16 << 20

#: Who runs a GEMM that was measured, and what of it is in the file.
WORDS = {"triton": "tiles", "cuda": "plans"}

Key = tuple[int, int, int, int, int]
PlanKey = tuple[int, int, str, int, int, int]


class TableError(ValueError):
    """A record of tiles that is not what it should be; the message names file, row and key."""


@dataclass(frozen=True)
class Table:
    """What was measured on one GPU.

    Attributes:
        source: `DQKERNELS_TILES`, `yours` or `shipped`.
        gpu, capability: of the GPU it was measured on, as torch names them.
        triton: the version that compiled what was measured.
        entries: tile and number of K splits by (bits, group_size, *bucket(m, n, k)).
        cuda: the CUDA kernels that were measured, as `cuda_kernels` names them; None without any.
        plans: of those by `plan_key`; empty where this release has other kernels.
        compared: the keys, among them, at which Triton's tile was timed beside the best plan.
        slower: those at which the tile was faster.
        plan_rows: how many plans the file has, of whatever kernels.
    """

    source: str
    gpu: str
    capability: str
    triton: str | None
    entries: dict[Key, tuple[tiles.Config, int]]
    cuda: str | None = None
    plans: dict[PlanKey, plans.Plan] = field(default_factory=dict)
    compared: frozenset[PlanKey] = frozenset()
    slower: frozenset[PlanKey] = frozenset()
    plan_rows: int = 0


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


def plan_key(m: int, n: int, k: int, bits: int, group_size: int, input_kind: str) -> PlanKey | None:
    """What changes the best plan; None above 64 rows. n: of all parts of a launch. input_kind: of `plans.INPUTS`."""
    rows = plans.bucket(m)
    return None if rows is None else (bits, group_size, input_kind, rows, *bucket(m, n, k)[1:])


def plan(m: int, n: int, k: int, bits: int, group_size: int, input_kind: str, device: int) -> plans.Plan:
    """The plan measured for a skinny GEMM on a GPU, by its index; `plans.BY_RULE` where none was, or has no room."""
    table = table_of(_gpu(device), "cuda")
    found = None if table is None else table.plans.get(plan_key(m, n, k, bits, group_size, input_kind))
    # An entry is shared by fewer rows and more: the one row more may be what does not fit.
    return found if found is not None and plans.fits(m, k, bits, group_size, found) else plans.BY_RULE


def triton_is_faster(m: int, n: int, k: int, bits: int, group_size: int, device: int) -> str | None:
    """In words, why Triton's GEMM of M rows is taken to beat the CUDA kernels' best plan; None where it is not.

    Above `plans.FASTER_ROWS` rows it is, unless this GPU's table compared the two on int8 rows at these sizes.
    """
    table = table_of(_gpu(device), "cuda")
    key = plan_key(m, n, k, bits, group_size, "int8")
    # A comparison holds for both kernels: with another Triton nobody knows.
    if table is not None and key in table.compared and _minor(table.triton) == _minor(_triton()):
        return f"Triton's tile was measured faster at up to {key[3]} rows" if key in table.slower else None
    return None if m <= plans.FASTER_ROWS else f"above {plans.FASTER_ROWS} rows Triton's tile was faster on an H200"


def _gpu(index: int) -> torch.device:
    """What `Tensor.get_device` counts: -1 is no GPU."""
    return torch.device("cuda", index) if index >= 0 else torch.device("cpu")


@functools.cache
def table_of(device: torch.device, kernels: str = "triton") -> Table | None:
    """The record in use for a device's `triton` or `cuda` kernels, read at their first GEMM; None where none speaks.

    Raises:
        TableError: for a file named by DQKERNELS_TILES that cannot be read. One found elsewhere is left aside with a
            warning, and so is what another Triton, or another release's CUDA kernels, gave.
    """
    table, why, stale = _find(device, kernels)
    if stale:
        words = WORDS[kernels]
        warnings.warn(f"a table of {words} is left aside, the {words} are chosen by rule: {why}", stacklevel=2)
    return table


def in_use(device: torch.device, kernels: str = "triton") -> str:
    """One sentence for people: which choice of tiles (of plans, for `cuda`) is in use, and why."""
    if device.type != "cuda":
        return "by rule: only GPUs have measured tables"
    try:
        table, why, _ = _find(device, kernels)
    except TableError as error:
        return f"none, every GEMM will refuse: {error}"
    if table is None:
        return f"by rule: {why}"
    count, made = len(table.entries), f"Triton {table.triton}"
    if kernels == "cuda":
        count, made = len(table.plans), f"CUDA kernels {table.cuda}"
    return f"{count} measured on this {table.gpu} ({table.source}, {made}), else by rule"


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


def _find(device: torch.device, kernels: str) -> tuple[Table | None, str, bool]:
    """The table for a device's kernels, or None and the reason; and whether there is one that cannot be used."""
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
            if not (table.entries if kernels == "triton" else table.plan_rows):
                continue  # of the other kernels alone
            made = _made_by_others(table, kernels)
            if made is None:
                return table, "", False
            stale = True
            why = f"{path.name} was measured with {made}: dqkernels tune once more"
            continue
        why = f"{path.name} was measured on {table.gpu} (sm_{table.capability}), this is {gpu} (sm_{capability})"
    return None, why, stale


def _made_by_others(table: Table, kernels: str) -> str | None:
    """What was measured and what is here, in words, where they differ; else None."""
    if kernels == "triton":
        here = _triton()
        return None if _minor(table.triton) == _minor(here) else f"Triton {table.triton}, this is {here}"
    here = cuda_kernels()
    return None if table.cuda == here else f"the CUDA kernels of {table.cuda}, these are {here}"


def cuda_kernels() -> str:
    """`0.1.0 (interface 2)`: the CUDA kernels of this release, for which measured plans hold."""
    return f"{VERSION} (interface {native.ABI_VERSION})"


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
        TableError: if the file is not there, is no such record, or names a tile that this release does not know, or a
            plan, if it is of this release's CUDA kernels; those of others are counted and not read.
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
    cuda = settings.get("cuda_kernels")
    entries, found, compared, slower, plan_rows = {}, {}, set(), set(), 0
    for index, row in enumerate(rows):
        where = f"{path.name}, row {index}"
        if not isinstance(row, dict):
            raise TableError(f"{where} must be an object, got {type(row).__name__}")
        kernel = row.get("kernel", "triton")  # files from before there were plans name none
        if kernel not in WORDS:
            raise TableError(f"{where}: kernel must be one of {list(WORDS)}, got {kernel!r}")
        if kernel == "triton":
            key, entry = _entry(where, row, capability)
            entries[key] = entry
            continue
        plan_rows += 1
        if not isinstance(cuda, str):
            raise TableError(f"{where} is a plan, and settings name no cuda_kernels, got {cuda!r}")
        if cuda == cuda_kernels():
            key, found[key] = _plan_entry(where, row)
            # Without Triton at hand `faster` names CUDA, which nobody raced.
            compared |= {key} if row.get("triton_us") is not None else set()
            slower |= {key} if row["faster"] == "triton" else set()
    sets = frozenset(compared | slower), frozenset(slower)
    return Table(source, gpu, capability, environment.get("triton"), entries, cuda, found, *sets, plan_rows)


def _number(where: str, row: dict, key: str) -> int:
    value = row.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise TableError(f"{where}: {key} must be a whole number, got {value!r}")
    return value


def _problem(where: str, row: dict) -> tuple[int, int, tuple[int, int, int]]:
    """bits, group_size and (m, n, k) of a row."""
    bits, group_size = (_number(where, row, key) for key in ("bits", "group_size"))
    sizes = tuple(_number(where, row, key) for key in ("m", "n", "k"))
    if min(sizes) < 1:
        raise TableError(f"{where}: m, n, k must be 1 or more, got {list(sizes)}")
    if (bits, group_size != -1) not in tiles.FORMATS or group_size not in (-1, 32, 64, 128):
        raise TableError(f"{where}: no kernel has bits={bits} with group_size={group_size}")
    return bits, group_size, sizes


def _plan_entry(where: str, row: dict) -> tuple[PlanKey, plans.Plan]:
    bits, group_size, sizes = _problem(where, row)
    plan = plans.Plan(*(_number(where, row, key) for key in plans.Plan._fields))
    input_kind, faster = row.get("input"), row.get("faster")
    most = plans.FLOAT_ROWS if input_kind == "float" else plans.ROWS[-1]
    if input_kind not in plans.INPUTS or sizes[0] > most:
        raise TableError(
            f"{where}: input must be float up to {plans.FLOAT_ROWS} rows or int8 up to {plans.ROWS[-1]}, "
            f"got {input_kind!r} at {sizes[0]}"
        )
    if not plans.fits(sizes[0], sizes[2], bits, group_size, plan):
        raise TableError(f"{where}: {tuple(plan)} is no plan for {'x'.join(map(str, sizes))} at bits={bits}")
    if faster not in WORDS:
        raise TableError(f"{where}: faster must be one of {list(WORDS)}, got {faster!r}")
    return plan_key(*sizes, bits, group_size, input_kind), plan


def _entry(where: str, row: dict, capability: str) -> tuple[Key, tuple[tiles.Config, int]]:
    bits, group_size, sizes = _problem(where, row)
    tile = tiles.Config(*(_number(where, row, key) for key in tiles.Config._fields))
    split = _number(where, row, "split_k")
    arch = tiles.family_of(int(capability.split(".")[0]))
    if tile not in tiles.candidates(arch, bits, group_size):
        raise TableError(f"{where}: {tuple(tile)} is no tile of this release for bits={bits}")
    if split not in tiles.SPLITS or (split > 1 and sizes[0] > tiles.SPLIT_M):
        raise TableError(
            f"{where}: split_k must be one of {list(tiles.SPLITS)}, 1 beyond {tiles.SPLIT_M} tokens, got {split}"
        )
    return (bits, group_size, *bucket(*sizes)), (tile, split)
