"""`dqkernels bench compare`: two records of one benchmark, and what moved between them."""

from __future__ import annotations

from typing import Annotated

import typer

from dqkernels.cli import common

_HELP = """What became slower, faster, larger or smaller from one record to another of the same benchmark.

Times are compared as shares of torch's own time in the same run (or of the candidate named by --against), since two
runs do not take turns. A row is named where it moved by more than the noise of its samples and 3%. Exit code 1 if a row
became slower or larger by more than --threshold, or was timed before and fails now.

\b
Examples:
  dqkernels bench linear --out before.json
  dqkernels bench linear --out after.json
  dqkernels bench compare before.json after.json
  dqkernels bench compare before.json after.json --threshold 0.1 --all
"""


def register(group: typer.Typer) -> None:
    group.command("compare", help=_HELP, short_help="Two records: what moved beyond its noise.")(compare)


def compare(
    before: Annotated[str, typer.Argument(help="The older record.", metavar="BEFORE")],
    after: Annotated[str, typer.Argument(help="The newer record.", metavar="AFTER")],
    threshold: Annotated[
        float, typer.Option("--threshold", help="A loss past this share is a failure: exit code 1.")
    ] = 0.05,
    against: Annotated[
        str | None, typer.Option("--against", help="The candidate that is the yardstick; default: torch's own.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Show rows that did not move too.")] = False,
    table: common.Table = None,
    overwrite: common.Overwrite = False,
    json_output: common.Json = False,
) -> None:
    common.check_table(table, overwrite)
    from dqkernels.bench import compare as library

    with common.checking_input():  # a file that is not there, no record, or of another kind
        result = library.read_and_compare(before, after, against=against, threshold=threshold)
    if json_output:
        common.print_json(result)
    else:
        common.console().print(library.render(result, everything))
    common.wrote(result, None, table)
    if result["losses"]:
        raise common.Failed(f"{result['losses']} of {len(result['rows'])} figures lost more than {threshold:.0%}")
