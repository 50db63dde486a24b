"""`dqkernels bench peers`: the other projects that the benchmarks know, and which are here."""

from __future__ import annotations

import typer

from dqkernels.cli import common

_HELP = """The other projects that the benchmarks compare with: which are here, and how to install the others.

\b
Examples:
  dqkernels bench peers
  dqkernels bench peers --json
"""


def register(group: typer.Typer) -> None:
    group.command("peers", help=_HELP, short_help="Other projects: which are here, how to install.")(peers)


def peers(
    device: common.Device = "auto",
    table: common.Table = None,
    overwrite: common.Overwrite = False,
    json_output: common.Json = False,
) -> None:
    common.check_table(table, overwrite)
    from dqkernels import text
    from dqkernels.bench import peers as library

    with common.checking_input():
        place = text.check_device(device)
    rows = library.listed(place)
    if json_output:
        common.print_json({"device": place.type, "peers": rows})
    else:
        common.console().print(library.render(rows, place))
    common.wrote({"rows": rows}, None, table)
