"""Sequence-level distillation: what a teacher writes for many sources, as a data set (Kim & Rush 2016, 1606.07947).

    done = distill(model, tokenizer, sources, "teacher.jsonl", references=references, num_beams=4)
    print(done)

Records are `{"source", "target", "reference", "score", "rank"}`, in the order of the sources, best candidate first.
While it runs, results gather in `OUT.parts/`: every process appends whole batches to a shard of its own and syncs it.
A run that was killed goes on from there, also with another number of processes, and writes the same bytes as one that
was not; the final file is complete or absent.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from dqkernels import text
from dqkernels.launcher import Processes
from dqkernels.train import parts

logger = logging.getLogger("dqkernels")

_FORMAT = 1  # of the shards
_SAMPLED = 4096  # values of each tensor that a model is known by


@dataclass(frozen=True)
class Distilled:
    """What a run wrote. `sources` is all of them, `resumed` those that an earlier run had done, `without` those that
    have no record: blank, or every candidate empty or filtered out."""

    output_file: str
    sources: int
    records: int
    without: int
    resumed: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON."""
        return asdict(self)

    def __str__(self) -> str:
        rate = (self.sources - self.resumed) / max(self.seconds, 1e-9)
        line = f"wrote {self.records} records of {self.sources} sources to {self.output_file} in {self.seconds:.1f} s"
        line += f" ({rate:.1f} samples/s)"
        if self.resumed:
            line += f"; {self.resumed} of the sources were done before"
        return line + (f"; {self.without} have no record" if self.without else "")


def distill(
    model,
    tokenizer,
    sources: Sequence[str | None],
    output_file: str | os.PathLike[str],
    *,
    references: Sequence[str | None] | None = None,
    closeness: Callable[[str, str], float] | None = None,
    quality: Callable[[str, str], float] | None = None,
    min_quality: float = 0.0,
    with_scores: bool = True,
    batch_size: int = 16,
    max_source_length: int | None = None,
    task: str | None = None,
    source_prefix: str | None = None,
    source_lang: str | None = None,
    target_lang: str | None = None,
    resume: bool = True,
    progress: bool = True,
    processes: Processes | None = None,
    **generate_options: Any,
) -> Distilled | None:
    """Writes the teacher's outputs for `sources` to a file; None on all processes but the first.

    Args:
        model: the teacher, a Hugging Face encoder-decoder on its device.
        sources: texts; None and blank ones get no record.
        output_file: `*.jsonl` or `*.parquet`. With several processes, on a disk that all of them see.
        references: the gold target of each source, None where there is none. Copied into the records.
        closeness: of the n-best candidates, only the one of the highest `closeness(candidate, reference)` is kept
            (Kim & Rush's sequence interpolation); a tie goes to the better rank.
        quality, min_quality: candidates with `quality(candidate, reference)` at or below `min_quality` are left out.
        with_scores: records get the mean log-probability per token that the model gives its output, end token
            included and nothing forced; one more forward pass. Otherwise null.
        batch_size: sources generated at once. Part of what decides the outputs, to the last bit.
        max_source_length: tokens a source is cut at; default what tokenizer and model allow.
        task, source_prefix, source_lang, target_lang: as `dqkernels.text.stream_texts`.
        resume: go on from `OUTPUT.parts/`; False starts over.
        progress: a bar where stderr is a terminal, on the first process.
        processes: shares of the work; default as the launcher says.
        **generate_options: for `generate`: num_beams, num_return_sequences, max_new_tokens, length_penalty, ...

    Raises:
        ValueError: naming argument, value found and value wanted; or for parts of a run with other settings.
        RuntimeError: if no record is left to write.
    """
    started = time.monotonic()
    output = Path(output_file)
    _check(output, sources, references, batch_size, closeness is not None or quality is not None)
    processes = processes or Processes.of_launcher(cpu=model.device.type == "cpu")
    references = [None] * len(sources) if references is None else references
    generate_options = {**generate_options, "do_sample": False}
    prefix, options = text.options_for(model, tokenizer, task, source_lang, target_lang, **generate_options)
    limit = text.source_limit(model, tokenizer, max_source_length)
    writer = _Writer(
        model,
        tokenizer,
        prefix=prefix if source_prefix is None else source_prefix,
        limit=limit,
        options=options,
        closeness=closeness,
        quality=quality,
        min_quality=min_quality,
        with_scores=with_scores,
        batch_size=batch_size,
    )
    kept = [number for number, source in enumerate(sources) if source and source.strip()]
    # Longest first: what does not fit in memory fails at once. Letters stand for tokens; counting those of every
    # source would take minutes, on every process.
    order = sorted(kept, key=lambda number: (-len(sources[number]), number))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    folder = output.with_name(output.name + ".parts")
    identity = {"format": _FORMAT, "texts": _hash_of(sources, references), **writer.identity()}
    if resume:
        parts.check(folder, identity)
    if processes.index == 0:
        parts.start(folder, identity, resume)
    processes.wait()
    done = parts.find(folder, len(sources))[0] != parts.NO_SHARD
    left = [batch for batch in batches if not done[batch].all()]
    resumed = len(order) - sum(map(len, left))
    processes.wait()  # nobody writes before all have looked
    if resumed and processes.index == 0:
        logger.info("%d of %d sources are done in %s", resumed, len(order), folder)
    share = left[processes.index :: processes.count]
    with parts.shard_of_process(folder, processes.index) as shard:
        for lines in _generated(writer, share, sources, references, processes, len(order), resumed, progress):
            shard.write("".join(lines).encode("utf-8"))
            shard.flush()
            os.fsync(shard.fileno())
    processes.wait()
    report = None
    if processes.index == 0:
        records, without = parts.merge(folder, output, len(sources), order)
        shutil.rmtree(folder)
        seconds = time.monotonic() - started
        report = Distilled(str(output), len(sources), records, without, resumed, round(seconds, 3))
    processes.wait()
    return report


def _check(output: Path, sources, references, batch_size: int, compares: bool) -> None:
    if output.suffix not in parts.FORMATS:
        raise ValueError(f"output_file must end in {' or '.join(parts.FORMATS)}, got {str(output)!r}")
    if not output.absolute().parent.is_dir():
        raise ValueError(f"output_file must lie in a folder that exists, {str(output.parent)!r} does not")
    if output.suffix == ".parquet":
        parts.need_pyarrow()
    if isinstance(sources, str) or isinstance(references, str):
        raise ValueError("sources and references must be sequences of texts, got one text")
    if not any(source and source.strip() for source in sources):
        raise ValueError(f"none of {len(sources)} sources holds a text")
    if references is not None and len(references) != len(sources):
        raise ValueError(f"{len(references)} references for {len(sources)} sources")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if compares:
        missing = next((n for n in range(len(sources)) if references is None or not references[n]), None)
        if missing is not None:
            raise ValueError(f"references must be there for every source to choose by, number {missing} has none")


def _hash_of(*columns: Sequence[str | None]) -> str:
    digest = hashlib.sha256()
    for column in columns:
        for one in column:
            digest.update(b"\x00" if one is None else b"\x01" + one.encode("utf-8", "surrogatepass"))
        digest.update(b"\x02")
    return digest.hexdigest()


# ---- one batch --------------------------------------------------------------------------


class _Writer:
    """Turns a batch of sources into records."""

    def __init__(
        self, model, tokenizer, *, prefix, limit, options, closeness, quality, min_quality, with_scores, batch_size
    ):
        self.model, self.tokenizer = model.eval(), tokenizer
        self.prefix, self.limit, self.options, self.batch_size = prefix, limit, options, batch_size
        self.closeness, self.quality, self.min_quality = closeness, quality, min_quality
        self.with_scores = with_scores
        settings = model.generation_config
        beams = options.get("num_beams") or settings.num_beams or 1
        self.copies = options.get("num_return_sequences") or settings.num_return_sequences or 1
        if not 1 <= self.copies <= beams:
            raise ValueError(f"num_return_sequences must be between 1 and num_beams, {beams}, got {self.copies}")

    def identity(self) -> dict[str, Any]:
        """All that decides the records, as plain JSON."""
        stored = self.model.generation_config.to_dict()
        stored.pop("transformers_version", None)
        settings = {
            "model": fingerprint(self.model),
            "batch_size": self.batch_size,
            "max_source_length": self.limit,
            "source_prefix": self.prefix,
            "source_lang": getattr(self.tokenizer, "src_lang", None),
            "closeness": _name(self.closeness),
            "quality": _name(self.quality),
            "min_quality": self.min_quality if self.quality else None,
            "with_scores": self.with_scores,
            **{name: self.options[name] for name in sorted(self.options)},
            "generation_config": stored,
        }
        return json.loads(json.dumps(settings, default=str))

    @torch.no_grad()
    def records(self, sources: list[str], references: list[str | None]) -> list[list[dict[str, Any]]]:
        """Records of each source, best rank first."""
        texts = [self.prefix + source for source in sources]
        batch = self.tokenizer(texts, truncation=True, max_length=self.limit, padding=True, return_tensors="pt")
        ids, mask = batch["input_ids"].to(self.model.device), batch["attention_mask"].to(self.model.device)
        outputs = self.model.generate(input_ids=ids, attention_mask=mask, **self.options)
        written = [one.strip() for one in self.tokenizer.batch_decode(outputs, skip_special_tokens=True)]
        scores = self._scores(ids, mask, outputs) if self.with_scores else [None] * len(written)
        found = []
        for number, (source, reference) in enumerate(zip(sources, references, strict=True)):
            candidates: dict[str, tuple[float | None, int]] = {}
            for rank in range(self.copies):
                place = number * self.copies + rank
                if written[place]:
                    candidates.setdefault(written[place], (scores[place], rank))  # two beams may read the same
            found.append(
                [
                    {"source": source, "target": target, "reference": reference, "score": score, "rank": rank}
                    for target, (score, rank) in self._chosen(candidates, reference).items()
                ]
            )
        return found

    def _chosen(self, candidates: dict[str, tuple], reference: str | None) -> dict[str, tuple]:
        if candidates and self.closeness is not None:
            best = max(candidates, key=lambda one: (self.closeness(one, reference), -candidates[one][1]))
            candidates = {best: candidates[best]}
        if self.quality is not None:
            candidates = {one: v for one, v in candidates.items() if self.quality(one, reference) > self.min_quality}
        return candidates

    def _scores(self, ids, mask, outputs) -> list[float]:
        """Mean log-probability of the tokens behind the start token, up to the end token and with it."""
        config, settings = self.model.config, self.model.generation_config
        ends = settings.eos_token_id if settings.eos_token_id is not None else config.eos_token_id
        ends = torch.tensor(ends if isinstance(ends, list) else [ends], device=outputs.device)
        inputs, labels = outputs[:, :-1], outputs[:, 1:]
        ended = torch.isin(labels, ends)
        kept = (ended.cumsum(1) - ended.int()) == 0  # no end before this token
        ids, mask = ids.repeat_interleave(self.copies, 0), mask.repeat_interleave(self.copies, 0)
        scores: list[float] = []
        for start in range(0, len(labels), self.batch_size):  # n-best outputs together may not fit
            part = slice(start, start + self.batch_size)
            logits = self.model(
                input_ids=ids[part], attention_mask=mask[part], decoder_input_ids=inputs[part], use_cache=False
            ).logits
            chosen = logits.float().log_softmax(-1).gather(-1, labels[part].unsqueeze(-1)).squeeze(-1)
            total = (chosen * kept[part]).double().sum(1) / kept[part].sum(1).clamp(min=1)
            scores += [round(value, 6) for value in total.tolist()]
        return scores


def _name(function: Callable | None) -> str | None:
    return function and f"{function.__module__}.{getattr(function, '__qualname__', type(function).__name__)}"


def fingerprint(model) -> str:
    """A hash of the config and of values out of every tensor: another teacher, or another training of it, differs."""
    digest = hashlib.sha256(model.config.to_json_string().encode("utf-8"))
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, torch.Tensor):
            continue  # extra state
        flat = tensor.detach().reshape(-1)
        values = flat[:: max(1, flat.numel() // _SAMPLED)].contiguous().cpu()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _generated(
    writer: _Writer, share, sources, references, processes: Processes, total: int, resumed: int, progress: bool
) -> Iterator[list[str]]:
    """Lines of one batch of this process after the other, under a bar."""
    alone = processes.count == 1
    bar = tqdm(
        total=total if alone else sum(map(len, share)),
        initial=resumed if alone else 0,
        desc="distill" if alone else f"distill (process 1 of {processes.count})",
        unit="samples",
        disable=None if progress and processes.index == 0 else True,
    )
    with bar:
        for batch in share:
            found = writer.records([sources[n] for n in batch], [references[n] for n in batch])
            lines = [
                json.dumps({"index": number, "records": records}, ensure_ascii=False) + "\n"
                for number, records in zip(batch, found, strict=True)
            ]
            yield lines
            bar.update(len(batch))
