"""`dqkernels quantize`: a float model folder in, a packed one out."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated

import typer

from dqkernels.cli import common, files

_HELP = """Pack a float model into 2-, 4- or 8-bit weights and save it as a folder that transformers loads.

Bits are written weights-embeddings-activations. 4-8-8 is the default: 4-bit linear layers, an 8-bit token
embedding (shared with the output head where they are tied), 8-bit activations. --embedding_bits 16 leaves the
embedding as it is. 2 bits without training cost quality: compare with `dqkernels demo`, or train
with `dqkernels train`.

\b
--weight_quantizer  auto        the measured default of each width
                    absmax, mse for 4- and 8-bit tensors
                    ternary     2 bits: -1, 0, 1
                    four_level  2 bits: -3/2, -1/2, 1/2, 3/2
--act_granularity   per_token   one scale per token, independent of the batch
                    per_tensor  the paper's; results depend on batch mates
                    static      one per layer, out of --calibration_file
--attention         auto        int8 in BART, mBART, Marian, Pegasus, M2M100
                                (NLLB), PLBart and Blenderbot
                    int8        in T5 too
                    float       stays in float

\b
Examples:
  dqkernels quantize ./bart-cnn ./bart-cnn-w4
  dqkernels quantize ./bart-cnn ./bart-cnn-w2 --weight_bits 2 \\
      --embedding_bits 4 --group_size 64
  dqkernels quantize ./dq-bart ./dq-bart-packed --preset dq-bart-2-2-8
  dqkernels quantize ./bart-cnn ./bart-static --act_granularity static \\
      --calibration_file texts.txt

MODEL may be of any class of transformers that config.json names: BART and T5, BERT, Llama, their heads
included. A tokenizer is copied where there is one, and needed for static only. Load the result with `import
dqkernels` before `from_pretrained(OUT)` of the Auto class that the model card in OUT names. Weights are read
from safetensors only, and no code that comes with a model is run.
"""


def register(app: typer.Typer) -> None:
    app.command("quantize", help=_HELP, short_help="Pack a model into 2, 4 or 8 bits and save it.")(quantize)


def quantize(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Float model: folder or hub id.", metavar="MODEL")],
    out: Annotated[str, typer.Argument(help="Folder to write, complete or absent.", metavar="OUT")],
    weight_bits: Annotated[int, typer.Option("--weight_bits", help="Linear layers: 2, 4 or 8.")] = 4,
    embedding_bits: Annotated[
        int, typer.Option("--embedding_bits", help="Token embedding and tied head: 2, 4, 8 or 16.")
    ] = 8,
    weight_quantizer: Annotated[
        str, typer.Option("--weight_quantizer", help="auto, absmax, mse, ternary or four_level.")
    ] = "auto",
    weight_granularity: Annotated[
        str, typer.Option("--weight_granularity", help="per_channel, or per_tensor (the paper's rule).")
    ] = "per_channel",
    group_size: Annotated[
        int, typer.Option("--group_size", help="At 2 and 4 bits: inputs that share a multiplier: 32, 64, 128.")
    ] = -1,
    act_granularity: Annotated[
        str, typer.Option("--act_granularity", help="per_token, per_tensor or static.")
    ] = "per_token",
    act_clip: Annotated[
        float | None, typer.Option("--act_clip", help="Clamp activations to +-this first (the paper: 2.5).")
    ] = None,
    head: Annotated[str, typer.Option("--head", help="quantized, or float to leave the output head.")] = "quantized",
    preset: Annotated[
        str | None, typer.Option("--preset", help="The paper's rules, such as dq-bart-2-2-8; excludes the above.")
    ] = None,
    attention: Annotated[str, typer.Option("--attention", help="auto, int8 or float; also beside --preset.")] = "auto",
    calibration_file: Annotated[
        str | None, typer.Option("--calibration_file", help="For static: one text per line, or JSON lines.")
    ] = None,
    text_column: Annotated[
        str | None, typer.Option("--text_column", help="Field of a JSON line that holds the text (*.jsonl: text).")
    ] = None,
    calibration_samples: Annotated[
        int, typer.Option("--calibration_samples", help="Texts of the file to use, from its start.")
    ] = 128,
    dtype: Annotated[
        str, typer.Option("--dtype", help="Float type of what is not packed: bfloat16, float16, float32 or auto.")
    ] = "bfloat16",
    device: common.Device = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model folder OUT that is there.")] = False,
    json_output: common.Json = False,
) -> None:
    rules = {
        "weight_bits": weight_bits,
        "embedding_bits": embedding_bits,
        "weight_quantizer": weight_quantizer,
        "weight_granularity": weight_granularity,
        "group_size": group_size,
        "act_granularity": act_granularity,
        "act_clip": act_clip,
        "head": head,
    }
    if preset is not None:
        given = [name for name in rules if context.get_parameter_source(name).name == "COMMANDLINE"]
        if given:
            raise common.WrongUsage(f"--preset {preset} sets all rules itself: leave out --{given[0]}")
    if calibration_samples < 1:
        raise common.WrongUsage(f"--calibration_samples must be at least 1, got {calibration_samples}")
    import dqkernels
    from dqkernels import reporting, serialize
    from dqkernels import text as library

    with common.checking_input():
        if preset is None:
            config = dqkernels.DQConfig(**rules, attention=attention)
        else:
            config = dqkernels.DQConfig.preset(preset, attention=attention)
        files.check_new_folder(out, overwrite)
        static = config.act_granularity == "static"
        if static != (calibration_file is not None):
            wish = "needs --calibration_file" if static else "measures nothing: leave out --calibration_file"
            raise common.WrongUsage(f"--act_granularity {config.act_granularity} {wish}")
        texts = []
        if static:
            column = files.column_of(calibration_file, text_column)
            texts = list(itertools.islice(files.read_texts(calibration_file, column), calibration_samples))
        common.quiet_transformers()
        loaded, tokenizer = library.open_any_model(model, dtype=dtype, device=device, need_tokenizer=static)
        if getattr(loaded.config, "quantization_config", None) is not None:
            raise common.WrongUsage(f"MODEL must be a float model, {model!r} is quantized already")
        batches = library.calibration_batches(loaded, tokenizer, texts) if static else None
        # What these refuse (weights with a NaN, texts that give one) is the input's fault as well.
        dqkernels.quantize_(loaded, config)
        if static:
            dqkernels.calibrate(loaded, batches)
    serialize.save(loaded, out, tokenizer=tokenizer)
    file_bytes = sum(path.stat().st_size for path in Path(out).glob("*.safetensors"))
    report = dqkernels.report(loaded)
    fp32_bytes = reporting.teacher_bytes(loaded)
    ratio = fp32_bytes / file_bytes
    if json_output:
        sizes = {"file_bytes": file_bytes, "fp32_bytes": fp32_bytes, "ratio": round(ratio, 3)}
        common.print_json({"out": out, "bits": config.name, **sizes, "report": common.plain(report)})
        return
    print(report)
    print(
        f"\nwrote {out}: {file_bytes / 1e6:.2f} MB, {ratio:.2f} times smaller than its "
        f"{fp32_bytes / 1e6:.2f} MB of fp32 weights"
    )
    print(f"load:  import dqkernels; {reporting.auto_class(type(loaded).__name__)}.from_pretrained({out!r})")
