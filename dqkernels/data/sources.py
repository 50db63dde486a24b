"""Pairs of source and target from wherever they are: the hub, local files, docstrings, message catalogues.

    from dqkernels.data.sources import load_pairs
    pairs = load_pairs("abisee/cnn_dailymail", "3.0.0", max_train_samples=10_000)
    pairs["train"][0]["source"], pairs["train"][0]["target"]

Arguments are named as the flags of transformers' run_summarization and run_translation. Whatever the origin, the
columns are `source` and `target`. No code of a data set is run: script data sets are refused.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dqkernels.data import docstrings, gettext_catalogues

SPLITS = ("train", "validation", "test")
#: Readers of `datasets` by the ending of a file.
READERS = {
    ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet",
}  # fmt: skip
#: Column names that say by themselves which is which.
_NAMES = (
    ("source", "target"),
    ("text", "summary"),
    ("document", "summary"),
    ("article", "highlights"),
    ("article", "summary"),
    ("dialogue", "summary"),
)
_CARVED_PERCENT = 2  # of a set without splits, for validation and for test each


@dataclass(frozen=True)
class Known:
    """What is known of a data set on the hub.

    Attributes:
        description: one line, part of every result's `info.description`.
        config: its default configuration; `{other}` is the language that is not English.
        columns: of source and target; None for a `translation` column.
        carve: it has a train split only; validation and test are a hash of the source text.
    """

    description: str
    config: str | None = None
    columns: tuple[str, str] | None = None
    carve: bool = False


KNOWN = {
    "abisee/cnn_dailymail": Known("CNN/DailyMail, non-anonymized", "3.0.0", ("article", "highlights")),
    "EdinburghNLP/xsum": Known("XSUM: BBC articles and their one-sentence summaries", None, ("document", "summary")),
    "wmt/wmt16": Known("WMT16 news translation", "{other}-en"),
    "sentence-transformers/eli5": Known(
        "ELI5 substitute: question and answer pairs, NOT the ELI5 splits; results do not compare with ELI5 results",
        "pair",
        ("question", "answer"),
        carve=True,
    ),
}
#: Short names that people know these sets by.
ALIASES = {"cnn_dailymail": "abisee/cnn_dailymail", "xsum": "EdinburghNLP/xsum", "wmt16": "wmt/wmt16"}
_GONE = {
    name: "dataset_name 'eli5' can no longer be loaded (a script, and its text was withdrawn): "
    "sentence-transformers/eli5 is a substitute with other splits"
    for name in ("eli5", "eli5_category", "defunct-datasets/eli5")
}


def need_datasets() -> Any:
    """The package `datasets`, or an ImportError that says how to get it."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError("this needs the package datasets: pip install 'dqkernels[train]'") from error
    return datasets


def load_pairs(
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    *,
    train_file: str | os.PathLike[str] | None = None,
    validation_file: str | os.PathLike[str] | None = None,
    test_file: str | os.PathLike[str] | None = None,
    text_column: str | None = None,
    summary_column: str | None = None,
    source_lang: str | None = None,
    target_lang: str | None = None,
    splits: Sequence[str] | None = None,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    max_predict_samples: int | None = None,
    shuffle_seed: int | None = None,
    held_out_from: str | os.PathLike[str] | None = None,
    need_targets: bool = True,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Any:
    """A `datasets.DatasetDict` of the splits that there are, each with the columns `source` and `target`.

    Args:
        dataset_name: an id on the hub, a folder that `datasets` reads, `docstrings` (bodies and first sentences of
            installed packages) or `gettext` (message catalogues on this machine, see `target_lang`).
        dataset_config_name: configuration of a hub id. For `docstrings`: `base` (default; the packages that reported
            scores are measured on) or `all` that this interpreter can import.
        train_file, validation_file, test_file: csv, tsv, json, jsonl or parquet, instead of `dataset_name`.
        text_column, summary_column: columns of source and target. Known ids need none; otherwise usual names are
            looked for, then the only two columns of text, then (files) the first two.
        source_lang, target_lang: for records `{"translation": {"en": ..., "ro": ...}}` and for `gettext`; `ro_RO`,
            `ron_Latn` and `ro` are the same language.
        splits: what is wanted; default all that there are. A split that is wanted and not there is an error.
        max_train_samples, max_eval_samples, max_predict_samples: most pairs of train, validation, test.
        shuffle_seed: shuffles train; of a validation or test set that is cut, a sample in the order of the file.
            Without one, the first are taken.
        held_out_from: model folder with a `seen.npy`: docstring pairs of validation and test that it was trained on
            are left out.
        need_targets: False also takes sources alone (targets None), for a teacher to write.
        cache_dir: of `datasets`.

    Raises:
        ValueError: in one line, naming the argument: a missing column lists what was found.
        ConnectionError: where the hub is not reachable.
        ImportError: without the package `datasets`.
    """
    datasets = need_datasets()
    files = {"train": train_file, "validation": validation_file, "test": test_file}
    files = {split: Path(path) for split, path in files.items() if path is not None}
    if (dataset_name is None) == (not files):
        wanted = "give either dataset_name or train_file, validation_file or test_file"
        raise ValueError(wanted if dataset_name is None else wanted + ", not both")
    for split in splits or ():
        if split not in SPLITS:
            raise ValueError(f"splits must be of {list(SPLITS)}, got {split!r}")
    if held_out_from is not None and dataset_name != "docstrings":
        raise ValueError("held_out_from is for dataset_name docstrings only")
    languages = (source_lang, target_lang)
    if dataset_name == "docstrings":
        found = _docstrings(datasets, dataset_config_name or "base", splits or SPLITS, held_out_from)
    elif dataset_name == "gettext":
        found = _gettext(datasets, languages, splits or SPLITS)
    elif files:
        wanted = {split: path for split, path in files.items() if splits is None or split in splits}
        found = {split: _file(datasets, split, path, cache_dir) for split, path in wanted.items()}
    else:
        found = _hub(datasets, dataset_name, dataset_config_name, languages, cache_dir)
    if missing := [split for split in splits or () if split not in found]:
        names = ", ".join(files or found)
        raise ValueError(f"the {missing[0]} split is wanted and the data has none; it has {names}")
    known = KNOWN.get(ALIASES.get(dataset_name, dataset_name), Known("")) if dataset_name else Known("")
    limits = {"train": max_train_samples, "validation": max_eval_samples, "test": max_predict_samples}
    done = datasets.DatasetDict()
    for split, data in found.items():
        if split not in (splits or SPLITS):
            continue
        where = str(files[split]) if files else f"{split} split of {dataset_name}"
        if len(data) == 0:
            raise ValueError(f"{where} is empty")
        if set(data.column_names) != {"source", "target"} or dataset_name is None:
            columns = (text_column, summary_column)
            if columns == (None, None) and known.columns:
                columns = known.columns
            data = _two_columns(datasets, data, columns, languages, where, bool(files), need_targets)
        done[split] = _take(data, limits[split], shuffle_seed, shuffle=split == "train", name=split)
        if known.description:
            done[split].info.description = known.description
    return done


# ---- columns ----------------------------------------------------------------------------


def _is_text(feature: Any) -> bool:
    return getattr(feature, "dtype", None) in ("string", "large_string")


def _shown(features: Mapping[str, Any]) -> str:
    """`'a' (string), 'b' (list)` for a message."""
    kinds = {name: getattr(f, "dtype", None) or type(f).__name__.lower() for name, f in features.items()}
    return ", ".join(f"{name!r} ({kind})" for name, kind in kinds.items()) or "no columns"


def _two_columns(datasets, data, columns, languages, where: str, is_file: bool, need_targets: bool):
    """`data` with its two columns found, renamed, and the others dropped."""
    if "translation" in data.column_names and columns == (None, None):
        return _translation(datasets, data, languages, where)
    source, target = _column_names(data.features, columns, where, is_file, need_targets)
    for name in (source, target):
        if name is not None and not _is_text(data.features[name]):
            raise ValueError(f"column {name!r} of {where} must be text; it has {_shown(data.features)}")
    if target is None:
        data = data.select_columns([source]).rename_columns({source: "source"})
        return data.add_column("target", [None] * len(data), feature=datasets.Value("string"))
    data = data.select_columns([source, target])
    if (source, target) != ("source", "target"):
        # By way of names that neither has: the columns may be called target and source.
        data = data.rename_columns({source: "\x00s", target: "\x00t"})
        data = data.rename_columns({"\x00s": "source", "\x00t": "target"})
    return data


def _column_names(features, columns, where: str, is_file: bool, need_targets: bool) -> tuple[str, str | None]:
    """Names of the source and the target column: given, usual, the only two of text, or (files) the first two."""
    for argument, name in zip(("text_column", "summary_column"), columns, strict=True):
        if name is not None and name not in features:
            raise ValueError(f"{argument} {name!r} is not in {where}; it has {_shown(features)}")
    source, target = columns
    if source is not None and source == target:
        raise ValueError(f"text_column and summary_column must differ, both are {source!r}")
    if source is not None and target is not None:
        return source, target
    texts = [name for name, feature in features.items() if _is_text(feature)]
    for names in _NAMES:
        usual = (source or names[0], target or names[1])
        if usual[0] != usual[1] and all(name in texts for name in usual):
            return usual
    if source is not None or target is not None:
        others = [name for name in texts if name not in columns]
        if len(others) == 1:
            return (source, others[0]) if target is None else (others[0], target)
        if source is not None and not need_targets:
            return source, None
    elif len(texts) == 2:
        return texts[0], texts[1]
    elif not need_targets and len(texts) == 1:
        return texts[0], None
    elif is_file and len(features) >= 2 and all(name in texts for name in list(features)[:2]):
        return tuple(list(features)[:2])
    raise ValueError(f"text_column and summary_column must be given for {where}: it has {_shown(features)}")


def _translation(datasets, data, languages, where: str):
    """Two columns of records `{"translation": {"en": ..., "ro": ...}}`."""
    feature = data.features["translation"]
    keys = list(getattr(feature, "languages", None) or (feature if isinstance(feature, Mapping) else ()))
    if not keys:
        raise ValueError(f"column 'translation' of {where} must hold texts by language; it has {_shown(data.features)}")
    names = []
    for argument, code in zip(("source_lang", "target_lang"), languages, strict=True):
        name = _language_key(keys, code)
        if name is None:
            raise ValueError(f"{argument} must be one of {', '.join(keys)} for {where}, got {code!r}")
        names.append(name)
    if names[0] == names[1]:
        raise ValueError(f"source_lang and target_lang must differ, both are {names[0]!r} in {where}")
    return data.map(
        _columns_of_translation,
        batched=True,
        remove_columns=data.column_names,
        features=datasets.Features({"source": datasets.Value("string"), "target": datasets.Value("string")}),
        fn_kwargs={"names": names},
        new_fingerprint=_fingerprint(data._fingerprint, "translation", *names),
    )


def _columns_of_translation(batch, names):
    rows = [row or {} for row in batch["translation"]]
    return {"source": [row.get(names[0]) for row in rows], "target": [row.get(names[1]) for row in rows]}


def _language_key(keys: Sequence[str], code: str | None) -> str | None:
    if code is None or code in keys:
        return code
    base = gettext_catalogues.language_of(code)
    matching = [key for key in keys if gettext_catalogues.language_of(key) == base]
    return matching[0] if len(matching) == 1 else None


def _fingerprint(*parts: Any) -> str:
    return hashlib.sha256("\x00".join(map(str, parts)).encode("utf-8")).hexdigest()[:32]


def _take(data, most: int | None, seed: int | None, *, shuffle: bool, name: str):
    """`data` shuffled and cut, as `load_pairs` says."""
    if most is not None and most < 1:
        argument = {"train": "max_train_samples", "validation": "max_eval_samples"}.get(name, "max_predict_samples")
        raise ValueError(f"{argument} must be at least 1, got {most}")
    count = len(data) if most is None else min(most, len(data))
    if seed is None:
        return data if count == len(data) else data.select(range(count))
    import numpy as np

    order = np.random.default_rng(seed).permutation(len(data))[:count]
    if shuffle:
        return data.select(order)
    return data if count == len(data) else data.select(np.sort(order))


# ---- origins ----------------------------------------------------------------------------


def _docstrings(datasets, config: str, splits, held_out_from) -> dict[str, Any]:
    """Validation pairs are never in train, test pairs in neither, by head and by opening of the body."""
    if config not in ("base", "all"):
        raise ValueError(f"dataset_config_name must be base or all for docstrings, got {config!r}")
    known: set[int] = set()
    if held_out_from is not None:
        import numpy as np

        path = Path(held_out_from, "seen.npy") if Path(held_out_from).is_dir() else Path(held_out_from)
        if not path.is_file():
            raise ValueError(f"held_out_from must be a model folder with a seen.npy, {str(held_out_from)!r} has none")
        known.update(map(int, np.load(path, allow_pickle=False)))
    packages = docstrings.packages_of() if config == "base" else None
    found = {}
    for split in SPLITS[: 1 + max(SPLITS.index(split) for split in splits)]:
        pairs = docstrings.mine(split=split, packages=packages, progress=sys.stderr.isatty())
        if split != "train":
            pairs = docstrings.held_out(pairs, known)
        known.update(docstrings.fingerprints(pairs))
        found[split] = _from_texts(datasets, [pair.body for pair in pairs], [pair.head for pair in pairs])
    return {split: found[split] for split in SPLITS if split in splits}


def _gettext(datasets, languages, splits) -> dict[str, Any]:
    source_lang, target_lang = languages
    if source_lang is None or target_lang is None:
        raise ValueError("source_lang and target_lang must be given for dataset_name gettext")
    english = [gettext_catalogues.language_of(lang) == "en" for lang in languages]
    if english.count(True) != 1:
        raise ValueError(f"one of source_lang and target_lang must be English for gettext, got {', '.join(languages)}")
    pairs = gettext_catalogues.messages(target_lang if english[0] else source_lang)
    found = {}
    for split in splits:
        here = [pair for pair in pairs if gettext_catalogues.split_of(pair.source) == split]
        texts = [pair.source for pair in here], [pair.target for pair in here]
        found[split] = _from_texts(datasets, *(texts if english[0] else texts[::-1]))
    return found


def _from_texts(datasets, sources: list[str], targets: list[str]):
    features = datasets.Features({"source": datasets.Value("string"), "target": datasets.Value("string")})
    return datasets.Dataset.from_dict({"source": sources, "target": targets}, features=features)


def _file(datasets, split: str, path: Path, cache_dir):
    argument = f"{split}_file"
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"{argument} must end in {', '.join(READERS)}, got {str(path)!r}")
    if not path.is_file():
        raise ValueError(f"{argument} must be a file, {str(path)!r} is not there")
    if path.stat().st_size == 0:
        raise ValueError(f"{argument} {str(path)!r} is empty")
    options: dict[str, Any] = {}
    if reader == "csv":
        options = _csv_options(datasets, argument, path)
    elif reader == "json":
        _check_utf8(argument, path)
    try:
        return datasets.load_dataset(
            reader, data_files={split: str(path)}, split=split, cache_dir=cache_dir and str(cache_dir), **options
        )
    except ImportError:
        raise
    except Exception as error:  # whatever pandas and arrow raise for a file that is not what its name says
        reason = _reason(error)
        if (
            "corresponds to no data" in reason or "BatchSize must be greater than 0" in reason
        ):  # a header, nothing below
            raise ValueError(f"{argument} {str(path)!r} is empty") from error
        raise ValueError(f"{argument} {str(path)!r} does not read as {reader}: {reason}") from error


def _check_utf8(argument: str, path: Path) -> None:
    """`datasets` reads bytes that are no UTF-8 as halves of characters, which fail later or train on nonsense."""
    decoder, place = codecs.getincrementaldecoder("utf-8")(), 0
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            try:
                decoder.decode(part)
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{argument} {str(path)!r} must be UTF-8 text: {error}, from byte {place} on"
                ) from error
            place += len(part)


def _csv_options(datasets, argument: str, path: Path) -> dict[str, Any]:
    """All columns as text: pandas would read `NA` as nothing and `007` as 7."""
    separator = "\t" if path.suffix.lower() == ".tsv" else ","
    limit = csv.field_size_limit(sys.maxsize)  # an article may be longer than the default allows
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file, delimiter=separator)
            header = next(rows, [])
            # pandas takes surplus fields for an index, and shifts the columns without a word.
            odd = next((rows.line_num for row in rows if row and len(row) != len(header)), None)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{argument} {str(path)!r} must be UTF-8 text with a line of column names: {error}") from error
    finally:
        csv.field_size_limit(limit)
    if len(set(header)) < len(header) or not header:
        raise ValueError(f"{argument} {str(path)!r} must have a first line of column names that differ, got {header}")
    if odd is not None:
        raise ValueError(f"{argument} {str(path)!r} must have {len(header)} fields in every row, line {odd} has others")
    features = datasets.Features({name: datasets.Value("string") for name in header})
    return {"sep": separator, "features": features, "keep_default_na": False, "encoding": "utf-8-sig"}


def _hub(datasets, name: str, config: str | None, languages, cache_dir) -> dict[str, Any]:
    if name in _GONE:
        raise ValueError(_GONE[name])
    name = ALIASES.get(name, name)
    known = KNOWN.get(name, Known(""))
    config = config or _config_of(known, languages)
    folder = Path(name)
    try:
        if folder.is_dir() and any((folder / file).is_file() for file in ("dataset_dict.json", "state.json")):
            found = datasets.load_from_disk(name)  # as save_to_disk wrote it
        else:
            found = datasets.load_dataset(name, config, cache_dir=cache_dir and str(cache_dir))
    except ImportError:
        raise
    except Exception as error:
        raise _hub_error(name, error) from error
    if not isinstance(found, Mapping):
        found = {"train": found}
    usual = {"dev": "validation", "valid": "validation", "val": "validation"}
    found = {usual.get(split, split): data for split, data in found.items()}
    return _carve(found["train"]) if known.carve and set(found) == {"train"} else found


def _config_of(known: Known, languages) -> str | None:
    if known.config is None or "{other}" not in known.config:
        return known.config
    if None in languages:
        raise ValueError(f"source_lang and target_lang must be given for {known.description}")
    codes = [gettext_catalogues.language_of(lang) for lang in languages]
    others = [code for code in codes if code != "en"]
    if len(others) != 1:
        raise ValueError(f"one of source_lang and target_lang must be English for {known.description}, got {codes}")
    return known.config.format(other=others[0])


def _carve(data) -> dict[str, Any]:
    """Three splits of one, by a hash of the source text."""
    source = next(name for name, feature in data.features.items() if _is_text(feature))
    rows: dict[str, list[int]] = {split: [] for split in SPLITS}
    for number, text in enumerate(data[source][:]):
        bucket = int.from_bytes(hashlib.sha256((text or "").encode("utf-8")).digest()[:8], "big") % 100
        split = "test" if bucket < _CARVED_PERCENT else "validation" if bucket < 2 * _CARVED_PERCENT else "train"
        rows[split].append(number)
    return {split: data.select(numbers) for split, numbers in rows.items()}


def _hub_error(name: str, error: Exception) -> Exception:
    """What went wrong with a hub id, in one line that says what to do."""
    from huggingface_hub import constants

    kinds = {kind.__name__ for one in _chain(error) for kind in type(one).__mro__}
    text = " ".join(str(one) for one in _chain(error))
    if "script" in text and "supported" in text:
        return ValueError(
            f"dataset_name {name!r} is a script, and no code of data sets is run: give train_file instead"
        )
    if constants.HF_HUB_OFFLINE or "OfflineModeIsEnabled" in kinds:
        return ConnectionError(
            f"dataset_name {name!r} is not in the cache and HF_HUB_OFFLINE is set: unset it, or give train_file, "
            "or take dataset_name docstrings or gettext, which need no network"
        )
    # Not every OSError: DatasetNotFoundError is a FileNotFoundError.
    if kinds & {"ConnectionError", "ConnectError", "TimeoutException", "Timeout", "LocalEntryNotFoundError"}:
        return ConnectionError(
            f"dataset_name {name!r} cannot be fetched, the hub is not reachable: check the network, or give "
            "train_file, or take dataset_name docstrings or gettext, which need no network"
        )
    return ValueError(f"dataset_name {name!r} does not load: {_reason(error)}")


def _chain(error: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def _reason(error: Exception) -> str:
    """The first line of what lies at the bottom: `datasets` wraps it in a sentence that says nothing."""
    wrapped = type(error).__name__ == "DatasetGenerationError" and error.__cause__ is not None
    text = str(error.__cause__ if wrapped else error).strip()
    return text.split("\n", 1)[0] or type(error).__name__
