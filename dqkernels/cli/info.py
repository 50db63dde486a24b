"""`dqkernels info`: what is installed and which kernels run here."""

from __future__ import annotations

import typer

from dqkernels.cli import common

_HELP = """Show versions, devices, and which kernels run here and why the others do not.

\b
Examples:
  dqkernels info
  dqkernels info --json
"""


def register(app: typer.Typer) -> None:
    app.command("info", help=_HELP, short_help="What is installed, which kernels run here.")(info)


def info(json_output: common.Json = False) -> None:
    import dqkernels

    found = dqkernels.info()
    common.show(found, json_output)
