"""`dqkernels bench projected`: the least times of a card by its datasheet, labelled as what they are."""

from __future__ import annotations

from typing import Annotated

import typer

from dqkernels.cli import common

_HELP = """The least times a card allows, by its datasheet: arithmetic, no measurement, any machine.

Every figure is max(bytes / bandwidth, 2 M N K / peak) of a GEMM, or the sum of these over the
linears of a decode step. Launches, attention, norms and caches are left out, and no kernel
reaches a floor. A record of it is of the kind "projected": it never stands beside measured rows,
and `bench compare` refuses it.

\b
Examples:
  dqkernels bench projected
  dqkernels bench projected --card a100-40 --tokens 1,16
  dqkernels bench projected --card a100-80-pcie --out projected.json
"""


def register(group: typer.Typer) -> None:
    group.command("projected", help=_HELP, short_help="A card's least times by its datasheet.")(projected)


def projected(
    card: Annotated[
        str, typer.Option("--card", help="a100-40, a100-80-sxm, a100-80-pcie, h100-sxm, h100-pcie or h200.")
    ] = "a100-80-sxm",
    shapes: Annotated[
        str | None, typer.Option("--shapes", help="OUTxIN or llama-7b-linear, comma-separated; default: of bench gemm.")
    ] = None,
    tokens: Annotated[str, typer.Option("--tokens", help="Rows, comma-separated.")] = "1,16,64",
    models: Annotated[
        str, typer.Option("--models", help="Shapes for whole decode steps, comma-separated.")
    ] = "bart-base,bart-large",
    out: common.Out = None,
    table: common.Table = None,
    overwrite: common.Overwrite = False,
    json_output: common.Json = False,
) -> None:
    pairs = None if shapes is None else common.sizes("--shapes", shapes)
    rows = [common.numbers("--tokens", part, "x", 1)[0] for part in tokens.split(",")]
    common.check_new_file("--out", out, overwrite)
    common.check_table(table, overwrite)
    from dqkernels.bench import projected as library

    with common.checking_input():
        result = library.run(card, pairs, rows, [part.strip() for part in models.split(",")], out=out)
    if json_output:
        common.print_json(result)
    else:
        common.console().print(library.render(result))
    common.wrote(result, out, table)
