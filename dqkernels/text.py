"""Texts in, texts out: batches by length, prefixes and language codes, around a model's own `generate`.

transformers 5 has no summarization or translation pipeline; `generate_texts` is the short form of one, for
float and packed models alike. Floor: just above `hf`. It knows tokenizers and `generate`, no files of models.

    texts = generate_texts(model, tokenizer, ["first", "second"], task="summarization", num_beams=4)
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tqdm.auto import tqdm

from dqkernels import decode, reporting

logger = logging.getLogger("dqkernels")

TASKS = ("summarization", "translation")
#: Batches that are sorted by length together; a stream answers after at most so many.
WINDOW_BATCHES = 64
#: Tokenizers without a limit say 1e30.
_NO_LIMIT = 1_000_000
#: Tokens generated where neither the caller, nor the task, nor the model says how many.
_DEFAULT_NEW_TOKENS = 128
#: What a model with neither a tokenizer limit nor learned positions is cut at.
_DEFAULT_SOURCE = 1024


def generate_texts(model, tokenizer, texts: Iterable[str], **options: Any) -> list[str]:
    """All outputs for `texts`, in their order. Arguments as `stream_texts`."""
    return list(stream_texts(model, tokenizer, texts, **options))


def stream_texts(
    model,
    tokenizer,
    texts: Iterable[str],
    *,
    task: str | None = None,
    batch_size: int = 16,
    max_source_length: int | None = None,
    source_prefix: str | None = None,
    source_lang: str | None = None,
    target_lang: str | None = None,
    progress: bool | Callable[[int], Any] = False,
    total: int | None = None,
    warn_cut: bool = True,
    plain: bool = False,
    **generate_options: Any,
) -> Iterator[str]:
    """Yields one output per text, in the order of `texts`, while it batches texts of like length.

    Args:
        model: a Hugging Face encoder-decoder, float or packed.
        tokenizer: its tokenizer.
        texts: any iterable; it is read in windows of `64 * batch_size`. A blank text gives an empty output.
        task: `summarization` or `translation` takes the model's own parameters of that task
            (`config.task_specific_params`), its prefix included; None takes `generation_config` alone.
        batch_size: texts generated at once.
        max_source_length: tokens a source is cut at; default what tokenizer and model allow.
        source_prefix: put before every text; default the prefix of the task.
        source_lang, target_lang: codes as the tokenizer spells them (`en_XX`, `eng_Latn`, `en`).
        progress: show a bar where stderr is a terminal; or a function that is told how many are done.
        total: number of texts, for the bar, where `texts` has no length.
        warn_cut: log how many sources were longer than `max_source_length`.
        plain: Hugging Face's own decode loop, where `dqkernels.decode` has put another one into the model.
        **generate_options: for `model.generate`; an option that is None is left to the model.

    Raises:
        ValueError: naming argument, value found and value wanted; at the call, not at the first text.
    """
    if isinstance(texts, str):
        raise ValueError("texts must be a list of strings, got one string")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    prefix, options = options_for(model, tokenizer, task, source_lang, target_lang, **generate_options)
    limit = source_limit(model, tokenizer, max_source_length)
    prefix = prefix if source_prefix is None else source_prefix
    if hasattr(texts, "__len__"):
        total = len(texts)
    model.eval()
    # `disable=None` hides the bar where stderr is no terminal.
    hidden = None if progress is True else True
    bar = tqdm(total=total, desc="generate", unit="text", disable=hidden, leave=False)
    done = progress if callable(progress) else bar.update
    loop = decode.plain if plain else contextlib.nullcontext
    return _stream(model, tokenizer, iter(texts), batch_size, prefix, limit, options, bar, done, warn_cut, loop)


@torch.no_grad()
def _stream(
    model, tokenizer, source, batch_size, prefix, limit, options, bar, advance, warn_cut, loop
) -> Iterator[str]:
    cut = 0
    with bar:
        while window := list(itertools.islice(source, WINDOW_BATCHES * batch_size)):
            rows = _encode(tokenizer, window, prefix, limit)
            cut += sum(row is not None and row[1] for row in rows)
            # Longest first: what does not fit in memory fails at once, not after an hour.
            order = sorted((i for i, row in enumerate(rows) if row), key=lambda i: (-len(rows[i][0]), i))
            outputs = [None if row else "" for row in rows]
            advance(outputs.count(""))
            done = 0
            for start in range(0, len(order), batch_size):
                part = order[start : start + batch_size]
                with loop(model):  # for as long as nothing is yielded: it holds for this thread
                    texts = _run(model, tokenizer, [rows[i][0] for i in part], options)
                for i, text in zip(part, texts, strict=True):
                    outputs[i] = text
                advance(len(part))
                while done < len(outputs) and outputs[done] is not None:
                    yield outputs[done]
                    done += 1
            yield from outputs[done:]
    if cut and warn_cut:
        logger.warning("%d source%s cut at %d tokens (max_source_length)", cut, "" if cut == 1 else "s", limit)


def _encode(tokenizer, texts: list[str], prefix: str, limit: int) -> list[tuple[list[int], bool] | None]:
    """Per text its ids and whether it was cut; None for a blank one."""
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"texts must hold strings, got {type(text).__name__}")
    kept = [i for i, text in enumerate(texts) if text.strip()]
    rows: list[tuple[list[int], bool] | None] = [None] * len(texts)
    if not kept:
        return rows
    full = tokenizer([prefix + texts[i] for i in kept], truncation=False, verbose=False)["input_ids"]
    if any(len(ids) > limit for ids in full):
        short = tokenizer([prefix + texts[i] for i in kept], truncation=True, max_length=limit)["input_ids"]
    else:
        short = full
    for i, ids, whole in zip(kept, short, full, strict=True):
        rows[i] = (list(ids), len(whole) > limit)
    return rows


def _run(model, tokenizer, rows: list[list[int]], options: dict[str, Any]) -> list[str]:
    """One batch through `generate`."""
    batch = tokenizer.pad({"input_ids": rows}, return_tensors="pt").to(model.device)
    ids = model.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **options)
    return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]


# ---- what the model and the task ask for --------------------------------------------------


def source_limit(model, tokenizer, wanted: int | None = None) -> int:
    """Tokens a source is cut at: `wanted`, or the least that tokenizer and positions allow.

    Raises:
        ValueError: if `wanted` is below 2 or above the model's learned positions.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    if wanted is not None:
        if wanted < 2:
            raise ValueError(f"max_source_length must be at least 2, got {wanted}")
        if positions is not None and wanted > positions:
            raise ValueError(f"max_source_length must be at most {positions}, the model's positions, got {wanted}")
        return wanted
    limits = [n for n in (tokenizer.model_max_length, positions) if n is not None and n < _NO_LIMIT]
    return int(min(limits, default=_DEFAULT_SOURCE))


def options_for(
    model, tokenizer, task: str | None, source_lang: str | None, target_lang: str | None, **generate_options: Any
) -> tuple[str, dict[str, Any]]:
    """As `task_options`, under what the caller gives for `generate`: an option that is None is left to the model, and
    a new `max_new_tokens` replaces a stored length in either unit."""
    prefix, options = task_options(model, tokenizer, task, source_lang, target_lang)
    return prefix, _merge(options, generate_options, model)


def task_options(
    model, tokenizer, task: str | None, source_lang: str | None = None, target_lang: str | None = None
) -> tuple[str, dict[str, Any]]:
    """The source prefix and the `generate` options that a model has for a task and a pair of languages.

    Sets the tokenizer's source language.

    Raises:
        ValueError: for an unknown task or language, or a model that needs a language and got none.
    """
    if task is not None and task not in TASKS:
        raise ValueError(f"task must be one of {list(TASKS)}, got {task!r}")
    stored = getattr(model.config, "task_specific_params", None) or {}
    key = f"translation_{source_lang}_to_{target_lang}" if task == "translation" else task
    options = dict(stored.get(key) or {})
    prefix = options.pop("prefix", "")
    if hasattr(tokenizer, "src_lang"):
        options.update(_languages(model, tokenizer, task, source_lang, target_lang))
    elif key not in stored and (source_lang or target_lang):
        prefix = _marian_prefix(tokenizer, stored, target_lang)
    return prefix, options


def _languages(model, tokenizer, task, source_lang, target_lang) -> dict[str, int]:
    """Sets the source language of a multilingual tokenizer; the `generate` options of the target language."""
    if source_lang is not None:
        language_id(tokenizer, source_lang, "source_lang")
        tokenizer.src_lang = source_lang
    if target_lang is None:
        settings = model.generation_config
        chosen = settings.forced_bos_token_id
        if task == "translation" and chosen is None:
            raise ValueError(f"target_lang is needed by this model, one of {_known(tokenizer)}")
        return {}
    target = language_id(tokenizer, target_lang, "target_lang")
    # mBART-50, NLLB and M2M100 write the language before the target and force it as first token; mBART-25
    # writes it behind, and its decoder starts from it.
    tokenizer.tgt_lang = target_lang
    labels = tokenizer(text_target="a")["input_ids"]
    return {"forced_bos_token_id": target} if target in labels[:2] else {"decoder_start_token_id": target}


def language_id(tokenizer, lang: str, argument: str) -> int:
    """Token id of a language code.

    Raises:
        ValueError: naming `argument` and some codes that the tokenizer has.
    """
    table = getattr(tokenizer, "lang_code_to_id", None) or {}
    if hasattr(tokenizer, "get_lang_id"):  # M2M100, whose tokens are __en__
        if lang in getattr(tokenizer, "lang_code_to_token", {}):
            return int(tokenizer.get_lang_id(lang))
    elif lang in table:
        return int(table[lang])
    elif not table and lang in tokenizer.all_special_tokens:  # NLLB
        return int(tokenizer.convert_tokens_to_ids(lang))
    raise ValueError(f"{argument} must be one of {_known(tokenizer)}, got {lang!r}")


def _known(tokenizer) -> str:
    """Some language codes of a tokenizer, for a message."""
    table = getattr(tokenizer, "lang_code_to_token", None) or getattr(tokenizer, "lang_code_to_id", None)
    names = sorted(table) if table else [t for t in tokenizer.all_special_tokens if "_" in t and "<" not in t]
    return ", ".join(names[:8]) + (f", ... ({len(names)} codes)" if len(names) > 8 else "")


def _marian_prefix(tokenizer, stored: dict, target_lang: str | None) -> str:
    """`>>fra<< ` for a Marian model of several targets.

    Raises:
        ValueError: for a model that knows no language codes, or not this one.
    """
    codes = getattr(tokenizer, "supported_language_codes", None) or []
    token = f">>{target_lang}<<"
    if token in codes:
        return token + " "
    pairs = [key.removeprefix("translation_") for key in stored if key.startswith("translation_")]
    known = [code.strip("<>") for code in codes][:8] or pairs
    if known:
        raise ValueError(f"source_lang and target_lang must be one of {', '.join(known)}, got {target_lang!r}")
    raise ValueError(
        "source_lang and target_lang are for models with language codes and this one has none: leave them "
        "out, or give source_prefix"
    )


def _merge(task: dict[str, Any], given: dict[str, Any], model) -> dict[str, Any]:
    """Options of the task under those of the caller; a new length replaces the old one in either unit."""
    given = {key: value for key, value in given.items() if value is not None}
    length = given.get("max_new_tokens")
    if length is not None:
        if length < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {length}")
        positions = getattr(model.config, "max_position_embeddings", None)
        if positions is not None and length >= positions:
            raise ValueError(f"max_new_tokens must be below {positions}, the model's positions, got {length}")
        # A stored max_length or min_length would contradict what was asked for.
        task = {key: value for key, value in task.items() if key not in ("max_length", "max_new_tokens")}
        given.setdefault("max_length", None)
        shortest = given.get("min_length", task.get("min_length", model.generation_config.min_length or 0)) or 0
        if shortest > length:
            given["min_length"] = 0
    beams = given.get("num_beams")
    if beams is not None and beams < 1:
        raise ValueError(f"num_beams must be at least 1, got {beams}")
    merged = {**task, **given}
    settings = model.generation_config
    if not any((merged.get("max_length"), merged.get("max_new_tokens"), settings.max_length, settings.max_new_tokens)):
        # transformers would stop at 20 tokens, with a warning.
        merged["max_new_tokens"] = min(_DEFAULT_NEW_TOKENS, getattr(model.config, "max_position_embeddings", 1024) - 1)
    if merged.get("num_beams", settings.num_beams or 1) == 1:
        # transformers warns about beam settings that greedy search ignores.
        for key, off in (("early_stopping", None), ("length_penalty", None)):
            merged.pop(key, None)
            if beams == 1:
                merged[key] = off
    return merged


@torch.no_grad()
def calibration_batches(
    model, tokenizer, texts: list[str], *, batch_size: int = 8, max_source_length: int | None = None
) -> list[dict[str, torch.Tensor]]:
    """Batches for `dqkernels.calibrate`: each text with what the float `model` writes for it, greedily.

    The decoder's layers must see outputs of the model to be measured; call it before `quantize_`. A model that is no
    encoder-decoder, or does not generate, gets the texts alone.

    Raises:
        ValueError: if no text is left that is not blank.
    """
    limit = source_limit(model, tokenizer, max_source_length)
    rows = sorted((row[0] for row in _encode(tokenizer, texts, "", limit) if row), key=len)
    if not rows:
        raise ValueError("calibration_file must hold at least one text that is not blank")
    writes = model.config.is_encoder_decoder and model.can_generate()
    options = _merge({}, {"num_beams": 1, "do_sample": False}, model) if writes else {}
    if getattr(tokenizer, "pad_token", None) is None:
        batch_size = 1  # decoder-only models often have none, and a batch of one needs none
    batches = []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        batch = tokenizer.pad({"input_ids": part}, return_tensors="pt", padding=len(part) > 1).to(model.device)
        batch = {key: batch[key] for key in ("input_ids", "attention_mask") if key in batch}
        if writes:
            batch["decoder_input_ids"] = model.generate(**batch, **options)[:, :-1]
        batches.append(batch)
    return batches


# ---- opening a model ----------------------------------------------------------------------

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_TOKENIZER_FILES = ("tokenizer.json", "vocab.*", "*.model", "*.spm")
DTYPES = ("auto", "float32", "float16", "bfloat16")


def open_model(name: str, dtype: str = "auto", device: str = "auto") -> tuple[Any, Any]:
    """An encoder-decoder and its tokenizer, of a folder or a hub id, float or packed; safetensors only, no code
    from the folder.

    Raises:
        ValueError: in one sentence, where transformers would need a page: no such folder, no config, no
            weights, no tokenizer, not an encoder-decoder, hub not reachable.
    """
    from transformers import AutoModelForSeq2SeqLM

    name, dtype = str(name), check_dtype(dtype)
    target = check_device(device)
    config = _open_config(name)
    if not config.is_encoder_decoder:
        raise ValueError(f"MODEL must be an encoder-decoder such as BART or T5, {name!r} is a {config.model_type}")
    tokenizer = _open_tokenizer(name)
    return _open_weights(AutoModelForSeq2SeqLM, name, dtype).to(target).eval(), tokenizer


def open_any_model(
    name: str, dtype: str = "auto", device: str = "auto", need_tokenizer: bool = False
) -> tuple[Any, Any | None]:
    """A model of the class that its config.json names, head included, and its tokenizer or None.

    Args:
        name: folder or hub id, float or packed; safetensors only, no code from the folder.
        need_tokenizer: refuse a model without one. Otherwise one that is there and does not load costs a warning.

    Raises:
        ValueError: as `open_model`, and for a config.json that names no model class of transformers.
    """
    name, dtype = str(name), check_dtype(dtype)
    target = check_device(device)
    opener = _class_of(_open_config(name), name)
    tokenizer = None
    try:
        tokenizer = _open_tokenizer(name)
    except ValueError as error:
        if need_tokenizer:
            raise
        logger.warning("%s; the model is opened without it", error)
    return _open_weights(opener, name, dtype).to(target).eval(), tokenizer


def empty_model(name: str):
    """A model of the class that its config.json names, in float, with whatever its parameters hold; no file but
    the config is read. On the meta device (`with torch.device("meta")`) it takes no memory.

    Raises:
        ValueError: as `open_any_model`.
    """
    config = _open_config(str(name))
    opener = _class_of(config, str(name))
    build = getattr(opener, "from_config", None) or opener._from_config  # an Auto class, or a model class
    return build(config)


def _class_of(config, name: str) -> type:
    """The model class that `architectures` names; that of an encoder-decoder without its head, or under a name of
    older releases, is the Auto class for text."""
    import transformers

    names = getattr(config, "architectures", None) or []
    found = getattr(transformers, names[0], None) if len(names) == 1 and isinstance(names[0], str) else None
    usable = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    # facebook/bart-large says BartModel: its head is the embedding, and without it nobody could generate.
    headless = usable and reporting.auto_class(names[0]) == "AutoModel"
    if config.is_encoder_decoder and (not usable or headless):
        return transformers.AutoModelForSeq2SeqLM
    if not usable:
        raise ValueError(
            f"MODEL must name one model class of transformers under architectures in its config.json, "
            f"{name!r} has {names or 'none'}"
        )
    return found


def _open_tokenizer(name: str):
    from transformers import AutoTokenizer

    if Path(name).is_dir() and not any(path for pattern in _TOKENIZER_FILES for path in Path(name).glob(pattern)):
        # transformers would make an empty tokenizer of the model's type, and every text would be unknown
        # words.
        raise ValueError(f"MODEL {name!r} has no tokenizer: copy tokenizer.json and its like from the float model")
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        raise ValueError(f"MODEL {name!r} has no tokenizer that loads: {_first_line(error)}") from error


def _open_weights(opener: type, name: str, dtype: str):
    try:
        return opener.from_pretrained(name, dtype=dtype, trust_remote_code=False, use_safetensors=True)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"MODEL {name!r} has no safetensors weights that load: {_first_line(error)}") from error


def check_dtype(dtype: str) -> str:
    """`dtype` itself, or a ValueError with the choices."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {list(DTYPES)}, got {dtype!r}")
    return dtype


def check_device(device: str) -> torch.device:
    """The torch device of `auto`, `cpu`, `cuda` or `cuda:N`, or a ValueError that says what there is."""
    count = torch.cuda.device_count()
    if device == "auto":
        return torch.device("cuda" if count else "cpu")
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", device)
    if match is None:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {device!r}")
    if device != "cpu" and int(match.group(1) or 0) >= count:
        raise ValueError(f"device must be auto or cpu, or one of {count} GPUs that torch sees here, got {device!r}")
    return torch.device(device)


def _open_config(name: str):
    """The config of a folder or hub id; every way in which there is none has its own sentence."""
    from transformers import AutoConfig

    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"MODEL must be a model folder, {name!r} has no config.json")
    elif folder.exists():
        raise ValueError(f"MODEL must be a folder or a hub id, {name!r} is a file")
    elif not _HUB_ID.fullmatch(name) or name.startswith("."):
        raise ValueError(f"MODEL must be a folder or a hub id, {name!r} is neither")
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except OSError as error:
        if folder.is_dir():
            raise ValueError(f"MODEL {name!r} has a config.json that does not load: {_first_line(error)}") from error
        raise ValueError(
            f"MODEL {name!r} is no folder here, and the hub has no such model, is offline or needs a login"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]
