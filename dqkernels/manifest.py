"""What the folder of a packed model declares: read as untrusted, checked before anything is allocated.

Only config.json, the index and the headers of weight files are read, never their data. No model is needed.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from dqkernels import packing
from dqkernels.config import FORMAT_VERSION, QUANT_METHOD, DQConfig

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
#: Python objects take about 25 times the room of the JSON they come from, so 4 MiB bound what a hostile file can
#: cost to 100 MB, and hold 35,000 tensors of one file (an entry takes about 120 bytes): ten times a 100-layer model.
MAX_HEADER_BYTES = MAX_JSON_BYTES = 4 << 20
#: Weights of a 3-d convolution (video models), which stay float. Codes are matrices.
MAX_RANK = 5
MAX_POSITIONS = 1 << 22
_INT32_MAX = (1 << 31) - 1
FLOATS = ("F64", "F32", "F16", "BF16")
#: Bytes of an element. What transformers reads (float8 aside, which is another quantization): beside its weights a
#: float model holds counters, indices and masks.
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "BOOL": 1}
BYTES |= {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1}
#: With a variant too, which only from_pretrained can ask for: model.fp16.safetensors.
_WEIGHTS = re.compile(r"model(\.\w+)?(-\d{5}-of-\d{5})?(\.\w+)?\.safetensors")
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_LAYER_COUNTS = (
    "num_hidden_layers",
    "num_layers",
    "num_decoder_layers",
    "encoder_layers",
    "decoder_layers",
    "n_layer",
    "n_layers",
)


class FileFormatError(ValueError):
    """Not a packed model as this release writes it; names the file, the thing, what it is and should be."""


@dataclass(frozen=True)
class Entry:
    """One tensor as a header declares it: the file it is in, its safetensors dtype (`U8`), its shape."""

    file: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Manifest:
    """What a checked folder holds: its config.json, the quantization in it, its weight files, its tensors."""

    config: dict[str, Any]
    quantization: DQConfig
    files: tuple[Path, ...]
    tensors: dict[str, Entry]


def check_folder(folder: str | os.PathLike) -> Manifest:
    """Checks a folder with a packed model, reading config.json and the headers of its weight files only.

    Raises:
        FileFormatError: for anything that `save` would not have written: see the checks below, and
            tests/attacks for one file for each.
    """
    folder = Path(folder)
    config_file = folder / CONFIG_FILE
    config = read_json(config_file)
    for key in ("auto_map", "custom_pipelines"):
        if key in config:
            refuse(config_file, f"key {key!r}", "present", "absent: no code of a model folder is run")
    stored = config.get("quantization_config")
    if not isinstance(stored, dict):
        refuse(config_file, "quantization_config", type(stored).__name__, "a dict written by dqkernels")
    quantization = check_quantization_config(stored, config_file)
    files = _weight_files(folder)
    tensors = check_files(files, quantization)
    check_sizes(config, config_file, len(tensors))
    if len(files) > 1 or files[0].name != WEIGHTS_FILE:
        _check_index(folder / INDEX_FILE, tensors)
    return Manifest(config, quantization, tuple(files), tensors)


def check_quantization_config(stored: Mapping[str, Any], file: str | os.PathLike = CONFIG_FILE) -> DQConfig:
    """The `DQConfig` of a stored quantization_config.

    Raises:
        FileFormatError: for another quant_method or format_version, an unknown key or a bad value.
    """
    if stored.get("quant_method") != QUANT_METHOD:
        refuse(file, "quant_method", stored.get("quant_method"), QUANT_METHOD)
    if "format_version" not in stored:
        refuse(file, "format_version", "missing", FORMAT_VERSION)
    try:
        return DQConfig.from_dict(stored)
    except (ValueError, TypeError) as error:
        raise FileFormatError(f"{_name(file)}: {error}") from error


def check_files(files: Iterable[str | os.PathLike], quantization: DQConfig) -> dict[str, Entry]:
    """Checks the headers of weight files that belong to one model, and returns all their tensors by name.

    Raises:
        FileFormatError: see `check_folder`.
    """
    tensors: dict[str, Entry] = {}
    folder = None
    for path in map(Path, files):
        if _WEIGHTS.fullmatch(path.name) is None:
            refuse(path, "its name", path.name, f"{WEIGHTS_FILE} or model-00001-of-00002.safetensors; no pickle")
        if folder is not None and path.parent != folder:
            refuse(path, "its folder", path.parent, folder)
        folder = path.parent
        for name, entry in read_header(path).items():
            if name in tensors:
                refuse(path, f"tensor {name!r}", f"also in {tensors[name].file}", "in one file only")
            tensors[name] = entry
    _check_packed_entries(tensors, quantization)
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a regular file of at most 4 MiB, with unique keys and finite numbers.

    Raises:
        FileFormatError: otherwise.
    """
    size = _regular_size(path)
    if size > MAX_JSON_BYTES:
        refuse(path, "its size", f"{size} bytes", f"at most {MAX_JSON_BYTES}")
    return parse_json(path.read_bytes(), path)


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors a safetensors file declares, checked against its size; its data is not read.

    Raises:
        FileFormatError: for a header that is too long, is no JSON, repeats a name or lacks format_version;
            for a tensor of unknown dtype, rank above 5, size beyond 64 bits, or bytes not exactly where they
            belong.
    """
    size = _regular_size(path)
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > size - 8:
            refuse(path, "the header length", length, f"at most the file's {max(size - 8, 0)} remaining bytes")
        if length > MAX_HEADER_BYTES:
            refuse(path, "the header length", length, f"at most {MAX_HEADER_BYTES}")
        header = parse_json(file.read(length), path)
    metadata = header.pop("__metadata__", {})
    version = metadata.get("format_version") if isinstance(metadata, dict) else None
    if version != str(FORMAT_VERSION):
        refuse(path, "format_version in its metadata", version, f"{FORMAT_VERSION}, which this dqkernels reads")
    entries, spans = {}, []
    for name, declared in header.items():
        entries[name], span = _check_entry(path, name, declared)
        spans.append((*span, name))
    end = 0
    for begin, stop, name in sorted(spans):
        if begin != end:
            refuse(path, f"tensor {name!r}: its first byte", begin, f"{end}, right after the tensor before it")
        end = stop
    if end != size - 8 - length:
        refuse(path, "the bytes after the header", size - 8 - length, f"{end}, the sum of its tensors")
    return entries


def refuse(file: str | os.PathLike, what: str, found: Any, wanted: Any) -> NoReturn:
    """Raises the FileFormatError of one finding."""
    found = found if isinstance(found, str) else repr(found)
    found = found if len(found) <= 120 else found[:117] + "..."
    what = what if len(what) <= 160 else what[:157] + "..."
    raise FileFormatError(f"{_name(file)}: {what} is {found}, wanted {wanted}")


def _name(file: str | os.PathLike) -> str:
    return os.fspath(file)


def _regular_size(path: Path) -> int:
    """Size of a regular file; a link may only lead into its own folder or into the blobs of a hub cache."""
    try:
        # resolve() before stat(): a FIFO or a device would block or never end when opened.
        real = path.resolve(strict=True)
        status = real.stat()
    except (OSError, RuntimeError) as error:
        raise FileFormatError(f"{_name(path)}: cannot be read: {error}") from error
    if not stat.S_ISREG(status.st_mode):
        refuse(path, "it", "no regular file", "a regular file")
    if path.is_symlink():
        home = path.parent.resolve()
        allowed = [home]
        if home.parent.name == "snapshots":
            allowed.append(home.parent.parent / "blobs")  # layout of the Hugging Face cache
        if not any(real.is_relative_to(folder) for folder in allowed):
            refuse(path, "it", f"a link to {real}", "a file inside its own folder")
    return status.st_size


def parse_json(data: bytes, path: str | os.PathLike) -> dict[str, Any]:
    """A JSON object with unique keys and finite numbers.

    Raises:
        FileFormatError: otherwise.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise ValueError(f"the key {key[:80]!r} stands there twice")
            result[key] = value
        return result

    def constant(text: str) -> None:
        raise ValueError(f"{text} is no JSON number")

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{_name(path)}: not valid JSON: {str(error)[:200]}") from error
    if not isinstance(value, dict):
        refuse(path, "its JSON", type(value).__name__, "an object")
    return value


def _check_entry(path: Path, name: str, declared: Any) -> tuple[Entry, tuple[int, int]]:
    if not isinstance(declared, dict) or set(declared) != {"dtype", "shape", "data_offsets"}:
        found = sorted(declared) if isinstance(declared, dict) else type(declared).__name__
        refuse(path, f"tensor {name!r}", found, "an object with dtype, shape and data_offsets")
    dtype, shape, offsets = declared["dtype"], declared["shape"], declared["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BYTES:
        refuse(path, f"tensor {name!r}: its dtype", dtype, f"one of {', '.join(BYTES)}")
    if not isinstance(shape, list) or len(shape) > MAX_RANK:
        refuse(path, f"tensor {name!r}: its shape", shape, f"a list of at most {MAX_RANK} numbers")
    for value in shape:
        if type(value) is not int or not 0 <= value <= _INT32_MAX:
            refuse(path, f"tensor {name!r}: its shape", shape, f"whole numbers in 0..{_INT32_MAX}")
    if not isinstance(offsets, list) or len(offsets) != 2 or any(type(v) is not int or v < 0 for v in offsets):
        refuse(path, f"tensor {name!r}: data_offsets", offsets, "[first byte, byte after the last]")
    size = math.prod(shape) * BYTES[dtype]
    if size >= 1 << 63 or offsets[1] - offsets[0] != size:
        found = f"{offsets[1] - offsets[0]} bytes"
        refuse(path, f"tensor {name!r}: data_offsets", found, f"{size}, the size of {dtype} {shape}")
    return Entry(str(path), dtype, tuple(shape)), (offsets[0], offsets[1])


def _check_packed_entries(tensors: Mapping[str, Entry], quantization: DQConfig) -> None:
    # Codes first: the checks of what stands beside them rely on their shape.
    for name, entry in sorted(tensors.items(), key=lambda item: not item[0].endswith(".qweight")):
        module, _, kind = name.rpartition(".")
        where = f"tensor {name!r}"
        found = f"{entry.dtype} {list(entry.shape)}"
        packed = tensors.get(f"{module}.qweight")
        if kind == "qweight":
            options = (quantization.for_linear(module), quantization.for_embedding(module))
            units = sorted({16 * layer.bits for layer in options if layer is not None}) or [32]
            shape = entry.shape
            if entry.dtype != "U8" or len(shape) != 2 or shape[0] % packing.BLOCK_N or shape[0] == 0:
                refuse(entry.file, where, found, f"U8 [a multiple of {packing.BLOCK_N}, bytes per row]")
            if shape[1] == 0 or all(shape[1] % unit for unit in units):
                refuse(entry.file, where, found, f"bytes per row a multiple of {' or '.join(map(str, units))}")
            if f"{module}.weight_scale" not in tensors:
                refuse(entry.file, where, "without its scale", f"a tensor '{module}.weight_scale' beside it")
        elif kind == "weight_scale":
            if packed is None:
                refuse(entry.file, where, "without its codes", f"a tensor '{module}.qweight' beside it")
            rows = entry.shape[0] if len(entry.shape) == 1 else -1
            if entry.dtype != "F32" or (rows != 1 and packing.padded_n(rows) != packed.shape[0]):
                refuse(entry.file, where, found, f"F32 [1] or [out_features] of {packed.shape[0]} padded rows")
        elif kind == "group_mult":
            rows = entry.shape[0] if len(entry.shape) == 2 else -1
            if entry.dtype != "U8" or packed is None or packing.padded_n(rows) != packed.shape[0]:
                refuse(entry.file, where, found, "U8 [out_features, groups] beside its qweight")
        elif kind == "act_scale" and (entry.dtype != "F32" or entry.shape != (1,)):
            # May stand alone: a head that shares the embedding's table has no qweight of its own.
            refuse(entry.file, where, found, "F32 [1]")


def _weight_files(folder: Path) -> list[Path]:
    if os.path.lexists(folder / WEIGHTS_FILE):
        return [folder / WEIGHTS_FILE]
    if not os.path.lexists(folder / INDEX_FILE):
        others = sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"))
        found = ", ".join(others[:3]) or "nothing"
        refuse(folder, "its weight file", found, f"{WEIGHTS_FILE} (pickle files are never read)")
    names = _index(folder / INDEX_FILE).values()
    return [folder / name for name in sorted(set(names))]


def _index(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        refuse(path, "weight_map", type(weight_map).__name__, "an object of tensor name -> file name")
    for name, file in weight_map.items():
        if not isinstance(file, str) or _SHARD.fullmatch(file) is None:
            refuse(path, f"weight_map[{name!r}]", file, "a bare name like model-00001-of-00002.safetensors")
    return weight_map


def _check_index(path: Path, tensors: Mapping[str, Entry]) -> None:
    weight_map = _index(path)
    for name in sorted(set(weight_map) ^ set(tensors)):
        found = "in a weight file only" if name in tensors else "in the index only"
        refuse(path, f"tensor {name!r}", found, "in both")
    for name, file in weight_map.items():
        if Path(tensors[name].file).name != file:
            refuse(path, f"weight_map[{name!r}]", file, Path(tensors[name].file).name)


def check_sizes(config: Mapping[str, Any], file: str | os.PathLike, tensor_count: int) -> None:
    """Bounds what building the model from config.json could cost before any weight is looked at.

    Raises:
        FileFormatError: for a number beyond int32, more layers than tensors, no head, or over 4 million positions.
    """
    for key, value in config.items():
        if type(value) is int and abs(value) > _INT32_MAX:
            refuse(file, key, value, f"at most {_INT32_MAX}")
        if key in _LAYER_COUNTS and type(value) is int and not 0 <= value <= tensor_count:
            refuse(file, key, value, f"0..{tensor_count}: the weight files have {tensor_count} tensors")
        if key.endswith("heads") and type(value) is int and value < 1:
            refuse(file, key, value, "1 or more")
        if key == "max_position_embeddings" and type(value) is int and not 0 <= value <= MAX_POSITIONS:
            refuse(file, key, value, f"0..{MAX_POSITIONS}")
