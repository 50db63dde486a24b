"""`dqkernels demo`: the shipped model at 8, 4 and 2 bits, on docstrings it has not seen."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from dqkernels.cli import common

_HELP = """Quantize the shipped model at 8, 4 and 2 bits and compare what each writes. Offline, about a
minute.

The model turns the body of a docstring into its first sentence. It is packed, saved, loaded again and run on
docstrings of the packages installed here that its training never saw. Beside it runs DQ-2, a student of it that
was trained at 2 bits and ships with the package. Printed: sample summaries side by side, and a table of file size,
ROUGE, speed and kernel. Written: demo.json (every pair and every text) and demo.png.

W4 is 4-4-8 (weights-embeddings-activations), and so on. W8, W4 and W2 are rounding alone: at 2 bits that costs
quality, which training with quantization (DQ-2) gets back.

\b
Examples:
  dqkernels demo
  dqkernels demo --out results --samples 5
  dqkernels demo --pairs 64 --json
"""


def register(app: typer.Typer) -> None:
    app.command("demo", help=_HELP, short_help="The shipped model at 8, 4 and 2 bits, side by side.")(demo)


def demo(
    out: Annotated[str, typer.Option("--out", help="Folder for demo.json and demo.png; made if needed.")] = ".",
    pairs: Annotated[int, typer.Option("--pairs", help="Held-out docstrings to score.")] = 320,
    samples: Annotated[int, typer.Option("--samples", help="Docstrings shown side by side.")] = 3,
    seed: Annotated[int, typer.Option("--seed", help="Which pairs are drawn.")] = 0,
    json_output: common.Json = False,
) -> None:
    for flag, value, least in (("--pairs", pairs, 1), ("--samples", samples, 0), ("--seed", seed, 0)):
        if value < least:
            raise common.WrongUsage(f"{flag} must be at least {least}, got {value}")
    # Threads that spin while they wait make a demo of seconds one of minutes as soon as another program wants a
    # core (measured: 2.7 against 189 ms per token). Read by the OpenMP runtime when torch loads it.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from dqkernels.bench import demo as library

    with common.checking_input():
        library.check_out(out)
    common.quiet_transformers()
    # With --json stdout belongs to the result; what people read goes to stderr then.
    result = library.run(out, samples=samples, pairs=pairs, seed=seed, console=common.console(stderr=json_output))
    if json_output:
        common.print_json(result)
