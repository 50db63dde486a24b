"""`bench quality`: what a model writes at each bit width, scored against the float model on the same texts.

What is scored is what a user gets: each packed model is saved through `save_pretrained`, loaded again, and that one
writes. The record is written after every row, and a run that was stopped goes on from it.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dqkernels.bench import demo, record

BITS = (8, 4, 2)
FLOAT = "float"
#: What has to agree before rows of two runs may stand in one record.
_SAME_MACHINE = ("gpu", "cpu_model", "torch", "transformers", "source_sha256")


@dataclass(frozen=True)
class Task:
    """How a model writes the texts that are scored; None leaves a choice to the model.

    Attributes:
        task, source_lang, target_lang, source_prefix: as in `dqkernels.data.prepare.set_up`.
        max_source_length: tokens a source is cut at.
        batch_size: texts at once.
        options: for `generate`: `num_beams`, `max_new_tokens`.
    """

    task: str | None = None
    source_lang: str | None = None
    target_lang: str | None = None
    source_prefix: str | None = None
    max_source_length: int | None = None
    batch_size: int = 16
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def translates(self) -> bool:
        """Scored by BLEU and chrF, not by ROUGE."""
        return self.task == "translation" or self.source_lang is not None

    def set_up(self, model, tokenizer):
        """The source prefix and the options of `generate` that the model has for the task.

        Raises:
            ValueError: as `prepare.set_up`.
        """
        from dqkernels.data import prepare

        names = ("task", "source_prefix", "source_lang", "target_lang")
        return prepare.set_up(model, tokenizer, **{name: getattr(self, name) for name in names})

    def write(self, model, tokenizer, sources: Sequence[str], **more: Any) -> list[str]:
        """What the model writes, a text per source.

        Raises:
            ValueError: as `prepare.set_up` and `text.generate_texts`.
        """
        from dqkernels import text

        setup = self.set_up(model, tokenizer)
        given = {name: value for name, value in self.options.items() if value is not None}
        return text.generate_texts(
            model, tokenizer, list(sources), batch_size=self.batch_size, source_prefix=setup.source_prefix,
            max_source_length=self.max_source_length, **{**setup.generate_options, **given}, **more,
        )  # fmt: skip

    def scores(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
        """ROUGE, or BLEU and chrF, with the signature that makes the figures comparable."""
        from dqkernels.metrics import bleu, rouge

        if self.translates:
            return bleu.bleu(predictions, references)
        return {**rouge.rouge(predictions, references), "signature": rouge.signature()}

    def of_pairs(self, predictions: Sequence[str], references: Sequence[str]) -> list[float]:
        """The score of each pair: ROUGE-L, or chrF (BLEU has none)."""
        from dqkernels.metrics import bleu, rouge

        one = bleu.chrf if self.translates else rouge.rougeL
        return [one(prediction, reference) for prediction, reference in zip(predictions, references, strict=True)]


@dataclass(frozen=True)
class Texts:
    """What is scored on.

    Attributes:
        sources, targets: one of each per pair.
        facts: for the record: where they are from, how many there were.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    facts: dict[str, Any]

    @property
    def sha256(self) -> str:
        """Names these very pairs."""
        return hashlib.sha256(json.dumps([self.sources, self.targets]).encode()).hexdigest()


def docstring_texts(pairs: int, seed: int) -> Texts:
    """Docstrings of installed packages that the shipped model has not seen, as `dqkernels demo` draws them.

    Raises:
        DemoError: if the model is not in this installation, or no such docstring is installed.
    """
    drawn, counts = demo.draw_pairs(demo.teacher_folder(), pairs, seed)
    return Texts(tuple(pair.body for pair in drawn), tuple(pair.head for pair in drawn), {**counts, "seed": seed})


def run(
    model: str | None = None,
    texts: Texts | None = None,
    bits: Sequence[int] = BITS,
    *,
    embedding_bits: int | None = None,
    weight_quantizer: str = "auto",
    group_size: int = -1,
    packed: Sequence[str] = (),
    task: Task | None = None,
    device: str | None = None,
    out: str | None = None,
    resume: bool = False,
    tell: Callable[[str], Any] | None = None,
) -> dict:
    """Scores the float model, the model at each width, and packed folders; gives the record.

    Args:
        model: folder or hub id of a float encoder-decoder; default the shipped demo model, with its trained student
            among `packed`.
        texts: the pairs; default the demo's.
        bits: weight widths, 8, 4 or 2.
        embedding_bits: 2, 4, 8 or 16; default the weights' own.
        weight_quantizer, group_size: as in `DQConfig`; groups are for 2 and 4 bits, 8 bits beside them have none.
        packed: folders of packed models of the same task, scored as they are.
        task: how they write; default 64 texts at once, the rest left to the model.
        device: default the GPU if there is one.
        out: file for the record, written after every row, or None.
        resume: go on with the record in `out`, if it is there.
        tell: gets a line of progress at the start of every row.

    Raises:
        ValueError: for a width, rule or model that is none, and for a record in `out` of another machine or setting.
        DemoError: as `docstring_texts`.
    """
    bits = tuple(bits)
    if any(width not in BITS for width in bits) or len(set(bits)) != len(bits):
        raise ValueError(f"bits must be distinct values of {list(BITS)}, got {list(bits)}")
    task = task or Task(batch_size=demo.BATCH_SIZE)
    texts = texts or docstring_texts(320, 0)
    shipped = model is None
    folder = str(demo.teacher_folder()) if shipped else str(model)
    students = {Path(one).name: str(one) for one in packed}
    if shipped:
        students = {demo.STUDENT: str(demo.student_folder()), **students}
    names = [FLOAT, *(f"W{width}" for width in bits), *students]
    if len(set(names)) != len(names) or len(students) != len(packed) + shipped:
        raise ValueError(f"packed must be folders with different names that are none of {FLOAT}, W8, W4, W2")
    choices = {"embedding_bits": embedding_bits, "weight_quantizer": weight_quantizer, "group_size": group_size}
    configs = {f"W{width}": config_of(width, **choices) for width in bits}
    from dqkernels import text
    from dqkernels.bench import protocol
    from dqkernels.train.distill_data import fingerprint

    place = protocol.pick_device(device)
    loaded, tokenizer = text.open_model(folder, dtype="float32", device=str(place))
    task.set_up(loaded, tokenizer)  # refuses before the work what it would refuse within it
    made = record.new(
        "quality",
        settings={
            "model": Path(folder).name if Path(folder).exists() else folder,
            "scored": len(texts.sources),
            "pairs_sha256": texts.sha256,
            **{key: value for key, value in texts.facts.items() if key != "scored"},
            "bits": list(bits),
            **choices,
            "packed": list(students),
            "model_sha256": fingerprint(loaded),
            "packed_sha256": {name: _file_hash(path) for name, path in students.items()},
            "device": place.type,
            "float_dtype": "float32",
            "decoding": {"batch_size": task.batch_size, **_decoding(loaded, task)},
            "gap": "chrF" if task.translates else "ROUGE-L",
        },
        protocol=_protocol_words(task),
        rows=[],
    )
    done = _earlier(made, out) if resume and out is not None and Path(out).exists() else {}
    book = _Book(made, names, done, out)
    parameters = sum(parameter.numel() for parameter in loaded.parameters())
    for name in names:
        if name in done:
            continue
        (tell or (lambda line: None))(f"{name}: {names.index(name) + 1} of {len(names)}")
        start = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="dqkernels-quality-") as scratch:
            if name == FLOAT:
                writer, size = loaded, 4 * parameters
            elif name in configs:
                loaded = None  # two models may not fit
                writer, size = demo.pack(
                    Path(folder), bits[list(configs).index(name)], Path(scratch, name), configs[name]
                )
                writer = writer.to(place)
            else:
                loaded = None
                writer, size = _open_packed(students[name])
                writer = writer.to(place)
            # Sources are cut alike for all: said once.
            progress = {"progress": _bar(name, len(texts.sources)), "warn_cut": name == FLOAT}
            predictions = task.write(writer, tokenizer, texts.sources, **progress)
            row = _row(name, writer, size, 4 * parameters, configs.get(name))
        row.update(_scored(task, predictions, texts.targets, book.rows.get(FLOAT)))
        row["took_s"] = round(time.monotonic() - start, 1)
        book.add(name, row)
    book.write()
    return made


def config_of(width: int, *, embedding_bits: int | None, weight_quantizer: str, group_size: int) -> dict[str, Any]:
    """The fields of a DQConfig, checked.

    Raises:
        ValueError: as `DQConfig`.
    """
    from dqkernels.config import QUANTIZERS_BY_BITS, DQConfig

    fields = {"weight_bits": width, "embedding_bits": width if embedding_bits is None else embedding_bits}
    # One rule is asked for all widths, and speaks for those that know it.
    fields["weight_quantizer"] = weight_quantizer if weight_quantizer in QUANTIZERS_BY_BITS[width] else "auto"
    fields["group_size"] = -1 if width == 8 else group_size
    DQConfig(weight_quantizer=weight_quantizer)  # a rule of no width
    DQConfig(**fields)
    return fields


def _file_hash(folder: str) -> str:
    """Of a packed model's weights, file by file: its name says nothing of what is in it."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _open_packed(folder: str):
    """A packed model, the rest in float32, and the bytes of its safetensors files; it needs no tokenizer of its own.

    Raises:
        ValueError: for a folder without a packed model.
    """
    import torch
    from transformers import AutoModelForSeq2SeqLM

    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"packed must be folders of packed models, {folder!r} has no config.json")
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    if getattr(model.config, "quantization_config", None) is None:
        raise ValueError(f"packed must be folders of packed models, the one in {folder!r} is float")
    return model, sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


def _bar(name: str, total: int) -> Callable[[int], Any]:
    from tqdm.auto import tqdm

    # A bar where stderr is a terminal; elsewhere the caller's line at the start of a row says where it is.
    return tqdm(total=total, desc=name, unit="text", disable=not sys.stderr.isatty(), leave=False).update


def _row(name: str, model, size: int, float_bytes: int, config: dict | None) -> dict[str, Any]:
    """What is known of a model before its texts are."""
    packed = getattr(model.config, "quantization_config", None)
    told = packed if isinstance(packed, dict) else packed.to_dict() if packed is not None else {}
    return {
        "name": name,
        "status": "scored",
        "reason": None,
        "origin": "the float model" if name == FLOAT else "rounded" if config is not None else "as given",
        "weight_bits": 32 if name == FLOAT else told.get("weight_bits"),
        "embedding_bits": 32 if name == FLOAT else told.get("embedding_bits"),
        "weight_quantizer": told.get("weight_quantizer"),
        "group_size": told.get("group_size", -1),
        "attention": told.get("attention"),
        "kernel": "torch" if name == FLOAT else demo.kernel_of(model),
        "file_bytes": size,
        "file_ratio": round(float_bytes / size, 4),
    }


def _scored(task: Task, predictions: Sequence[str], targets: Sequence[str], base: dict | None) -> dict[str, Any]:
    """The scores of a row, and what they differ by from the float model's, pair by pair."""
    from dqkernels.metrics.paired import paired_difference

    found = task.scores(predictions, targets)
    row = {f"{key.lower()}_score": round(value, 3) for key, value in found.items() if isinstance(value, float)}
    row |= {key: value for key, value in found.items() if isinstance(value, str)}
    # Whole thousandths, in one line of the record; no pair is known better.
    mine = [round(1000 * score) for score in task.of_pairs(predictions, targets)]
    if base is not None:
        mean, error = paired_difference(mine, [int(score) for score in base["pair_scores_milli"].split()])
        row |= {"gap_score": round(mean / 1000, 3), "gap_error": round(error / 1000, 3)}
    return {**row, "pair_scores_milli": " ".join(map(str, mine))}


def _decoding(model, task: Task) -> dict[str, Any]:
    """What decides the texts, as far as it is not the default of transformers."""
    chosen = model.generation_config.to_diff_dict()
    told = {key: value for key, value in chosen.items() if not key.endswith("_token_id") and key[:1] != "_"}
    told.pop("transformers_version", None)
    told |= {name: value for name, value in task.options.items() if value is not None}
    # Fractions such as a length penalty as text: a record's key with a fraction ends in a unit.
    return {key: str(value) if isinstance(value, float) else value for key, value in told.items()}


def _protocol_words(task: Task) -> dict[str, str]:
    pair = "chrF" if task.translates else "ROUGE-L"
    return {
        "score": "corpus BLEU and chrF by sacrebleu" if task.translates else "ROUGE F x 100, stemmed, mean over pairs",
        "gap": f"{pair} less the float model's, pair by pair: the mean, and its standard error over the pairs",
        "file": "bytes of the written safetensors files; ratio: 4 bytes a parameter of the float model over them",
        "models": "packed models are saved and loaded again before they write; nothing is trained here",
        "pairs": "pair_scores_milli: thousandths of the score of each pair, in order",
    }


# ----------------------------------------------------------------------------------------------------- record


@dataclass
class _Book:
    """The record while it grows: rows by name, in the order of `names`."""

    made: dict
    names: list[str]
    rows: dict[str, dict]
    out: str | None

    def add(self, name: str, row: dict) -> None:
        self.rows[name] = row
        self.write()

    def write(self) -> None:
        missing = {"status": "not run", "reason": "the run was stopped before it"}
        self.made["rows"] = [self.rows.get(name) or {"name": name, **missing} for name in self.names]
        if self.out is not None:
            record.write(self.made, self.out)


def _earlier(made: dict, out: str) -> dict[str, dict]:
    """The scored rows of the record in `out`, of this very machine, code and settings.

    Raises:
        ValueError: for another record.
    """
    old = record.read(out)
    if old["kind"] != "quality":
        raise ValueError(f"resume is for a record of bench quality, {Path(out).name} is of kind {old['kind']!r}")
    for name, keys in (("environment", _SAME_MACHINE), ("settings", tuple(made["settings"]))):
        for key in keys:
            was, now = old[name].get(key), made[name][key]
            if key == "packed_sha256":  # of those in both: more folders may come
                was = {one: (was or {}).get(one) for one in now if one in old["settings"]["packed"]}
                now = {one: now[one] for one in was}
            if key not in ("bits", "packed") and was != now:
                words = f"resume needs the same {key} as in {Path(out).name}: {was!r} there, {now!r} now"
                raise ValueError(f"{words}; another record can hold it")
    rows = {row["name"]: row for row in old["rows"] if row.get("status") == "scored"}
    # Gaps are to the float model's row: without it nothing else counts.
    return rows if FLOAT in rows else {}


# ------------------------------------------------------------------------------------------------------ table


def render(result: dict):
    """A rich table of a quality record."""
    from rich import box
    from rich.table import Table

    from dqkernels.bench.words import machine_words

    settings = result["settings"]
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0),
        title=f"{settings['model']}, {settings['scored']} pairs, on {machine_words(result['environment'])}",
    )  # fmt: skip
    scored = [row for row in result["rows"] if row["status"] == "scored"]
    heads = {
        "rouge1_score": "R-1",
        "rouge2_score": "R-2",
        "rougel_score": "R-L",
        "chrf_score": "chrF",
        "bleu_score": "BLEU",
    }
    keys = [key for key in heads if any(key in row for row in scored)]
    for name in ("", "file MB", "ratio", *(heads[key] for key in keys), "gap", "+-", "s"):
        table.add_column(name, justify="left" if name == "" else "right", no_wrap=True)
    for row in result["rows"]:
        if row["status"] != "scored":
            table.add_row(row["name"], row["status"])
            continue
        gap = ["", ""] if "gap_score" not in row else [f"{row['gap_score']:+.2f}", f"{row['gap_error']:.2f}"]
        scores = [f"{row[key]:.2f}" for key in keys]
        table.add_row(
            row["name"],
            f"{row['file_bytes'] / 1e6:,.2f}",
            f"{row['file_ratio']:.1f}",
            *scores,
            *gap,
            f"{row['took_s']:.0f}",
        )
    lines = [
        f"gap: {settings['gap']} less the float model's, pair by pair; +-: its standard error over the pairs.",
        "W8, W4, W2: weights of so many bits by rounding; the others are packed folders as they are.",
        "ratio: 4 bytes a parameter of the float model over the file. s: seconds, packing included.",
    ]
    table.caption, table.caption_justify = "\n".join(lines), "left"
    return table
