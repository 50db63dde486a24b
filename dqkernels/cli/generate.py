"""`dqkernels generate`, `summarize`, `translate`: texts in, JSON lines out."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from dqkernels.cli import common, files

Model = Annotated[str, typer.Argument(help="Model folder (float or packed) or hub id.", metavar="MODEL")]
Input = Annotated[
    str | None,
    typer.Option("--input", help="One text per line, or JSON lines (*.jsonl, or --text_column); - is stdin."),
]
Text = Annotated[str | None, typer.Option("--text", help="One text, instead of --input.")]
Output = Annotated[
    str | None, typer.Option("--output", help="File of JSON lines, complete or absent; default: stdout, as they come.")
]
Column = Annotated[
    str | None, typer.Option("--text_column", help="Field of a JSON line that holds the text (*.jsonl: text).")
]
Batch = Annotated[int, typer.Option("--batch_size", help="Texts generated at once.")]
Beams = Annotated[int | None, typer.Option("--num_beams", help="Beams; default: the model's own, 1 is greedy.")]
NewTokens = Annotated[
    int | None, typer.Option("--max_new_tokens", help="Longest output in tokens; default: the model's own, else 128.")
]
Source = Annotated[
    int | None, typer.Option("--max_source_length", help="Tokens a source is cut at; default: what the model can read.")
]
Prefix = Annotated[
    str | None, typer.Option("--source_prefix", help='Put before every text, such as "summarize: " for T5.')
]
SourceLang = Annotated[str | None, typer.Option("--source_lang", help="Language of the texts, as the model spells it.")]
TargetLang = Annotated[str | None, typer.Option("--target_lang", help="Language wanted, as the model spells it.")]
Plain = Annotated[bool, typer.Option("--plain", help="Decode by Hugging Face's own loop; the same tokens, slower.")]
Stream = Annotated[
    bool, typer.Option("--stream", help="Print the output of --text word by word as it is written, and no JSON.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an --output that is there.")]

_GENERATE = """Generate an output for every text of a file.

Texts of like length share a batch; outputs come in the order of the input, one JSON object a line:
{"index": 0, "input": "...", "output": "..."}. A blank line gives an empty output.

\b
Examples:
  dqkernels generate ./bart-w4 --input articles.txt --output out.jsonl
  dqkernels generate ./bart-w4 --input pairs.jsonl --text_column article \\
      --num_beams 4 --batch_size 32
  zcat articles.gz | dqkernels generate ./bart-w4 --input - | jq -r .output
  accelerate launch -m dqkernels generate ./bart-w4 --input many.jsonl \\
      --output out.jsonl          # shares the work among GPUs and machines
"""
_SUMMARIZE = """Summarize texts with the parameters the model has for it.

Takes the "summarization" entry of the model's task_specific_params (prefix, beams, lengths) where there is
one, and the model's generation_config under it. Input and output as in `dqkernels generate`.

\b
Examples:
  dqkernels summarize ./bart-cnn-w4 --text "A long article ..."
  dqkernels summarize ./bart-cnn-w4 --input articles.txt --output out.jsonl
  dqkernels summarize ./t5-w4 --input texts.txt --source_prefix "summarize: "
"""
_TRANSLATE = """Translate texts; sets language codes and prefixes as the model needs them.

Languages are spelled as the tokenizer spells them: en_XX and ro_RO for mBART, eng_Latn for NLLB, en for
M2M100 and T5. A Marian model of one pair needs none. Input and output as in `dqkernels generate`.

\b
Examples:
  dqkernels translate ./mbart-w4 --source_lang en_XX --target_lang ro_RO \\
      --text "Good morning."
  dqkernels translate ./opus-mt-en-ro-w8 --input lines.txt --output out.jsonl
  dqkernels translate ./t5-w4 --target_lang de --source_lang en --text Hello
"""


def register(app: typer.Typer) -> None:
    app.command("generate", help=_GENERATE, short_help="Generate an output for every text of a file.")(generate)
    app.command("summarize", help=_SUMMARIZE, short_help="Summarize texts.")(summarize)
    app.command("translate", help=_TRANSLATE, short_help="Translate texts.")(translate)


def generate(
    model: Model,
    input: Input = None,
    text: Text = None,
    output: Output = None,
    text_column: Column = None,
    batch_size: Batch = 16,
    num_beams: Beams = None,
    max_new_tokens: NewTokens = None,
    max_source_length: Source = None,
    source_prefix: Prefix = None,
    plain: Plain = False,
    stream: Stream = False,
    dtype: common.Dtype = "auto",
    device: common.Device = "auto",
    overwrite: Overwrite = False,
    json_output: common.Json = False,
) -> None:
    _run(None, **locals())


def summarize(
    model: Model,
    input: Input = None,
    text: Text = None,
    output: Output = None,
    text_column: Column = None,
    batch_size: Batch = 16,
    num_beams: Beams = None,
    max_new_tokens: NewTokens = None,
    max_source_length: Source = None,
    source_prefix: Prefix = None,
    plain: Plain = False,
    stream: Stream = False,
    dtype: common.Dtype = "auto",
    device: common.Device = "auto",
    overwrite: Overwrite = False,
    json_output: common.Json = False,
) -> None:
    _run("summarization", **locals())


def translate(
    model: Model,
    source_lang: SourceLang = None,
    target_lang: TargetLang = None,
    input: Input = None,
    text: Text = None,
    output: Output = None,
    text_column: Column = None,
    batch_size: Batch = 16,
    num_beams: Beams = None,
    max_new_tokens: NewTokens = None,
    max_source_length: Source = None,
    source_prefix: Prefix = None,
    plain: Plain = False,
    stream: Stream = False,
    dtype: common.Dtype = "auto",
    device: common.Device = "auto",
    overwrite: Overwrite = False,
    json_output: common.Json = False,
) -> None:
    _run("translation", **locals())


def _run(
    task: str | None,
    *,
    model: str,
    input: str | None,
    text: str | None,
    output: str | None,
    text_column: str | None,
    overwrite: bool,
    json_output: bool,
    stream: bool,
    dtype: str,
    device: str,
    **options,
) -> None:
    if (input is None) == (text is None):
        raise common.WrongUsage("give either --input or --text" + ("" if input is None else ", not both"))
    if input not in (None, "-") and not Path(input).is_file():
        raise common.WrongUsage(f"--input must be a file or -, {input!r} is not there")
    if stream and (text is None or output is not None or json_output):
        raise common.WrongUsage("--stream is for --text on stdout: leave out --input, --output and --json")
    common.check_new_file("--output", output, overwrite)
    from dqkernels import text as library
    from dqkernels.launcher import Processes

    processes = Processes.of_launcher(cpu=device == "cpu")
    if processes.count > 1 and (input in (None, "-") or output is None):
        raise common.WrongUsage(f"{processes.count} processes share an --input file and write an --output file")
    with common.checking_input():
        # A file is read and checked whole before a model is loaded; a stream is read as it comes.
        texts = [text] if text is not None else files.read_texts(input, files.column_of(input, text_column))
        texts = texts if input == "-" else list(texts)
        texts = texts[processes.index :: processes.count] if processes.count > 1 else texts
        common.quiet_transformers()
        here = str(processes.device) if processes.count > 1 and device == "auto" else device
        loaded, tokenizer = library.open_model(model, dtype=dtype, device=here)
        if stream:
            options.update(_streamed(loaded, tokenizer, options["num_beams"]))
        sources, copies = itertools.tee(texts)
        # A bar between lines on the same terminal would be in their way.
        progress = processes.index == 0 and not stream and (output is not None or not sys.stdout.isatty())
        total = len(texts) if isinstance(texts, list) else None
        outputs = library.stream_texts(loaded, tokenizer, sources, task=task, progress=progress, total=total, **options)
    started = time.monotonic()
    numbers = itertools.count(processes.index, processes.count)
    records = ({"index": n, "input": i, "output": o} for n, o, i in zip(numbers, outputs, copies, strict=False))
    if stream:
        list(records)  # its streamer prints
        return
    count = _written(records, output) if processes.count == 1 else _shared(records, output, processes)
    if processes.index > 0:
        return
    seconds = time.monotonic() - started
    if output is not None:
        common.say(f"wrote {count} output{'' if count == 1 else 's'} to {output} in {seconds:.1f} s")
        if json_output:
            common.print_json({"output": output, "count": count, "seconds": round(seconds, 3)})
    elif count == 0:
        common.say("the input is empty: no outputs")


def _streamed(model, tokenizer, num_beams: int | None) -> dict:
    """Options of `generate` under which the tokens of one text are printed as they come."""
    from transformers import TextStreamer

    if num_beams not in (None, 1):
        raise ValueError(f"num_beams must be 1 to print words as they are written, got {num_beams}")
    return {"num_beams": 1, "streamer": TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)}


def _written(records: Iterable[dict], output: str | None) -> int:
    """Writes records to a file, complete or absent, or to stdout as they come; how many there were."""
    count = 0
    with contextlib.ExitStack() as stack:
        if output is None:
            file = sys.stdout
        else:
            path = stack.enter_context(files.atomic_file(output))
            file = stack.enter_context(open(path, "w", encoding="utf-8"))
        try:
            for count, record in enumerate(records, 1):  # noqa: B007
                print(json.dumps(record, ensure_ascii=False), file=file, flush=output is None)
        except files.InputError as error:
            raise common.WrongUsage(str(error)) from error
    return count


def _shared(records: Iterable[dict], output: str, processes) -> int:
    """As `_written`, of the records of all processes in their order; how many the first one wrote into `output`."""
    folder = Path(output).with_name(f".{Path(output).name}.shares")
    if processes.index == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    processes.wait()
    _written(records, str(folder / f"{processes.index}.jsonl"))
    processes.wait()
    count = 0
    if processes.index == 0:
        with contextlib.ExitStack() as stack:
            shares = [
                stack.enter_context(open(folder / f"{i}.jsonl", encoding="utf-8")) for i in range(processes.count)
            ]
            # Record n stands in share n % count: in turn, until the first one has no more.
            lines = itertools.chain.from_iterable(itertools.zip_longest(*shares))
            count = _written((json.loads(line) for line in lines if line is not None), output)
        shutil.rmtree(folder)
    processes.wait()
    return count
