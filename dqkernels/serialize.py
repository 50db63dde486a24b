"""Folders of packed models: read as untrusted, written all or nothing.

`check_folder` (in `manifest`) reads names, types and sizes, and refuses before anything is allocated;
`check_shapes` holds a file against the model it is for; `check_values` looks at the numbers once they are
loaded. `save` never leaves a half-written folder. One format (safetensors), no pickle, no path inside a
file, no fallback loader.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dqkernels import manifest, packing, qmath, reporting
from dqkernels.config import DQConfig
from dqkernels.manifest import (
    INDEX_FILE,
    WEIGHTS_FILE,
    Entry,
    FileFormatError,
    Manifest,
    check_files,
    check_folder,
    check_quantization_config,
    refuse,
)
from dqkernels.nn import PackedModule, QLinear
from dqkernels.reporting import rows_columns

__all__ = [
    "Entry",
    "FileFormatError",
    "Manifest",
    "atomic_write",
    "check_complete",
    "check_files",
    "check_folder",
    "check_quantization_config",
    "check_savable",
    "check_shapes",
    "check_values",
    "refuse",
    "rows_columns",
    "save",
    "write_model_card",
]

CARD_FILE = "README.md"
_CARD_MARK = "<!-- written by dqkernels -->"
_RENAME_EXCHANGE = 2  # linux/fs.h
_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.bool: "BOOL",
    **{getattr(torch, f"int{bits}"): f"I{bits}" for bits in (8, 16, 32, 64)},
    **{getattr(torch, f"uint{bits}"): f"U{bits}" for bits in (8, 16, 32, 64)},
}


def check_shapes(model: nn.Module, tensors: Mapping[str, Entry], prefix: str = "") -> set[str]:
    """Holds declared tensors against a built model (its tensors may be on the meta device).

    Args:
        model: the model with its packed modules in place, nothing loaded yet.
        tensors: what `check_files` returned.
        prefix: of a base model whose names a file may have with or without it (`model`, `bert`).

    Returns:
        Names in `model` of the tensors that the file holds.

    Raises:
        FileFormatError: for another shape, or another dtype (between two floats it may differ).
    """
    wanted = model.state_dict()
    found = set()
    for name, entry in tensors.items():
        key = next((k for k in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")) if k in wanted), None)
        if key is None:
            continue
        if entry.shape != tuple(wanted[key].shape):
            refuse(entry.file, f"tensor {name!r}: its shape", list(entry.shape), list(wanted[key].shape))
        # Any float becomes the model's own; whole numbers are never converted.
        same = entry.dtype == _DTYPE_NAMES.get(wanted[key].dtype)
        if not same and not (entry.dtype in manifest.FLOATS and wanted[key].is_floating_point()):
            refuse(entry.file, f"tensor {name!r}: its dtype", entry.dtype, wanted[key].dtype)
        found.add(key)
    return found


def check_complete(model: nn.Module, lacking: set[str], unknown: set[str], file: str | os.PathLike) -> None:
    """Refuses a file that lacks a tensor of a Hugging Face model, or has one that the model has no place for.

    Args:
        model: whose architecture's exceptions are out of both sets already.
        lacking: names in the model that the file did not give.
        unknown: names in the file that the model did not take.
        file: for the message.

    Raises:
        FileFormatError: otherwise. Another class than the saved one may leave tensors over (a model without its
            head): transformers reports them.
    """

    def refuse_names(names: set[str], found: str, wanted: str) -> None:
        # Codes first: they say most about what is wrong.
        first, *more = sorted(names, key=lambda name: (not name.endswith(".qweight"), name))
        also = f" (and {len(more)} more)" if more else ""
        refuse(file, f"tensor {first!r}{also}", found, wanted)

    if lacking:
        refuse_names(lacking, "missing or of another shape", "in the file")
    classes = model.config.architectures
    if unknown and (not classes or type(model).__name__ in classes):
        refuse_names(unknown, "in the file", f"none by this name: {type(model).__name__} has no place for it")


def check_values(model: nn.Module, file: str | os.PathLike = WEIGHTS_FILE) -> None:
    """Checks the numbers of every packed module of a loaded model.

    Raises:
        FileFormatError: for a shape that does not fit its module, a weight_scale that is negative or not
            finite, an act_scale outside 2^-126..2^126, a group_mult outside 1..mult_max, a
            ternary code -2 or an 8-bit code -128.
    """
    seen = set()
    for name, module in model.named_modules():
        if not isinstance(module, PackedModule):
            continue
        layer, scale, mult = module.layer, module.weight_scale, module.group_mult
        if isinstance(module, QLinear) and module.act_scale is not None:
            value = float(module.act_scale) if module.act_scale.numel() == 1 else math.nan
            if not qmath.ACT_SCALE_RANGE[0] <= value <= qmath.ACT_SCALE_RANGE[1]:
                wanted = "one number between 2^-126 and 2^126 (run dqkernels.calibrate first)"
                refuse(file, f"tensor '{name}.act_scale'", value, wanted)
        if id(module.qweight) in seen:
            continue
        seen.add(id(module.qweight))
        rows, columns = rows_columns(module)
        try:
            packing.check_packed(module.qweight, rows, columns, layer.bits)
        except ValueError as error:
            raise FileFormatError(f"{os.fspath(file)}: tensor '{name}.qweight': {error}") from error
        count = 1 if layer.granularity == "per_tensor" else rows
        if scale.dtype != torch.float32 or tuple(scale.shape) != (count,):
            refuse(file, f"tensor '{name}.weight_scale'", f"{scale.dtype} {list(scale.shape)}", f"F32 [{count}]")
        if not bool((torch.isfinite(scale) & (scale >= 0)).all()):
            bad = scale[~(torch.isfinite(scale) & (scale >= 0))][0].item()
            refuse(file, f"tensor '{name}.weight_scale'", bad, "finite and not below 0")
        if mult is not None:
            groups = -(-columns // layer.group_size)
            if mult.dtype != torch.uint8 or tuple(mult.shape) != (rows, groups):
                found = f"{mult.dtype} {list(mult.shape)}"
                refuse(file, f"tensor '{name}.group_mult'", found, f"U8 [{rows}, {groups}]")
            low, high = int(mult.min()), int(mult.max())
            limit = qmath.mult_max(layer.bits, layer.quantizer, columns)
            if low < 1 or high > limit:
                refuse(file, f"tensor '{name}.group_mult'", f"{low}..{high}", f"1..{limit}")
        if layer.quantizer == "ternary" and _has_code_minus_two(module.qweight):
            # With groups it could overflow the int32 sum, whose bound counts on levels -1..1.
            refuse(file, f"tensor '{name}.qweight'", "code -2", "codes -1..1 (ternary)")
        if layer.bits == 8 and _has_code_minus_128(module.qweight):
            # A kernel may give a weight its activation's sign, and int8 has no +128.
            refuse(file, f"tensor '{name}.qweight'", "code -128", "codes -127..127")


def check_savable(state: Mapping[str, torch.Tensor], config_json: str) -> None:
    """Refuses to save what `check_folder` would refuse to load.

    Args:
        state: the tensors to write, by name.
        config_json: what config.json will hold.

    Raises:
        FileFormatError: for a tensor of a dtype or rank that no file may have, too many tensors for one header,
            or a config.json that is too long or names sizes out of bounds.
    """
    where, header, end = "the model to save", {}, 0
    for name, tensor in state.items():
        dtype, shape = _DTYPE_NAMES.get(tensor.dtype), list(tensor.shape)
        if dtype is None:
            refuse(where, f"tensor {name!r}: its dtype", tensor.dtype, f"one of {', '.join(manifest.BYTES)}")
        if len(shape) > manifest.MAX_RANK:
            refuse(where, f"tensor {name!r}: its shape", shape, f"a list of at most {manifest.MAX_RANK} numbers")
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    # Of one file. Several have shorter headers, and an index that is shorter than this as well.
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    if length > manifest.MAX_HEADER_BYTES:
        found = f"{length} bytes for {len(header)} tensors"
        refuse(where, "the header of its weight file", found, f"at most {manifest.MAX_HEADER_BYTES}")
    data = config_json.encode()
    if len(data) > manifest.MAX_JSON_BYTES:
        refuse(where, "its config.json", f"{len(data)} bytes", f"at most {manifest.MAX_JSON_BYTES}")
    manifest.check_sizes(manifest.parse_json(data, where), where, len(header))


def atomic_write(path: str | os.PathLike, data: bytes) -> None:
    """Writes a file so that a reader, or a crash, sees the old bytes or the new ones, never a mixture."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def save(model: nn.Module, folder: str | os.PathLike, tokenizer: Any = None) -> Path:
    """Writes a packed model and its model card; the folder appears whole or not at all.

    Everything goes into a hidden folder beside the target, is checked as `load` would check it, flushed, and
    put in place by one rename (an exchange when the target exists), so a kill leaves the old folder or the
    new one, and perhaps a `.NAME.*.tmp` beside it. Saving over the folder that `model` was loaded from is
    safe: its mapped file lives on until it is closed. Other files of an existing target are kept.

    Args:
        model: a Hugging Face model converted by `quantize_` or loaded packed.
        folder: where to; made if absent.
        tokenizer: anything with `save_pretrained`, saved beside it.

    Returns:
        The folder.

    Raises:
        ValueError: if `model` has no packed module or is not a Hugging Face model.
        FileFormatError: if a value could not be loaded again (an uncalibrated static layer).
    """
    if not any(isinstance(module, PackedModule) for module in model.modules()):
        raise ValueError("model has no packed module: convert it with dqkernels.quantize_(model, config) first")
    if not hasattr(model, "save_pretrained"):
        raise ValueError(
            f"{type(model).__name__} is not a Hugging Face model: save model.state_dict() with safetensors, "
            "and load it into a model quantized with the same DQConfig"
        )
    check_values(model, "the model to save")
    target = Path(os.path.realpath(folder))
    if os.path.lexists(target) and not target.is_dir():
        raise ValueError(f"folder must be a folder or not exist yet, {target} is a file")
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f".{target.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
    fresh.mkdir()
    try:
        model.save_pretrained(fresh)
        if tokenizer is not None:
            tokenizer.save_pretrained(fresh)
        written_as = check_folder(fresh)
        _keep_other_files(target, fresh)
        written = sum(path.stat().st_size for path in written_as.files)
        ratio = reporting.teacher_bytes(model) / max(written, 1)
        write_model_card(fresh, written_as.quantization, ratio, written_as.config.get("architectures"))
        for path in (p for p in fresh.rglob("*") if p.is_file() and not p.is_symlink()):
            sync_file(path)
        put_in_place(fresh, target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return target


def write_model_card(
    folder: str | os.PathLike, config: DQConfig, ratio: float | None = None, architectures: list[str] | None = None
) -> None:
    """Writes README.md: how to load the model, and what it looks like when `import dqkernels` is forgotten.

    Args:
        folder: of the model. A README.md that dqkernels did not write is left alone.
        config: its quantization.
        ratio: bytes of the same model in fp32 over bytes of the weight files, or None.
        architectures: class names, for the title and the Auto class that opens the model with its head.
    """
    path = Path(folder) / CARD_FILE
    if path.exists() and _CARD_MARK not in path.read_text(encoding="utf-8", errors="replace"):
        return
    architecture = (architectures or ["model"])[0]
    auto = reporting.auto_class(architecture) if architectures else "AutoModel"
    size = "" if ratio is None else f" Its weight file is {ratio:.1f} times smaller than the same model in fp32."
    settings = "\n".join(
        f"| `{key}` | `{json.dumps(value)}` |"
        for key, value in config.to_dict().items()
        if key != "quant_method" and value not in (None, [])
    )
    card = f"""---
library_name: transformers
tags: [dqkernels, quantized]
---
{_CARD_MARK}
# {architecture}, packed by dqkernels ({config.name})

Bits are weights-embeddings-activations.{size}

```python
import dqkernels  # first: registers the format with transformers
from transformers import {auto}

model = {auto}.from_pretrained("PATH_OF_THIS_FOLDER")
```

or `model = dqkernels.load("PATH_OF_THIS_FOLDER")`, which checks the folder before it allocates anything.

**Without `import dqkernels`** transformers warns `Unknown quantization type, got dqkernels`, prints a LOAD
REPORT with every `qweight` as UNEXPECTED and every `weight` as MISSING, and goes on with random weights: the
output is noise.

| setting | value |
|---|---|
{settings}
"""
    atomic_write(path, card.encode())


def _has_code_minus_two(qweight: torch.Tensor) -> bool:
    return any(bool(((rows & 0xAA) & ~((rows & 0x55) << 1)).any()) for rows in qweight.split(4096))


def _has_code_minus_128(qweight: torch.Tensor) -> bool:
    return any(bool((rows == 0x80).any()) for rows in qweight.split(4096))


def _keep_other_files(old: Path, fresh: Path) -> None:
    """Files of an existing target that this save does not write (a tokenizer, notes) move along."""
    if not old.is_dir():
        return
    for path in old.iterdir():
        weights = path.name == INDEX_FILE or path.name.endswith((".safetensors", ".bin", ".tmp"))
        if weights or os.path.lexists(fresh / path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, fresh / path.name, symlinks=True)
        else:
            shutil.copy2(path, fresh / path.name, follow_symlinks=False)


def put_in_place(fresh: Path, target: Path) -> None:
    """Gives the finished folder `fresh` the name `target` by one rename, or one exchange with an older `target`.

    After an exchange the older content is left under the name `fresh`, for the caller to remove.
    """
    if not os.path.lexists(target):
        os.rename(fresh, target)
    elif not _exchange(fresh, target):
        # No exchange on this file system: for an instant the old folder is there under the other name only.
        aside = fresh.with_suffix(".old")
        os.rename(target, aside)
        os.rename(fresh, target)
        shutil.rmtree(aside, ignore_errors=True)
    sync_folder(target.parent)


def _exchange(a: Path, b: Path) -> bool:
    """Swaps two paths in one step (Linux renameat2); False where that does not exist."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    here = -100  # AT_FDCWD
    return renameat2(here, os.fsencode(a), here, os.fsencode(b), _RENAME_EXCHANGE) == 0


def sync_file(path: Path) -> None:
    """Returns when the bytes of a file are on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Returns when the names in a folder are on the disk."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:  # a system that cannot open folders has nothing to flush here
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
