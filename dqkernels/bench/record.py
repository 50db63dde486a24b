"""The benchmark record: what ran, on which machine, by which protocol. Versioned JSON, checked both ways.

Standard library only, and nothing of the package is imported: `benchmarks/gpu_lane.py` loads this file by
its path, so that a checkout whose package does not even import still gets its record.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1
_PACKAGE = Path(__file__).resolve().parent.parent
_ROOT = _PACKAGE.parent
#: Instruction sets that decide how fast integer code runs; the rest of /proc/cpuinfo says nothing here.
_ISA = (
    "avx2 fma f16c avx_vnni avx512f avx512bw avx512_vnni avx512_bf16 avx512_fp16 amx_tile amx_int8 amx_bf16 "
    "asimd asimddp i8mm bf16 sve sve2"
).split()
#: A key that ends so holds a number with that unit; a fraction under any other key is refused.
UNIT = re.compile(
    r"(_us|_ms|_s|_mb|_mib|_bytes|_mhz|_watts|_gb_per_s|_tops|_per_s|_ms_per_token|_fraction|_ratio|_error|_score)$"
)
#: An absolute path: at least one folder, not the tail of a word or of a relative path.
_PATH = re.compile(r"(?<![\w.~/:])(?:/[\w.+~-]+)+/(?=[\w.+~-])|\b[A-Za-z]:\\(?:[^\\\s]+\\)+")
_SOURCES = {".py", ".h", ".cpp", ".cu", ".cuh", ".json"}


class RecordError(ValueError):
    """A record that does not keep the schema; the message names the place and the reason."""


def new(kind: str, *, settings: dict, protocol: dict, rows: list[dict], threads: int | None = None) -> dict:
    """A complete record of this machine, checked. `threads` of the CPU: default torch's, if it is loaded."""
    record = {
        "schema_version": SCHEMA_VERSION,
        "kind": kind,
        "created_utc": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "environment": environment(threads),
        "protocol": protocol,
        "settings": settings,
        "rows": rows,
    }
    check(record)
    return record


def write(record: dict, path: str | os.PathLike) -> Path:
    """Checks and writes a record, by a temporary file and a rename: readers see the old one or the new one.

    Raises:
        RecordError: if the record does not keep the schema; nothing is written then.
    """
    check(record)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, (json.dumps(record, indent=1, allow_nan=False) + "\n").encode())
    return path


def replace(path: Path, data: bytes) -> None:
    """A file with this content, by a temporary file and a rename; what was there stays if anything fails."""
    handle, temporary = tempfile.mkstemp(prefix=path.name, suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would survive the rename
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read(path: str | os.PathLike) -> dict:
    """Reads and checks a record.

    Raises:
        RecordError: for text that is not JSON, another schema_version, or a record that does not keep the
        schema.
    """
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=_no_constant)
    except ValueError as error:
        raise RecordError(f"{Path(path).name} is not a record: {error}") from None
    check(record)
    return record


def check(record: Any) -> None:
    """Raises RecordError unless `record` keeps the schema and holds no path, NaN or unit-less fraction."""
    if not isinstance(record, dict):
        raise RecordError(f"a record is a JSON object, got {type(record).__name__}")
    version = record.get("schema_version")
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise RecordError(
            f"schema_version is {version!r}, this dqkernels reads schema_version {SCHEMA_VERSION}: "
            "use the release that wrote the record, or measure again"
        )
    schema = json.loads((Path(__file__).parent / "record.schema.json").read_text(encoding="utf-8"))
    validate(record, schema)
    check_leaves(record)


def validate(data: Any, schema: dict) -> None:
    """Raises RecordError where `data` does not keep a JSON schema; by `jsonschema` if it is installed."""
    if importlib.util.find_spec("jsonschema") is not None:
        _check_with_library(data, schema)
    else:
        check_subset(data, schema)


def check_leaves(data: Any, units: bool = True) -> None:
    """Raises RecordError for a path, a NaN, or (`units`) a fraction under a key that names no unit."""
    for where, key, value in leaves(data):
        if isinstance(value, float):
            if not math.isfinite(value):
                raise RecordError(f"{where} is {value}; a figure that was not measured is null")
            if units and not UNIT.search(key) and not value.is_integer():
                raise RecordError(f"{where} is {value}: a key that holds a fraction ends in its unit")
        elif isinstance(value, str) and _PATH.search(value):
            raise RecordError(f"{where} holds a path of this machine: {value!r}")


def scrub(text: str) -> str:
    """Text without what belongs to one machine: the folder part of absolute paths, and the host name."""
    text = _PATH.sub("", text)
    host = socket.gethostname()
    if len(host) > 3:
        text = re.sub(rf"\b{re.escape(host)}\b", "<host>", text)
    return text


# ------------------------------------------------------------------------------------------------ environment


def environment(threads: int | None = None) -> dict:
    """Machine words: processor, GPU, versions, commit. Touches CUDA only when the caller has loaded torch."""
    torch = sys.modules.get("torch")
    gpu = cuda = None
    if torch is not None:
        cuda = torch.version.cuda
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        threads = torch.get_num_threads() if threads is None else threads
    commit, dirty = _git()
    return {
        "cpu_model": _cpu_field("model name") or _cpu_field("Model") or platform.processor() or None,
        "cpu_isa": [isa for isa in _ISA if isa in (_cpu_field("flags") or _cpu_field("Features") or "").split()],
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "gpu": gpu,
        "gpu_driver": nvidia_smi("driver_version") if gpu is not None else None,
        "os": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__ if torch is not None else _version("torch"),
        "cuda": cuda,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "dqkernels": _own_version(),
        "git_commit": commit,
        "git_dirty": dirty,
        "source_sha256": source_sha256(),
        "threads": threads,
    }


def nvidia_smi(query: str) -> str | None:
    """One field of `nvidia-smi --query-gpu` for the first GPU, or None."""
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0].strip() if done.returncode == 0 and lines else None


def source_sha256() -> str:
    """Hash of the package's and the core's sources: names the code where there is no git, or a dirty tree."""
    digest = hashlib.sha256()
    for folder in (_PACKAGE, _ROOT / "csrc", _ROOT / "python"):
        for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
            built = path.name == "_build_info.json" or "__pycache__" in path.parts
            if path.suffix in _SOURCES and not built:
                digest.update(path.relative_to(_ROOT).as_posix().encode() + b"\0")
                digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _git() -> tuple[str | None, bool | None]:
    """Commit and dirty flag of the checkout; (None, None) for an installed package."""
    if not (_ROOT / ".git").exists():
        return None, None

    def git(*arguments: str) -> str | None:
        try:
            # fsmonitor could start a daemon, and a record must leave nothing behind.
            done = subprocess.run(
                ["git", "-c", "core.fsmonitor=false", "-C", str(_ROOT), *arguments],
                capture_output=True,
                text=True,
                timeout=20,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    # Records are outputs: writing one must not make the next one dirty.
    status = git("status", "--porcelain", "--", ".", ":(exclude)benchmarks/results")
    return commit, None if commit is None or status is None else bool(status)


def _cpu_field(name: str) -> str | None:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(rf"^{name}\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _own_version() -> str:
    # Read, not imported: this file must work where the package does not, installed or not.
    project = _ROOT / "pyproject.toml"
    found = project.is_file() and re.search(r'^version = "(.+)"$', project.read_text("utf-8"), re.MULTILINE)
    return found.group(1) if found else _version("dqkernels") or "unknown"


# ----------------------------------------------------------------------------------------------------- checks


def _check_with_library(record: dict, schema: dict) -> None:
    import jsonschema

    error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema).iter_errors(record))
    if error is not None:
        raise RecordError(f"{error.json_path}: {error.message}")


_TYPES = {
    "object": lambda v: isinstance(v, dict),
    "array": lambda v: isinstance(v, list),
    "string": lambda v: isinstance(v, str),
    "boolean": lambda v: isinstance(v, bool),
    "null": lambda v: v is None,
    "number": lambda v: isinstance(v, int | float) and not isinstance(v, bool),
    "integer": lambda v: (isinstance(v, int) and not isinstance(v, bool)) or (isinstance(v, float) and v.is_integer()),
}


def check_subset(value: Any, schema: dict, where: str = "$", root: dict | None = None) -> None:
    """The keywords that the schemas beside this file use, for machines without `jsonschema`.

    Raises:
        RecordError: at the first place that does not fit.
    """
    root = schema if root is None else root
    if "$ref" in schema:
        return check_subset(value, root["$defs"][schema["$ref"].removeprefix("#/$defs/")], where, root)
    types = schema.get("type", list(_TYPES))
    if not any(_TYPES[name](value) for name in ([types] if isinstance(types, str) else types)):
        raise RecordError(f"{where}: {value!r} is not of type {types}")
    if "const" in schema and value != schema["const"]:
        raise RecordError(f"{where}: {value!r} is not {schema['const']!r}")
    if "enum" in schema and value not in schema["enum"]:
        raise RecordError(f"{where}: {value!r} is not one of {schema['enum']}")
    if "pattern" in schema and isinstance(value, str) and not re.search(schema["pattern"], value):
        raise RecordError(f"{where}: {value!r} does not match {schema['pattern']!r}")
    if "minimum" in schema and _TYPES["number"](value) and value < schema["minimum"]:
        raise RecordError(f"{where}: {value!r} is less than {schema['minimum']}")
    if "maximum" in schema and _TYPES["number"](value) and value > schema["maximum"]:
        raise RecordError(f"{where}: {value!r} is more than {schema['maximum']}")
    if isinstance(value, list):
        for index, item in enumerate(value):
            check_subset(item, schema.get("items", {}), f"{where}[{index}]", root)
    if isinstance(value, dict):
        missing = [key for key in schema.get("required", ()) if key not in value]
        if missing:
            raise RecordError(f"{where}: {missing[0]!r} is a required property")
        for key, item in value.items():
            check_subset(key, schema.get("propertyNames", {}), f"{where}, key {key!r}", root)
            named = [schema["properties"][key]] if key in schema.get("properties", {}) else []
            named += [s for p, s in schema.get("patternProperties", {}).items() if re.search(p, key)]
            if not named and schema.get("additionalProperties") is False:
                raise RecordError(f"{where}: unexpected key {key!r}")
            for one in named:
                check_subset(item, one, f"{where}.{key}", root)
    return None


def leaves(value: Any, where: str = "$", key: str = "") -> Iterator[tuple[str, str, Any]]:
    """Where each string, number, boolean or null stands, under which key, and what it is; keys too."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield f"{where}.{name}", "", name
            yield from leaves(item, f"{where}.{name}", name)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            # Items of a list take the unit of the list's name.
            yield from leaves(item, f"{where}[{index}]", key)
    else:
        yield where, key, value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
