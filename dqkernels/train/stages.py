"""An ordered list of training stages: each its data, epochs and learning rate.

    # stages.yaml: QuillBot's recipe, teacher labels first, gold second
    stages:
      - name: teacher
        train_file: teacher.jsonl        # dqkernels distill-data wrote it
        num_train_epochs: 3
        learning_rate: 3.0e-4
      - name: gold
        dataset_name: abisee/cnn_dailymail
        num_train_epochs: 1
        learning_rate: 1.0e-4

`mix:` takes several sources with weights: `mix: [{train_file: teacher.jsonl, weight: 2}, {dataset_name: xsum}]`.
What a stage does not say is as on the command line. A stage that is finished is not run again.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dqkernels.train.arguments import Arguments, ArgumentsError, DataArguments, read_mapping

#: What a stage or a part of its mix says of its training pairs.
SOURCE_KEYS = ("dataset_name", "dataset_config_name", "train_file", "text_column", "summary_column",
               "max_train_samples", "source_lang", "target_lang")  # fmt: skip
_ORIGINS = ("dataset_name", "train_file")
#: Training arguments that a stage may set; the others belong to the whole run.
TRAINING_KEYS = (
    "num_train_epochs", "max_steps", "learning_rate", "warmup_steps", "lr_scheduler_type", "weight_decay",
    "max_grad_norm", "label_smoothing_factor", "per_device_train_batch_size", "gradient_accumulation_steps", "seed",
    "eval_strategy", "eval_steps", "save_strategy", "save_steps", "logging_steps",
)  # fmt: skip
KD_KEYS = ("kd", "kd_logits", "kd_temperature", "kd_masked")


@dataclass(frozen=True)
class Source:
    """Training pairs: arguments of `load_pairs`, and how much of a mix they are."""

    arguments: Mapping[str, Any]
    weight: float = 1.0


@dataclass(frozen=True)
class Stage:
    """One stage: where its pairs come from, and the flags it runs with.

    Attributes:
        name: letters, digits, `-` and `_`; part of the folder's name.
        sources: one, or the parts of a mix.
        arguments: of the whole run, with this stage's changes.
    """

    name: str
    sources: tuple[Source, ...]
    arguments: Arguments


def source_of(data: DataArguments) -> Source:
    """The training pairs that the command line names."""
    return Source({key: getattr(data, key) for key in SOURCE_KEYS})


def read(path: str | Path, arguments: Arguments) -> list[Stage]:
    """The stages of a file, checked whole before the first one starts.

    Raises:
        ArgumentsError: for an unknown key, a wrong value, a name that comes twice, or no stage at all.
    """
    found = read_mapping(Path(path))
    if set(found) != {"stages"} or not isinstance(found["stages"], list) or not found["stages"]:
        raise ArgumentsError(f"{path} must hold one key, stages: a list of at least one stage")
    stages = [_stage(entry, i, arguments, str(path)) for i, entry in enumerate(found["stages"], 1)]
    names = [stage.name for stage in stages]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ArgumentsError(f"{path}: two stages are called {twice[0]!r}")
    return stages


def _stage(entry: Any, number: int, arguments: Arguments, path: str) -> Stage:
    where = f"{path}, stage {number}"
    if not isinstance(entry, Mapping):
        raise ArgumentsError(f"{where}: must be a mapping of names to values, got {entry!r}")
    entry = dict(entry)
    name = str(entry.pop("name", f"stage{number}"))
    if not re.fullmatch(r"[\w-]+", name):
        raise ArgumentsError(f"{where}: name must be letters, digits, - and _, got {name!r}")
    mix = entry.pop("mix", None)
    own = {key: entry.pop(key) for key in SOURCE_KEYS if key in entry}
    if mix is not None:
        if not isinstance(mix, list) or not mix:
            raise ArgumentsError(f"{where}: mix must be a list of sources, got {mix!r}")
        if own:
            raise ArgumentsError(f"{where}: {', '.join(own)} beside mix: each source of the mix says that for itself")
        sources = tuple(_source(part, arguments.data, f"{where}, mix") for part in mix)
    else:
        sources = (_source(own, arguments.data, where),)
    changed = copy.deepcopy(arguments)
    groups = {"training": changed.training, "quantization": changed.quantization}
    fields = {**dict.fromkeys(TRAINING_KEYS, "training"), **dict.fromkeys(KD_KEYS, "quantization")}
    updates: dict[str, dict[str, Any]] = {group: {} for group in groups}
    for key, value in entry.items():
        group = fields.get(key)
        if group is None:
            known = ["name", "mix", *SOURCE_KEYS, *KD_KEYS, *TRAINING_KEYS]
            raise ArgumentsError(f"{where}: no such key: {key!r}; a stage may set {', '.join(known)}")
        updates[group][key] = value
    for group, values in updates.items():
        for key, value in values.items():
            setattr(groups[group], key, _typed(key, value, getattr(groups[group], key), where))
    try:
        changed.kd()
    except ValueError as error:
        raise ArgumentsError(f"{where}: {error}") from None
    return Stage(name, sources, changed)


def _source(entry: Any, data: DataArguments, where: str) -> Source:
    if not isinstance(entry, Mapping):
        raise ArgumentsError(f"{where}: a source must be a mapping, got {entry!r}")
    entry = dict(entry)
    weight = entry.pop("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
        raise ArgumentsError(f"{where}: weight must be a number above 0, got {weight!r}")
    if unknown := sorted(set(entry) - set(SOURCE_KEYS)):
        raise ArgumentsError(f"{where}: no such key of a source: {unknown[0]!r}; known are {', '.join(SOURCE_KEYS)}")
    base = {key: getattr(data, key) for key in SOURCE_KEYS}
    if any(key in entry for key in _ORIGINS):  # another origin: what describes the first one does not hold
        base = {key: base[key] if key in ("source_lang", "target_lang", "max_train_samples") else None for key in base}
    return Source({**base, **entry}, float(weight))


def _typed(key: str, value: Any, old: Any, where: str) -> Any:
    """YAML reads 1e-4 as text; a number must be one here."""
    if isinstance(old, bool) or old is None or isinstance(old, str) or not isinstance(old, int | float):
        return value
    try:
        return type(old)(value) if not isinstance(old, int) else (int(value) if float(value) == int(value) else value)
    except (TypeError, ValueError):
        raise ArgumentsError(f"{where}: {key} must be a number, got {value!r}") from None
