"""`dqkernels plot`: pictures of records, and a page about them."""

from __future__ import annotations

from typing import Annotated

import typer

from dqkernels.cli import common

_HELP = """Draw the records of `dqkernels bench` and `dqkernels demo` again: pictures for light and dark pages.

Nothing is measured: a picture shows what its record holds, with machine, date and n below it. What was computed (a
floor, a projection, the paper's count) is never in one series with what was measured.

\b
What is drawn, by kind of record:
  linear, gemm       time by tokens, with the floor; bytes; share of the floor
  kernels            share of the floor of each op
  generate, model    time per token, tokens a second, memory
  training           time and activations of a step
  size               file sizes
  quality, demo      score against compression ratio
Other kinds have no picture; --html makes tables of them all the same.

A file is named RECORD-PICTURE-STYLE.png, in the current folder or in --output_dir. Files that `dqkernels plot` wrote
are replaced; anything else needs --overwrite. --html writes one page with pictures, machine, protocol and every row;
it opens without a network, and is all that is written unless --output_dir is given.

\b
Examples:
  dqkernels plot generate.json
  dqkernels plot linear.json gemm.json --output_dir pictures --style dark
  dqkernels plot --html report.html benchmarks/results/*.json
"""


def register(app: typer.Typer) -> None:
    app.command("plot", help=_HELP, short_help="Pictures and a page of benchmark records.")(plot)


def plot(
    records: Annotated[list[str], typer.Argument(help="Records: JSON files.", metavar="RECORD")],
    output_dir: Annotated[
        str | None, typer.Option("--output_dir", help="Folder for the pictures; made if needed.")
    ] = None,
    style: Annotated[str, typer.Option("--style", help="light, dark or both.")] = "both",
    image_format: Annotated[str, typer.Option("--format", help="png or svg.")] = "png",
    html: Annotated[str | None, typer.Option("--html", help="File for a page about all the records.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace files that this verb has not written, too.")
    ] = False,
    json_output: common.Json = False,
) -> None:
    from dqkernels.bench import picture_draw
    from dqkernels.bench import plot as library

    styles = {"both": library.STYLES} | {name: (name,) for name in library.STYLES}
    if style not in styles:
        raise common.WrongUsage(f"--style must be {', '.join(library.STYLES)} or both, got {style!r}")
    if image_format not in library.FORMATS:
        raise common.WrongUsage(f"--format must be {' or '.join(library.FORMATS)}, got {image_format!r}")
    if html is not None:
        common.check_new_file("--html", html, overwrite=True)  # whose file it is, the library sees
    folder = "." if output_dir is None and html is None else output_dir
    try:
        with common.checking_input():
            written = library.run(
                records, folder, styles=styles[style], kind=image_format, html=html, overwrite=overwrite
            )
    except picture_draw.NoMatplotlib as error:
        raise common.Failed(str(error)) from error
    if json_output:
        common.print_json({"written": [str(path) for path in written]})
        return
    for path in written:
        print(path)
