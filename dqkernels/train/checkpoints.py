"""Checkpoints of a training run: whole or ignored, without pickle, and enough to go on with the same bits.

A checkpoint is a folder `checkpoint-N` (N optimizer steps done), written under a hidden name, flushed, given its
marker file last, and put in place by one rename. The marker lists every file with its size: a folder without it, or
with a file missing or cut short, is incomplete and never resumed from. Beside the model the folder holds

    training_state.safetensors  optimizer, scheduler, gradient scaler, the logging window
    rng_state.safetensors       states of the random number generators, one row per process
    training_arguments.json     training arguments and distillation weights, to notice a resume with other ones
    trainer_state.json          of transformers

No file of a checkpoint is ever unpickled: `pack` and `unpack` turn nested Python values into JSON and named tensors.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import re
import shutil
import struct
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dqkernels.serialize import atomic_write, put_in_place, sync_file, sync_folder

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
MARKER = "dqkernels_checkpoint.json"
STATE_FILE = "training_state.safetensors"
RNG_FILE = "rng_state.safetensors"
ARGUMENTS_FILE = "training_arguments.json"
_PREFIX = "checkpoint-"
_NAME = re.compile(r"checkpoint-(\d+)")
_HIDDEN = re.compile(r"\.checkpoint-\d+\.[0-9]+-[0-9a-f]{8}\.(tmp|old)")

#: Training arguments that change what a step computes, or which examples it sees.
MATHS = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "optim",
    "optim_args",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "seed",
    "data_seed",
    "train_sampling_strategy",
    "dataloader_drop_last",
    "neftune_noise_alpha",
    "bf16",
    "fp16",
)
#: Arguments whose change is what a resume is sometimes for: a longer run, with the schedule stretched to it.
LENGTH = ("num_train_epochs", "max_steps")


class CheckpointError(ValueError):
    """A checkpoint that is incomplete, of another version, or does not fit the model or the arguments."""


# ----------------------------------------------------------------------------------------------- values and tensors


def pack(value: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """Splits nested Python values into JSON and named tensors.

    Args:
        value: None, bool, int, float, str, tensors, and lists, tuples and dicts of them (keys str or int), such as
            `optimizer.state_dict()`.

    Returns:
        Plain JSON (floats survive exactly: Python writes the shortest digits that read back as the same double), and
        the tensors it refers to, by path. Tensors that share memory are copied.

    Raises:
        TypeError: for anything else, naming where it was found: it could only be stored as a pickle.
    """
    tensors: dict[str, torch.Tensor] = {}

    def walk(value: Any, path: str) -> Any:
        if isinstance(value, np.generic):
            value = value.item()
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, torch.Tensor):
            if type(value) not in (torch.Tensor, torch.nn.Parameter) or value.layout != torch.strided:
                raise TypeError(f"{path} is a {type(value).__name__}, which cannot be stored without pickle")
            value = value.detach()
            owns = value.is_contiguous() and value.untyped_storage().nbytes() == value.numel() * value.element_size()
            tensors[path] = value if owns else value.clone(memory_format=torch.contiguous_format)
            return {"tensor": path}
        if isinstance(value, list | tuple):
            kind = "list" if isinstance(value, list) else "tuple"
            return {kind: [walk(item, f"{path}.{i}") for i, item in enumerate(value)]}
        if isinstance(value, Mapping):
            for key in value:
                if type(key) not in (str, int):
                    raise TypeError(f"{path} has a key {key!r}, which cannot be stored without pickle")
            return {"dict": [[key, walk(item, f"{path}.{key}")] for key, item in value.items()]}
        raise TypeError(f"{path} is a {type(value).__name__}, which cannot be stored without pickle")

    return walk(value, "state"), tensors


def unpack(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """What `pack` was given, from what it returned."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: unpack(item, tensors) for key, item in content}
    items = [unpack(item, tensors) for item in content]
    return items if kind == "list" else tuple(items)


def save_state(path: Path, value: Any) -> None:
    """Writes nested values (`pack`) as one safetensors file."""
    plain, tensors = pack(value)
    # One string: safetensors writes several in an order of its own, and equal states are to be equal files.
    metadata = json.dumps({"format_version": FORMAT_VERSION, "state": plain})
    save_file(tensors, path, metadata={"dqkernels": metadata})


def load_state(path: Path) -> Any:
    """Reads a file of `save_state`; tensors on the CPU. Raises `CheckpointError` where it is not one."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {})["dqkernels"])
            _check_version(metadata.get("format_version"), path)
            return unpack(metadata["state"], {name: file.get_tensor(name) for name in file.keys()})
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _check_version(version: Any, path: Path) -> None:
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path} has format version {version}, this release reads {FORMAT_VERSION}")


# -------------------------------------------------------------------------------------------------- random numbers


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """States of the generators of Python, numpy, torch on the CPU and torch on `device`, as integer tensors."""
    version, words, gauss = random.getstate()
    numpy = np.random.get_state(legacy=False)
    key, position = numpy["state"]["key"], numpy["state"]["pos"]
    state = {
        "python": torch.tensor([version, *words, gauss is not None, _bits(gauss)], dtype=torch.int64),
        "numpy": torch.tensor([*key.tolist(), position, numpy["has_gauss"], _bits(numpy["gauss"])], dtype=torch.int64),
        "torch_cpu": torch.random.get_rng_state(),
    }
    if device.type != "cpu":
        state["torch_device"] = torch.get_device_module(device).get_rng_state(device)
    return state


def set_rng_state(state: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Puts the generators into a state of `rng_state`; one of a device that was not there is left alone."""
    version, *words, has_gauss, gauss = state["python"].tolist()
    random.setstate((version, tuple(words), _float(gauss) if has_gauss else None))
    *key, position, has_gauss, gauss = state["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(key, dtype=np.uint32), position, has_gauss, _float(gauss)))
    # Cloned: torch 2.13 reads past a state that does not start where its storage does (a row of several).
    torch.random.set_rng_state(state["torch_cpu"].clone())
    if device.type != "cpu" and "torch_device" in state:
        torch.get_device_module(device).set_rng_state(state["torch_device"].clone(), device)


@contextlib.contextmanager
def kept_rng(device: torch.device) -> Iterator[None]:
    """The generators stand after the block where they stood before it."""
    state = rng_state(device)
    try:
        yield
    finally:
        set_rng_state(state, device)


def _bits(value: float | None) -> int:
    return struct.unpack("<q", struct.pack("<d", value or 0.0))[0]


def _float(bits: int) -> float:
    return struct.unpack("<d", struct.pack("<q", bits))[0]


# -------------------------------------------------------------------------------------------------------- folders


@contextlib.contextmanager
def writing(target: Path, *, resumable: bool = True) -> Iterator[Path]:
    """A hidden folder to write a checkpoint into, which becomes `target` at the end of the block, or vanishes.

    At the end every file is flushed to the disk, then the marker is written, then the folder is renamed (or exchanged
    with an older `target` in one step, where the system can). A kill at any moment leaves what was there before.

    Args:
        target: `.../checkpoint-N`.
        resumable: whether the block writes a training state too, not the model alone.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f".{target.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
    fresh.mkdir()
    try:
        yield fresh
        files = sorted(path for path in fresh.rglob("*") if path.is_file())
        for path in files:
            sync_file(path)
        sizes = {path.relative_to(fresh).as_posix(): path.stat().st_size for path in files}
        marker = {"format_version": FORMAT_VERSION, "step": step_of(target), "resumable": resumable, "files": sizes}
        for folder in (path for path in fresh.rglob("*") if path.is_dir()):
            sync_folder(folder)
        atomic_write(fresh / MARKER, json.dumps(marker, indent=1).encode())
        put_in_place(fresh, target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


@contextlib.contextmanager
def replacing_files(folder: Path) -> Iterator[Path]:
    """A hidden folder whose files move into `folder` at the end of the block, each by one rename.

    Other files of `folder` stay. A kill leaves each file old or new, never a part of one.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    fresh = folder / f".saving.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp"
    fresh.mkdir()
    try:
        yield fresh
        files = sorted(path for path in fresh.rglob("*") if path.is_file())
        for path in files:
            sync_file(path)
        for path in files:
            place = folder / path.relative_to(fresh)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, place)
        sync_folder(folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def step_of(folder: Path) -> int:
    """N of `checkpoint-N`. Raises ValueError for another name."""
    match = _NAME.fullmatch(Path(folder).name)
    if match is None:
        raise ValueError(f"a checkpoint is called checkpoint-N, got {Path(folder).name}")
    return int(match[1])


def why_not(folder: Path) -> str | None:
    """Why training cannot resume from a folder, as the end of a sentence; None where it can."""
    folder = Path(folder)
    try:
        marker = json.loads((folder / MARKER).read_bytes())
        version, files, resumable = marker["format_version"], dict(marker["files"]), marker["resumable"]
    except FileNotFoundError:
        return f"has no {MARKER}, which is written last: the run was killed while saving, or another program wrote it"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"has an unreadable {MARKER} ({error})"
    if version != FORMAT_VERSION:
        return f"has format version {version}, this release reads {FORMAT_VERSION}"
    for name, size in files.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            return f"has {'no ' + name if found is None else f'{found} of {size} bytes of {name}'}"
    return None if resumable else "holds the model alone (save_only_model=True)"


def newest(folder: Path) -> tuple[Path | None, dict[Path, str]]:
    """The checkpoint of a run's folder to resume from, and those that cannot be, each with the reason.

    Returns:
        The resumable `checkpoint-N` of the highest N or None, and `{folder: why_not}` of the others among the newer.
    """
    candidates = [path for path in Path(folder).glob(f"{_PREFIX}*") if path.is_dir() and _NAME.fullmatch(path.name)]
    rejected: dict[Path, str] = {}
    for path in sorted(candidates, key=step_of, reverse=True):
        reason = why_not(path)
        if reason is None:
            return path, rejected
        rejected[path] = reason
    return None, rejected


def rotate(folder: Path, limit: int | None, keep: tuple[Path, ...]) -> list[Path]:
    """Removes the oldest checkpoints beyond `limit`, and what killed saves left behind; returns the removed.

    Never removed: `keep` (the best and the one just written), the newest that can be resumed from, and folders without
    a marker, which are none of ours. A folder is renamed before its files are removed, so a kill in between leaves no
    half of a checkpoint under its name.

    Args:
        folder: of the run, written by this process alone.
        limit: how many checkpoints stay; None or 0: all.
        keep: checkpoints that stay whatever the limit.
    """
    folder = Path(folder)
    for path in folder.iterdir():
        if _HIDDEN.fullmatch(path.name) and path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
    if not limit or limit < 0:
        return []
    last, _ = newest(folder)
    kept = {Path(path).resolve() for path in (*keep, *([last] if last else []))}
    found = [path for path in folder.glob(f"{_PREFIX}*") if path.is_dir() and _NAME.fullmatch(path.name)]
    whole = sorted((path for path in found if (path / MARKER).is_file()), key=step_of)
    excess = len(whole) - max(limit, len(kept))
    doomed = [path for path in whole if path.resolve() not in kept][: max(excess, 0)]
    for path in doomed:
        logger.info("removing %s: save_total_limit=%s", path, limit)
        aside = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.old")
        os.rename(path, aside)
        shutil.rmtree(aside, ignore_errors=True)
    return doomed


# ------------------------------------------------------------------------------------------------------- contents


def load_weights(model: torch.nn.Module, folder: Path) -> None:
    """Reads the model of a checkpoint into `model`, in place and strictly.

    Raises:
        CheckpointError: where a tensor is missing, unknown or of another shape. A name that the file leaves out
            because its tensor is tied to one that is there counts as present, so does what the class itself never
            saves (constant position tables).
    """
    files = sorted(Path(folder).glob("model*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} has no model.safetensors")
    tensors: dict[str, torch.Tensor] = {}
    for path in files:
        tensors.update(load_file(path))
    own = model.state_dict(keep_vars=True)
    loaded = {_place(own[name]) for name in tensors if name in own}
    ignored = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_save", None) or ()]
    missing = [
        name
        for name, tensor in own.items()
        if name not in tensors and _place(tensor) not in loaded and not any(p.search(name) for p in ignored)
    ]
    unknown = sorted(set(tensors) - set(own))
    shapes = [f"{name} {list(t.shape)}" for name, t in tensors.items() if name in own and own[name].shape != t.shape]
    problems = [(missing, "lacks"), (unknown, "has unknown"), (shapes, "has another shape of")]
    for names, what in problems:
        if names:
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            raise CheckpointError(f"the model of {folder} {what} {', '.join(names[:4])}{more}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)


def _place(tensor: torch.Tensor) -> tuple:
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride()


def save_rng(path: Path, rows: Mapping[str, torch.Tensor]) -> None:
    """Writes generator states, [processes, n] each."""
    save_file({name: rows_.cpu().contiguous() for name, rows_ in rows.items()}, path)


def load_rng(path: Path) -> dict[str, torch.Tensor]:
    """Reads `save_rng`'s file."""
    return load_file(path)


def save_arguments(path: Path, arguments: Mapping[str, Any]) -> None:
    """Writes what `compare_arguments` compares, as JSON."""
    data = {"format_version": FORMAT_VERSION, **_plain(arguments)}
    path.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def load_arguments(path: Path) -> dict[str, Any]:
    """Reads `save_arguments`' file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    _check_version(data.pop("format_version", None), path)
    return data


def compare_arguments(stored: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Differences between a checkpoint's arguments and this run's that change the numbers.

    Args:
        stored, now: `{"arguments": TrainingArguments.to_dict(), "kd": ..., "world_size": ..., "train_examples": ...}`.

    Returns:
        Sentences `name: was X, is now Y`: of what makes it another run, and of its length alone.
    """
    now = _plain(now)
    arguments, other = dict(stored["arguments"]), dict(now["arguments"])

    def differing(names: tuple[str, ...]) -> list[str]:
        return [
            f"{name}: was {arguments.get(name)!r}, is now {other.get(name)!r}"
            for name in names
            if arguments.get(name) != other.get(name)
        ]

    changed = differing(MATHS)
    for part in sorted((set(stored) | set(now)) - {"arguments"}):
        before, after = stored.get(part), now.get(part)
        if isinstance(before, dict) and isinstance(after, dict):
            for key in sorted(set(before) | set(after)):
                if before.get(key) != after.get(key):
                    changed.append(f"{part}.{key}: was {before.get(key)!r}, is now {after.get(key)!r}")
        elif before != after:
            changed.append(f"{part}: was {before!r}, is now {after!r}")
    return changed, differing(LENGTH)


def _plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON would give it back (tuples become lists)."""
    return json.loads(json.dumps(value, default=str))
