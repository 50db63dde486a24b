"""`dqkernels bench quality`: what a model writes at each bit width, scored against the float model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dqkernels.cli import common
from dqkernels.cli import eval as evaluation

_HELP = """Scores of a model at each bit width against the float model's, on the same texts.

By default the shipped model and its 2-bit student, on docstrings of the installed packages that the model never saw;
another model comes with --model and its pairs with the data flags of `dqkernels eval`. Each packed model is saved,
loaded again and decoded as the model's own settings say. The score is ROUGE (BLEU and chrF for translation); beside it
stands what it differs by from the float model's, pair by pair, with its standard error: a gap of two errors or less may
be the draw. Nothing is trained: --packed takes folders that were.

The record in --out is written after every row; --resume goes on with it.

\b
Examples:
  dqkernels bench quality --pairs 64
  dqkernels bench quality --bits 2 --group_size 64 --out quality.json
  dqkernels bench quality --model ./bart-cnn --pairs 500 --out cnn.json \\
      --dataset_name abisee/cnn_dailymail
  dqkernels bench quality --model ./my-bart --packed ./my-bart-2-2-8 \\
      --validation_file pairs.jsonl
"""


def register(group: typer.Typer) -> None:
    group.command("quality", help=_HELP, short_help="Scores at each width against the float model's.")(quality)


def quality(
    model: Annotated[
        str | None, typer.Option("--model", help="Float model: folder or hub id; default: the shipped one.")
    ] = None,
    bits: Annotated[str, typer.Option("--bits", help="Weight widths, comma-separated.")] = "8,4,2",
    embedding_bits: Annotated[
        int | None, typer.Option("--embedding_bits", help="2, 4, 8 or 16; default: the weights' own.")
    ] = None,
    weight_quantizer: Annotated[
        str,
        typer.Option("--weight_quantizer", help="auto, absmax, mse, ternary or four_level, at the widths it knows."),
    ] = "auto",
    group_size: Annotated[
        int, typer.Option("--group_size", help="Of 2 and 4 bits: -1 (a scale per channel), 32, 64 or 128.")
    ] = -1,
    packed: Annotated[
        str | None, typer.Option("--packed", help="Packed folders to score too, comma-separated.")
    ] = None,
    dataset_name: Annotated[str | None, typer.Option("--dataset_name", help="Hub id, docstrings or gettext.")] = None,
    dataset_config_name: Annotated[str | None, typer.Option("--dataset_config_name", help="Configuration.")] = None,
    validation_file: Annotated[
        str | None, typer.Option("--validation_file", help="csv, tsv, json, jsonl or parquet.")
    ] = None,
    test_file: Annotated[str | None, typer.Option("--test_file", help="The same; one of the two.")] = None,
    split: Annotated[
        str | None, typer.Option("--split", help="train, validation or test; default: test, or the file's.")
    ] = None,
    text_column: Annotated[str | None, typer.Option("--text_column", help="Column of the source.")] = None,
    summary_column: Annotated[str | None, typer.Option("--summary_column", help="Column of the target.")] = None,
    task: Annotated[str | None, typer.Option("--task", help="summarization or translation.")] = None,
    source_lang: Annotated[str | None, typer.Option("--source_lang", help="Language of the source.")] = None,
    target_lang: Annotated[str | None, typer.Option("--target_lang", help="Language of the target.")] = None,
    source_prefix: Annotated[str | None, typer.Option("--source_prefix", help="Put before every source.")] = None,
    held_out_from: Annotated[
        str | None, typer.Option("--held_out_from", help="docstrings: leave out what this model was trained on.")
    ] = None,
    pairs: Annotated[int, typer.Option("--pairs", help="Pairs to score at most, drawn by hash.")] = 320,
    seed: Annotated[int, typer.Option("--seed", help="Which pairs are drawn.")] = 0,
    max_source_length: Annotated[int | None, typer.Option("--max_source_length", help="Tokens of a source.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option("--max_new_tokens", help="Tokens to generate at most.")] = None,
    num_beams: Annotated[int | None, typer.Option("--num_beams", help="Beams; default the model's own.")] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch_size", help="Texts at once; default 64, of --model 16.")
    ] = None,
    device: common.Device = "auto",
    out: common.Out = None,
    table: common.Table = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the record in --out.")] = False,
    overwrite: common.Overwrite = False,
    json_output: common.Json = False,
) -> None:
    widths = common.choices("--bits", bits, (8, 4, 2))
    for flag, value, least in (("--pairs", pairs, 1), ("--seed", seed, 0), ("--batch_size", batch_size, 1)):
        if value is not None and value < least:
            raise common.WrongUsage(f"{flag} must be at least {least}, got {value}")
    if resume and (out is None or (overwrite and table is None)):
        raise common.WrongUsage("--resume goes on with the record in --out: --overwrite with it is for --table alone")
    common.check_record(out, resume, overwrite)
    common.check_table(table, overwrite)
    if validation_file is not None and test_file is not None:
        raise common.WrongUsage("give --validation_file or --test_file, not both")
    given = dataset_name is not None or validation_file is not None or test_file is not None
    if model is not None and not given:
        raise common.WrongUsage("--model needs pairs: give --dataset_name, --validation_file or --test_file")
    import dqkernels  # noqa: F401, registers packed models
    from dqkernels import text
    from dqkernels.bench import quality as library

    common.quiet_transformers()
    how = library.Task(
        task=task, source_lang=source_lang, target_lang=target_lang, source_prefix=source_prefix,
        max_source_length=max_source_length, batch_size=batch_size or (64 if model is None else 16),
        options={"num_beams": num_beams, "max_new_tokens": max_new_tokens},
    )  # fmt: skip
    with common.checking_input():
        place = str(text.check_device(device))
        if given:
            split = split or ("validation" if validation_file is not None else "test")
            files = {"validation": validation_file, "test": test_file}
            found = evaluation.pairs_of(
                split, dataset_name, dataset_config_name, files, pairs, text_column=text_column,
                summary_column=summary_column, source_lang=source_lang, target_lang=target_lang,
                held_out_from=held_out_from, shuffle_seed=seed,
            )  # fmt: skip
            source = f"{split} of {dataset_name or Path(validation_file or test_file).name}"
            texts = library.Texts(tuple(found["source"]), tuple(found["target"]), {"source": source, "seed": seed})
        else:
            texts = library.docstring_texts(pairs, seed)
        result = library.run(
            model,
            texts,
            widths,
            embedding_bits=embedding_bits,
            weight_quantizer=weight_quantizer,
            group_size=group_size,
            packed=[] if packed is None else [part.strip() for part in packed.split(",")],
            task=how,
            device=place,
            out=out,
            resume=resume,
            tell=common.say,
        )
    if json_output:
        common.print_json(result)
    else:
        common.console().print(library.render(result))
    common.wrote(result, out, table)
