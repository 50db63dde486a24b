"""`dqkernels bench train`: time and activation memory of a training step."""

from __future__ import annotations

from typing import Annotated

import typer

from dqkernels.cli import common

_HELP = """One training step, float autograd against straight-through at every width: time, and what autograd keeps.

On a GPU the work is encoder layers of BART-large under autocast, on a CPU the shipped demo model in float32. A step is
forward, backward and AdamW, with the quantization of every weight in it. A candidate is proven first: the packed copy
of its model gives its output, bit for bit. Steps of the candidates take turns; below the table stand the project's
goals.

\b
Examples:
  dqkernels bench train --seconds 30
  dqkernels bench train --bits 2 --fixed --out train.json
  dqkernels bench train --device cuda --dtype bfloat16
"""


def register(group: typer.Typer) -> None:
    group.command("train", help=_HELP, short_help="A training step: time, activation memory.")(train)


def train(
    bits: Annotated[str, typer.Option("--bits", help="Weight widths, comma-separated.")] = "8,4,2",
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="Of autocast, comma-separated; default: float16,bfloat16 on a GPU, else float32."),
    ] = None,
    device: common.Device = "auto",
    fixed: Annotated[bool, typer.Option("--fixed", help="The fixed rule of each width, not learned steps.")] = False,
    seconds: Annotated[float, typer.Option("--seconds", help="About what the timing may take.")] = 60.0,
    out: common.Out = None,
    table: common.Table = None,
    overwrite: common.Overwrite = False,
    json_output: common.Json = False,
) -> None:
    widths = common.choices("--bits", bits, (8, 4, 2))
    if not 0 < seconds < 86400:
        raise common.WrongUsage(f"--seconds must be above 0, got {seconds:g}")
    common.check_new_file("--out", out, overwrite)
    common.check_table(table, overwrite)
    from dqkernels import text
    from dqkernels.bench import train_step as library

    common.quiet_transformers()
    with common.checking_input():
        place = text.check_device(device)
        kinds = None if dtype in (None, "auto") else [text.check_dtype(part.strip()) for part in dtype.split(",")]
    result = library.run(place, widths, kinds, not fixed, seconds=seconds, out=out)
    if json_output:
        common.print_json(result)
    else:
        common.console().print(library.render(result))
        for line in library.verdicts(result):
            print(line)
        if result["environment"]["gpu"] is None:
            print("GPU: not run")
    common.wrote(result, out, table)
