"""`dqkernels eval`: ROUGE or BLEU of a packed or float model on a data set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from dqkernels.cli import common

_HELP = """Score a model, packed or float, on the pairs of a data set: ROUGE, or BLEU and chrF for translation.

The data flags are those of `dqkernels train`. Decoding is the model's own unless flags say otherwise. Figures come with
the signature of the scorer; ROUGE is rouge-score with stemming, and reference texts are not cut.

\b
Examples:
  dqkernels eval bart-2-2-8 --dataset_name abisee/cnn_dailymail \\
      --num_beams 4 --max_samples 500
  dqkernels eval ./opus-w4 --task translation --dataset_name wmt/wmt16 \\
      --source_lang en --target_lang ro
  dqkernels eval ./model --test_file pairs.jsonl --output_file texts.jsonl
"""


def register(app: typer.Typer) -> None:
    app.command("eval", help=_HELP, short_help="Score a model: ROUGE, or BLEU and chrF.")(evaluate)


def evaluate(
    model: Annotated[str, typer.Argument(help="Packed or float model: folder or hub id.", metavar="MODEL")],
    dataset_name: Annotated[str | None, typer.Option("--dataset_name", help="Hub id, docstrings or gettext.")] = None,
    dataset_config_name: Annotated[str | None, typer.Option("--dataset_config_name", help="Configuration.")] = None,
    test_file: Annotated[str | None, typer.Option("--test_file", help="csv, tsv, json, jsonl or parquet.")] = None,
    split: Annotated[str, typer.Option("--split", help="train, validation or test.")] = "test",
    text_column: Annotated[str | None, typer.Option("--text_column", help="Column of the source.")] = None,
    summary_column: Annotated[str | None, typer.Option("--summary_column", help="Column of the target.")] = None,
    task: Annotated[str | None, typer.Option("--task", help="summarization or translation.")] = None,
    source_lang: Annotated[str | None, typer.Option("--source_lang", help="Language of the source.")] = None,
    target_lang: Annotated[str | None, typer.Option("--target_lang", help="Language of the target.")] = None,
    source_prefix: Annotated[str | None, typer.Option("--source_prefix", help="Put before every source.")] = None,
    held_out_from: Annotated[
        str | None, typer.Option("--held_out_from", help="docstrings: leave out what this model was trained on.")
    ] = None,
    max_samples: Annotated[
        int | None, typer.Option("--max_samples", help="Score so many pairs, drawn by hash.")
    ] = None,
    max_source_length: Annotated[int | None, typer.Option("--max_source_length", help="Tokens of a source.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option("--max_new_tokens", help="Tokens to generate at most.")] = None,
    num_beams: Annotated[int | None, typer.Option("--num_beams", help="Beams; default the model's own.")] = None,
    batch_size: Annotated[int, typer.Option("--batch_size", help="Texts at once.")] = 16,
    output_file: Annotated[
        str | None, typer.Option("--output_file", help="Write source, target and prediction as JSON lines.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace --output_file.")] = False,
    dtype: common.Dtype = "auto",
    device: common.Device = "auto",
    json_output: common.Json = False,
) -> None:
    if batch_size < 1:
        raise common.WrongUsage(f"--batch_size must be at least 1, got {batch_size}")
    import dqkernels  # noqa: F401, registers packed models
    from dqkernels import text as library
    from dqkernels.bench import quality

    how = quality.Task(
        task=task, source_lang=source_lang, target_lang=target_lang, source_prefix=source_prefix,
        max_source_length=max_source_length, batch_size=batch_size,
        options={"num_beams": num_beams, "max_new_tokens": max_new_tokens},
    )  # fmt: skip
    with common.checking_input():
        common.check_new_file("--output_file", output_file, overwrite)
        pairs = pairs_of(
            split, dataset_name, dataset_config_name, {split: test_file}, max_samples, text_column=text_column,
            summary_column=summary_column, source_lang=source_lang, target_lang=target_lang,
            held_out_from=held_out_from, shuffle_seed=0,
        )  # fmt: skip
        loaded, tokenizer = library.open_model(model, dtype=dtype, device=device)
        predictions = how.write(loaded, tokenizer, pairs["source"])
    references = list(pairs["target"])
    result = {"model": model, "pairs": len(references), **how.scores(predictions, references)}
    if output_file is not None:
        from dqkernels.serialize import atomic_write

        rows = zip(pairs["source"], references, predictions, strict=True)
        lines = [json.dumps({"source": s, "target": t, "prediction": p}, ensure_ascii=False) + "\n" for s, t, p in rows]
        atomic_write(Path(output_file), "".join(lines).encode())
    if json_output:
        common.print_json(result)
        return
    for name, value in result.items():
        print(f"{name:16} {value:.2f}" if isinstance(value, float) else f"{name:16} {value}")


#: What `load_pairs` calls the number of pairs of each split.
_LIMITS = {"train": "max_train_samples", "validation": "max_eval_samples", "test": "max_predict_samples"}


def pairs_of(
    split: str,
    dataset_name: str | None,
    dataset_config_name: str | None,
    files: dict[str, str | None],
    max_samples: int | None,
    **options,
):
    """The pairs of one split, as `dqkernels.data.sources.load_pairs` gives them for the flags of a verb that scores.

    Raises:
        ValueError: as `load_pairs`.
        WrongUsage: for a split that is none, or no pair asked for.
    """
    if max_samples is not None and max_samples < 1:
        raise common.WrongUsage(f"--max_samples must be at least 1, got {max_samples}")
    if split not in _LIMITS:
        raise common.WrongUsage(f"--split must be one of {', '.join(_LIMITS)}, got {split!r}")
    from dqkernels.data import sources

    common.quiet_transformers()
    given = {f"{name}_file": path for name, path in files.items() if path is not None}
    return sources.load_pairs(
        dataset_name, dataset_config_name, **given, splits=(split,), **{_LIMITS[split]: max_samples}, **options
    )[split]
