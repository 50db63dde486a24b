"""Pairs of texts to token ids for training, and the batches that a trainer takes.

    setup = set_up(model, tokenizer, task="summarization")
    train, lengths = prepare(pairs["train"], tokenizer, source_prefix=setup.source_prefix)
    print(lengths)
    batches = collator(tokenizer, model=model, pad_to_multiple_of=16)

What is written to the cache of `datasets` is named by the pairs, the tokenizer's vocabulary and every setting; the
library's own name for it also depends on what the tokenizer was called with before.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import DataCollatorForSeq2Seq

from dqkernels import text
from dqkernels.data.sources import need_datasets

logger = logging.getLogger("dqkernels")

IGNORED = -100  # label of a position without loss
_FORMAT = 1  # of the rows that `prepare` writes: part of their name in the cache
_BATCH = 1000  # rows tokenized at once
_COUNTS = ("source_tokens", "target_tokens")


@dataclass(frozen=True)
class Setup:
    """What a task and a pair of languages ask for.

    Attributes:
        source_prefix: to be put before every source.
        generate_options: for `model.generate`; the language ids among them stand in the model's
            `generation_config` already.
    """

    source_prefix: str = ""
    generate_options: Mapping[str, Any] = field(default_factory=dict)


def set_up(
    model,
    tokenizer,
    *,
    task: str | None = None,
    source_prefix: str | None = None,
    source_lang: str | None = None,
    target_lang: str | None = None,
) -> Setup:
    """Readies a tokenizer and a model for a task: languages, and what a trained copy must remember of them.

    A multilingual tokenizer (mBART, M2M100, NLLB) gets its `src_lang` and `tgt_lang`; the model's
    `generation_config` gets `forced_bos_token_id`, or (mBART-25) `decoder_start_token_id`.

    Args:
        task: `summarization` or `translation`; the prefix is that of `config.task_specific_params`.
        source_prefix: another prefix than that.

    Raises:
        ValueError: as `dqkernels.text.task_options`: an unknown task or language, or none where one is needed.
    """
    languages = model_languages(model, tokenizer, task, source_lang, target_lang)
    prefix, options = text.task_options(model, tokenizer, task, *languages)
    for name in ("forced_bos_token_id", "decoder_start_token_id"):
        if name in options and getattr(model, "generation_config", None) is not None:
            setattr(model.generation_config, name, options[name])
    prefix = prefix if source_prefix is None else source_prefix
    if not prefix and getattr(model.config, "model_type", "") in ("t5", "mt5", "umt5"):
        logger.info("a T5 model and no source_prefix: published checkpoints expect one, such as 'summarize: '")
    return Setup(prefix, options)


def model_languages(
    model, tokenizer, task: str | None, source_lang: str | None, target_lang: str | None
) -> tuple[str | None, str | None]:
    """The languages as far as the model is told of them; those of the data alone (opus-mt-en-ro, BART) become None.

    Raises:
        ValueError: if only one is given where the tokenizer has languages.
    """
    if hasattr(tokenizer, "src_lang"):
        if (source_lang is None) != (target_lang is None):
            raise ValueError("source_lang and target_lang must be given together for a multilingual tokenizer")
        return source_lang, target_lang
    # Languages may be part of the text: T5's prefixes, Marian's >>fra<<.
    stored = getattr(model.config, "task_specific_params", None) or {}
    spelled = getattr(tokenizer, "supported_language_codes", None) or any(
        key.startswith("translation_") for key in stored
    )
    return (source_lang, target_lang) if task == "translation" and spelled else (None, None)


# ---- rows -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lengths:
    """What became of the pairs; lengths are in tokens, before anything was cut.

    Attributes:
        pairs: rows that are left.
        dropped: pairs without a source or a target.
        source_cut, target_cut: rows that were longer than their limit.
        longest_source, longest_target: the longest.
        mean_source, mean_target: means.
    """

    pairs: int
    dropped: int
    source_cut: int
    target_cut: int
    longest_source: int
    longest_target: int
    mean_source: float
    mean_target: float
    max_source_length: int
    max_target_length: int

    def __str__(self) -> str:
        lines = [f"{self.pairs} pairs"]
        if self.dropped:
            lines[0] += f" ({self.dropped} without source or target dropped)"
        for name in ("source", "target"):
            longest, mean = getattr(self, f"longest_{name}"), getattr(self, f"mean_{name}")
            cut, limit = getattr(self, f"{name}_cut"), getattr(self, f"max_{name}_length")
            share = 100 * cut / max(1, self.pairs)
            lines.append(f"{name}: mean {mean:.1f}, longest {longest} tokens; {cut} ({share:.1f} %) cut at {limit}")
        return "\n".join(lines)


def prepare(
    pairs,
    tokenizer,
    *,
    source_prefix: str = "",
    max_source_length: int = 1024,
    max_target_length: int = 128,
    pad_to_max_length: bool = False,
    num_proc: int | None = None,
    load_from_cache_file: bool = True,
) -> tuple[Any, Lengths]:
    """A `datasets.Dataset` with `input_ids`, `attention_mask` and `labels`, in the order of `pairs`, and its lengths.

    Args:
        pairs: a `datasets.Dataset` with the columns `source` and `target` (`dqkernels.data.sources.load_pairs`).
        tokenizer: its `src_lang` and `tgt_lang` are as `set_up` left them.
        source_prefix: put before every source.
        max_source_length, max_target_length: limits in tokens, end and language tokens included.
        pad_to_max_length: pad every row to the limits (labels with -100) instead of every batch to its longest.
        num_proc: processes that tokenize (`preprocessing_num_workers`); the result does not depend on it.

    Raises:
        ValueError: for a missing column, a limit below 2, or if no pair is left.
    """
    need_datasets()
    for name in ("source", "target"):
        if name not in pairs.column_names:
            columns = ", ".join(pairs.column_names)
            raise ValueError(f"pairs must have the columns source and target, they have {columns}")
    for name, limit in (("max_source_length", max_source_length), ("max_target_length", max_target_length)):
        if limit < 2:
            raise ValueError(f"{name} must be at least 2, got {limit}")
    if num_proc is not None and num_proc < 1:
        raise ValueError(f"num_proc must be at least 1, got {num_proc}")
    settings = {
        "format": _FORMAT,
        "prefix": source_prefix,
        "limits": [max_source_length, max_target_length],
        "pad": pad_to_max_length,
    }
    name = f"{pairs._fingerprint}|{tokenizer_fingerprint(tokenizer)}|{json.dumps(settings)}"
    rows = pairs.map(
        _tokenize,
        batched=True,
        batch_size=_BATCH,
        fn_kwargs={
            "tokenizer": tokenizer,
            "prefix": source_prefix,
            "limits": (max_source_length, max_target_length),
            "pad": pad_to_max_length,
        },
        remove_columns=pairs.column_names,
        num_proc=None if num_proc is None else min(num_proc, max(1, len(pairs))),
        load_from_cache_file=load_from_cache_file,
        new_fingerprint=hashlib.sha256(name.encode("utf-8")).hexdigest()[:32],
        desc="tokenize",
    )
    if len(rows) == 0:
        raise ValueError(f"none of {len(pairs)} pairs has both a source and a target")
    lengths = _lengths(rows, len(pairs), max_source_length, max_target_length)
    return rows.remove_columns(list(_COUNTS)), lengths


def _tokenize(batch, tokenizer, prefix: str, limits: tuple[int, int], pad: bool) -> dict[str, list]:
    kept = [
        (source, target)
        for source, target in zip(batch["source"], batch["target"], strict=True)
        if source and target and source.strip() and target.strip()
    ]
    columns: dict[str, list] = {name: [] for name in ("input_ids", "attention_mask", "labels", *_COUNTS)}
    if not kept:
        return columns
    sources, columns["source_tokens"] = _ids(tokenizer, [prefix + source for source, _ in kept], limits[0])
    labels, columns["target_tokens"] = _ids(tokenizer, [target for _, target in kept], limits[1], target=True)
    for ids, label in zip(sources, labels, strict=True):
        gap = limits[0] - len(ids) if pad else 0
        padding, mask = [tokenizer.pad_token_id] * gap, [1] * len(ids)
        if tokenizer.padding_side == "left":
            ids, mask = padding + ids, [0] * gap + mask
        else:
            ids, mask = ids + padding, mask + [0] * gap
        columns["input_ids"].append(ids)
        columns["attention_mask"].append(mask)
        columns["labels"].append(label + [IGNORED] * (limits[1] - len(label) if pad else 0))
    return columns


def _ids(tokenizer, texts: list[str], limit: int, target: bool = False) -> tuple[list[list[int]], list[int]]:
    """Ids cut at `limit` by the tokenizer, which keeps end and language tokens, and how many there were."""

    def run(texts: list[str], **options) -> list[list[int]]:
        given = {"text_target": texts} if target else {"text": texts}
        return [list(ids) for ids in tokenizer(**given, verbose=False, **options)["input_ids"]]

    full = run(texts, truncation=False)
    counts = [len(ids) for ids in full]
    long = [number for number, count in enumerate(counts) if count > limit]
    if long:
        for number, ids in zip(long, run([texts[n] for n in long], truncation=True, max_length=limit), strict=True):
            full[number] = ids
    return full, counts


def _lengths(rows, pairs: int, max_source: int, max_target: int) -> Lengths:
    import numpy as np

    sources, targets = (np.asarray(rows.with_format("numpy")[name][:], dtype=np.int64) for name in _COUNTS)
    return Lengths(
        pairs=len(rows),
        dropped=pairs - len(rows),
        source_cut=int((sources > max_source).sum()),
        target_cut=int((targets > max_target).sum()),
        longest_source=int(sources.max()),
        longest_target=int(targets.max()),
        mean_source=float(sources.mean()),
        mean_target=float(targets.mean()),
        max_source_length=max_source,
        max_target_length=max_target,
    )


def tokenizer_fingerprint(tokenizer) -> str:
    """A hash of all that decides what ids a tokenizer gives: its rules, vocabulary and languages, and not the
    truncation or padding that it was last called with."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        state["truncation"] = state["padding"] = None
    else:
        state = {"vocab": tokenizer.get_vocab(), "init": {k: str(v) for k, v in tokenizer.init_kwargs.items()}}
    state = {
        "class": type(tokenizer).__name__,
        "state": state,
        "languages": [getattr(tokenizer, name, None) for name in ("src_lang", "tgt_lang")],
        "sides": [tokenizer.padding_side, tokenizer.truncation_side],
        "pad": tokenizer.pad_token_id,
    }
    return hashlib.sha256(json.dumps(state, sort_keys=True, default=str).encode("utf-8")).hexdigest()[:32]


# ---- batches ----------------------------------------------------------------------------


class PairCollator(DataCollatorForSeq2Seq):
    """`DataCollatorForSeq2Seq` that gives `decoder_input_ids` for every family; see `collator`."""

    def __call__(self, features, return_tensors=None):
        batch = super().__call__(features, return_tensors)
        if self.model is not None and "decoder_input_ids" not in batch and batch.get("labels") is not None:
            batch["decoder_input_ids"] = shifted(batch["labels"], self.model.config)
        return batch


def collator(tokenizer, model=None, pad_to_multiple_of: int | None = None) -> PairCollator:
    """transformers' `DataCollatorForSeq2Seq`: ids padded to the longest row, labels with -100, `decoder_input_ids`.

    Args:
        model: builds `decoder_input_ids` from the labels, as its family shifts them; one without a rule of its own
            (M2M100, NLLB) starts from its `decoder_start_token_id`. None leaves them out.
        pad_to_multiple_of: round lengths up; 16 suits 8-bit tensor cores.
    """
    return PairCollator(tokenizer, model=model, label_pad_token_id=IGNORED, pad_to_multiple_of=pad_to_multiple_of)


def shifted(labels, config):
    """Labels one step to the right behind the start token, for families without a rule of their own (M2M100, NLLB).

    Args:
        labels: ids [rows, length], -100 where there is none.
        config: of the model.

    Raises:
        ValueError: if the config lacks decoder_start_token_id or pad_token_id.
    """
    start, pad = (getattr(config, name, None) for name in ("decoder_start_token_id", "pad_token_id"))
    if start is None or pad is None:
        raise ValueError("the model's config must have decoder_start_token_id and pad_token_id")
    moved = labels.new_full(labels.shape, start)
    moved[:, 1:] = labels[:, :-1]
    return moved.masked_fill(moved == IGNORED, pad)
