"""`dqkernels train` and `dqkernels export`: a fine-tuned teacher in, a distilled, quantized, packed student out."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from dqkernels.cli import common, files

_TRAIN_HELP = """Distil and quantize a fine-tuned seq2seq model at once, through the kernels that
will serve it.

The teacher is the model you name; the student starts as a copy of (some of) its
layers. Bits are written weights-embeddings-activations. Checkpoints are whole
or absent: after a kill, the same command with --resume_from_checkpoint true
goes on where it stopped.

Examples:
  dqkernels train --model_name_or_path ./bart-cnn --output_dir out --bf16 \\
      --dataset_name abisee/cnn_dailymail --weight_bits 2 \\
      --student_encoder_layers 6 --student_decoder_layers 3
  dqkernels train --model_name_or_path ./bart-cnn --output_dir out \\
      --train_file pairs.jsonl --validation_file dev.jsonl --preset dq-bart \\
      --weight_bits 8 --eval_strategy epoch --metric_for_best_model rougeL
  dqkernels train --model_name_or_path ./teacher --output_dir out \\
      --stages stages.yaml
  accelerate launch --num_processes 4 -m dqkernels train ...
  dqkernels export out bart-2-2-8
  dqkernels eval bart-2-2-8 --dataset_name abisee/cnn_dailymail

--config FILE reads flags from YAML or JSON; those on the command line count
more. A stages file holds
  stages:
    - {name: teacher, train_file: teacher.jsonl, num_train_epochs: 3}
    - {name: gold, dataset_name: EdinburghNLP/xsum, learning_rate: 1.0e-4}
where teacher.jsonl comes from `dqkernels distill-data`; several sources at once
are mix: [{train_file: a.jsonl, weight: 2}, ...].
"""
_EXPORT_HELP = """Pack a trained model: what `dqkernels train` left in its output folder, or one of its checkpoints.

The packed model computes what the training's forward pass did: equal logits, bit for bit, in eval mode and the same
float type. A folder that was trained in float is refused: `dqkernels quantize` packs those.

\b
Examples:
  dqkernels export out bart-2-2-8
  dqkernels export out/checkpoint-500 bart-2-2-8 --dtype float16
"""


def register(app: typer.Typer) -> None:
    raw = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
    short = "Distil and quantize a model through its own kernels."
    # Its flags are read by transformers' parser, which knows the training arguments; so is --help.
    app.command("train", context_settings=raw, add_help_option=False, help=short, short_help=short)(train)
    app.command("export", help=_EXPORT_HELP, short_help="Pack what train left.")(export)


def train(context: typer.Context) -> None:
    words = list(context.args)
    json_output = "--json" in words
    if json_output:
        words.remove("--json")
    if not words or any(word in ("-h", "--help", "--help_all", "--help-all") for word in words):
        print(help_text(any(word in ("--help_all", "--help-all") for word in words)))
        raise typer.Exit(0 if words else 2)
    try:
        from dqkernels.train import run
        from dqkernels.train.arguments import ArgumentsError, parse
    except ImportError as error:
        raise common.Failed(f"training needs more packages: pip install 'dqkernels[train]' ({error})") from error
    first = os.environ.get("RANK", "0") == "0"
    common.show_log(warnings_only=not first)  # what several processes of a launch all say is said once
    with common.checking_input():
        arguments = parse(words)
        plan = run.describe(arguments)
    if first:
        common.say(*plan)
    out = arguments.training.output_dir
    try:
        # Trainer prints its lines of figures; stdout is for the result.
        with contextlib.redirect_stdout(sys.stderr):
            results = run.run(arguments)
    except (KeyboardInterrupt, SystemExit):
        if run.has_run(Path(out)):
            common.say("", f"what is whole is kept in {out}: --resume_from_checkpoint true goes on from there")
        raise
    except ArgumentsError as error:
        raise common.WrongUsage(str(error)) from error
    except (ValueError, OSError) as error:
        raise common.Failed(str(error)) from error
    if not first:
        return
    if json_output:
        common.print_json(results)
        return
    for name in sorted(results):
        if isinstance(results[name], int | float):
            print(
                f"{name:32} {results[name]:.4f}" if isinstance(results[name], float) else f"{name:32} {results[name]}"
            )
    print(f"\nwrote {out}")
    if results["settings"]["quantization"] is not None:
        print(f"pack it:  dqkernels export {out} {Path(out).name}-{arguments.config().name}")


def help_text(all_flags: bool = False) -> str:
    """Everything that `dqkernels train --help` says."""
    from dqkernels.train import arguments, presets

    lines = [_TRAIN_HELP, "Presets (--preset):", *presets.describe(), arguments.help_text(all_flags)]
    lines += ["", *arguments.described("json", "Print the figures as JSON.")]
    lines += arguments.described("help_all", "The same with every flag of transformers.Seq2SeqTrainingArguments.")
    return "\n".join(lines)


def export(
    checkpoint: Annotated[str, typer.Argument(help="Folder that train wrote, or a checkpoint.", metavar="TRAINED")],
    out: Annotated[str, typer.Argument(help="Folder to write, complete or absent.", metavar="OUT")],
    dtype: Annotated[
        str, typer.Option("--dtype", help="Float type of what is not packed: bfloat16, float16 or float32.")
    ] = "bfloat16",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model folder OUT that is there.")] = False,
    json_output: common.Json = False,
) -> None:
    import torch

    import dqkernels
    from dqkernels import reporting
    from dqkernels.train import qat

    dtypes = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if dtype not in dtypes:
        raise common.WrongUsage(f"--dtype must be one of {', '.join(dtypes)}, got {dtype!r}")
    common.quiet_transformers()
    with common.checking_input():
        files.check_new_folder(out, overwrite)
        model = qat.load_trained(checkpoint)
        if not qat.is_prepared(model):
            raise common.WrongUsage(f"{checkpoint!r} was trained in float: pack it with dqkernels quantize")
        tokenizer = _tokenizer_of(checkpoint)
        packed = qat.export(model, out, tokenizer, dtypes[dtype])
    file_bytes = sum(path.stat().st_size for path in Path(out).glob("*.safetensors"))
    fp32_bytes = reporting.teacher_bytes(packed)
    report = dqkernels.report(packed)
    if json_output:
        sizes = {"file_bytes": file_bytes, "fp32_bytes": fp32_bytes, "ratio": round(fp32_bytes / file_bytes, 3)}
        common.print_json({"out": out, **sizes, "report": common.plain(report)})
        return
    print(report)
    print(f"\nwrote {out}: {file_bytes / 1e6:.2f} MB, {fp32_bytes / file_bytes:.2f} times smaller than in fp32")
    if tokenizer is None:
        common.say(f"no tokenizer in {checkpoint}: copy one into {out} before `dqkernels generate`")


def _tokenizer_of(folder: str):
    """The tokenizer of a run: in its folder, or in the one above a checkpoint."""
    from transformers import AutoTokenizer

    for place in (Path(folder), Path(folder).parent):
        if any((place / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
            return AutoTokenizer.from_pretrained(place)
    return None
