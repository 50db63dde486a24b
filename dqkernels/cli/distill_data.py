"""`dqkernels distill-data`: what a teacher writes for a data set, as training data for a student."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from dqkernels.cli import common

SELECT = ("all", "best_rouge", "best_chrf")

_HELP = """Write a teacher's outputs for a data set: sequence-level distillation.

A student often learns more from what its teacher writes than from the gold targets. The result is an ordinary
training file, one record per output, in the order of the data:
{"source": "...", "target": what the teacher wrote, "reference": the gold target, "score": ..., "rank": 0}.
score is the mean log-probability per token under the teacher, rank the place among its n best.

\b
Recipes:
  greedy (QuillBot)               the default, --num_beams 1
  beam search (Kim & Rush)        --num_beams 6
  the n best, all of them         --num_beams 6 --num_return_sequences 6
  of these the closest to gold    besides --select best_rouge, or best_chrf
  less what the teacher got wrong --min_rouge2 10

\b
Examples:
  dqkernels distill-data --model ./bart-cnn --output_file teacher.jsonl \\
      --dataset_name abisee/cnn_dailymail --num_beams 4
  dqkernels distill-data --model ./bart --train_file pairs.csv \\
      --text_column article --summary_column abstract \\
      --output_file teacher.parquet --num_beams 6 --min_rouge2 10
  dqkernels distill-data --model ./mbart --dataset_name wmt/wmt16 \\
      --source_lang en_XX --target_lang ro_RO \\
      --output_file ro.jsonl --num_beams 5
  dqkernels distill-data --model ./teacher --dataset_name docstrings \\
      --output_file out.jsonl
  accelerate launch -m dqkernels distill-data ...   shares the work among GPUs

--dataset_name is a hub id (columns of abisee/cnn_dailymail, EdinburghNLP/xsum, wmt/wmt16 and
sentence-transformers/eli5, an ELI5 substitute, are known), docstrings (of installed packages) or gettext
(translated messages of installed programs); the last two need no network.

A run that was stopped goes on where it was when the same command is given again (--no_resume starts over):
until the end, outputs are kept in OUTPUT_FILE.parts.
"""

Split = Annotated[str, typer.Option("--split", help="Which split: train, validation or test.")]


def register(app: typer.Typer) -> None:
    app.command("distill-data", help=_HELP, short_help="Write a teacher's outputs as training data.")(distill_data)


def distill_data(
    model: Annotated[str, typer.Option("--model", help="The teacher: model folder (float or packed) or hub id.")],
    output_file: Annotated[str, typer.Option("--output_file", help="*.jsonl or *.parquet, complete or absent.")],
    dataset_name: Annotated[
        str | None, typer.Option("--dataset_name", help="Hub id, folder, docstrings or gettext.")
    ] = None,
    dataset_config_name: Annotated[
        str | None,
        typer.Option("--dataset_config_name", help="Its configuration, such as 3.0.0; docstrings: base or all."),
    ] = None,
    train_file: Annotated[
        str | None, typer.Option("--train_file", help="csv, tsv, json, jsonl or parquet, instead of --dataset_name.")
    ] = None,
    validation_file: Annotated[
        str | None, typer.Option("--validation_file", help="The same for --split validation.")
    ] = None,
    test_file: Annotated[str | None, typer.Option("--test_file", help="The same for --split test.")] = None,
    split: Split = "train",
    text_column: Annotated[
        str | None, typer.Option("--text_column", help="Column of sources; default: by usual names.")
    ] = None,
    summary_column: Annotated[
        str | None, typer.Option("--summary_column", help="Column of gold targets; a file may have none.")
    ] = None,
    source_lang: Annotated[
        str | None, typer.Option("--source_lang", help="Language of the sources, as the model spells it.")
    ] = None,
    target_lang: Annotated[
        str | None, typer.Option("--target_lang", help="Language wanted, as the model spells it.")
    ] = None,
    source_prefix: Annotated[
        str | None, typer.Option("--source_prefix", help='Put before every source, such as "summarize: " for T5.')
    ] = None,
    max_samples: Annotated[int | None, typer.Option("--max_samples", help="Most sources of the split.")] = None,
    shuffle_seed: Annotated[
        int | None, typer.Option("--shuffle_seed", help="Shuffle before --max_samples; default: the first ones.")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch_size", help="Sources generated at once.")] = 16,
    num_beams: Annotated[int, typer.Option("--num_beams", help="Beams; 1 is greedy.")] = 1,
    num_return_sequences: Annotated[
        int, typer.Option("--num_return_sequences", help="Outputs per source, at most --num_beams.")
    ] = 1,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max_new_tokens", help="Longest output; default: the model's own, else 128.")
    ] = None,
    max_source_length: Annotated[
        int | None, typer.Option("--max_source_length", help="Tokens a source is cut at; default: what fits.")
    ] = None,
    select: Annotated[
        str, typer.Option("--select", help="all, best_rouge or best_chrf: the candidate closest to the gold target.")
    ] = "all",
    min_rouge2: Annotated[
        float | None, typer.Option("--min_rouge2", help="Keep outputs of more ROUGE-2 (0..100) with the gold target.")
    ] = None,
    scores: Annotated[
        bool, typer.Option("--scores/--no_scores", help="Record score; it costs one more forward pass.")
    ] = True,
    resume: Annotated[
        bool, typer.Option("--resume/--no_resume", help="Go on where an interrupted run stopped.")
    ] = True,
    dtype: common.Dtype = "auto",
    device: common.Device = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an --output_file that is there.")] = False,
    json_output: common.Json = False,
) -> None:
    if select not in SELECT:
        raise common.WrongUsage(f"--select must be one of {', '.join(SELECT)}, got {select!r}")
    for flag, value in (("--max_samples", max_samples), ("--num_return_sequences", num_return_sequences)):
        if value is not None and value < 1:
            raise common.WrongUsage(f"{flag} must be at least 1, got {value}")
    if Path(output_file).suffix not in (".jsonl", ".parquet"):
        raise common.WrongUsage(f"--output_file must end in .jsonl or .parquet, got {output_file!r}")
    common.check_new_file("--output_file", output_file, overwrite)
    if num_return_sequences > num_beams:
        raise common.WrongUsage(
            f"--num_return_sequences must be at most --num_beams, {num_beams}, got {num_return_sequences}"
        )
    if select != "all" and num_return_sequences == 1:
        raise common.WrongUsage("--select chooses among several outputs: give --num_return_sequences")

    from dqkernels import text as library
    from dqkernels.data import prepare, sources
    from dqkernels.launcher import Processes
    from dqkernels.train import distill_data as teacher

    processes = Processes.of_launcher(cpu=device == "cpu")
    limit = {"train": "max_train_samples", "validation": "max_eval_samples", "test": "max_predict_samples"}
    gold = select != "all" or min_rouge2 is not None
    with common.checking_input():
        if split not in limit:
            raise ValueError(f"split must be one of {', '.join(limit)}, got {split!r}")
        pairs = sources.load_pairs(
            dataset_name,
            dataset_config_name,
            train_file=train_file,
            validation_file=validation_file,
            test_file=test_file,
            text_column=text_column,
            summary_column=summary_column,
            source_lang=source_lang,
            target_lang=target_lang,
            splits=(split,),
            shuffle_seed=shuffle_seed,
            need_targets=gold,
            **{limit[split]: max_samples},
        )[split]
        if gold:
            # Nothing to compare with: such a pair cannot be chosen or kept.
            pairs = pairs.filter(_has_target, input_columns="target", load_from_cache_file=False)
        common.quiet_transformers()
        here = str(processes.device) if processes.count > 1 and device == "auto" else device
        loaded, tokenizer = library.open_model(model, dtype=dtype, device=here)
        task = "translation" if source_lang is not None and target_lang is not None else "summarization"
        languages = prepare.model_languages(loaded, tokenizer, task, source_lang, target_lang)
        try:
            done = teacher.distill(
                loaded,
                tokenizer,
                pairs["source"][:],
                output_file,
                references=pairs["target"][:],
                closeness=_closeness(select),
                quality=None if min_rouge2 is None else rouge2,
                min_quality=min_rouge2 or 0.0,
                with_scores=scores,
                batch_size=batch_size,
                max_source_length=max_source_length,
                task=task,
                source_prefix=source_prefix,
                source_lang=languages[0],
                target_lang=languages[1],
                resume=resume,
                processes=processes,
                num_beams=num_beams,
                num_return_sequences=num_return_sequences,
                max_new_tokens=max_new_tokens,
            )
        except RuntimeError as error:
            if "CUDA" in str(error) or "memory" in str(error):
                raise
            raise common.Failed(str(error)) from error
        except (KeyboardInterrupt, SystemExit):
            if os.path.isdir(output_file + ".parts"):
                common.say("", f"what was done is kept in {output_file}.parts: the same command goes on from there")
            raise
    if done is None:
        return
    common.say(str(done))
    if json_output:
        common.print_json(done.to_dict())


def _has_target(target: str | None) -> bool:
    return bool(target and target.strip())


def rouge2(candidate: str, reference: str) -> float:
    """ROUGE-2 of a teacher's output: the filter of Shleifer & Rush."""
    from dqkernels.metrics.rouge import rouge_of

    return rouge_of(candidate, reference, ("rouge2",))["rouge2"]


def mean_rouge(candidate: str, reference: str) -> float:
    """Mean of ROUGE-1, -2 and -L: ROUGE-2 alone is 0 for many short outputs, and chooses nothing."""
    from dqkernels.metrics.rouge import rouge_of

    scores = rouge_of(candidate, reference)
    return sum(scores.values()) / len(scores)


def _closeness(select: str):
    if select == "best_chrf":
        from dqkernels.metrics.bleu import chrf

        return chrf
    return mean_rouge if select == "best_rouge" else None
