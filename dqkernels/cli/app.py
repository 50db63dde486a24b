"""The tree of verbs."""

from __future__ import annotations

from typing import Annotated

import typer

from dqkernels import environment
from dqkernels.cli import bench, common, demo, distill_data, eval, generate, info, plot, quantize, train, tune

_HELP = """Real 2/4/8-bit weights x 8-bit activations for Hugging Face seq2seq models.

Bits are written weights-embeddings-activations: 2-2-8 means 2-bit linear layers, a 2-bit token embedding
(and the output head tied to it), and 8-bit activations. Layers are written encoder-decoder: 6-3.

\b
Start here:
  dqkernels demo                             the shipped model at 8, 4, 2 bits
  dqkernels info                             which kernels run here, and why
  dqkernels quantize ./bart-cnn ./bart-w4    4-bit layers, 8-bit embeddings
  dqkernels summarize ./bart-w4 --text "Some long text ..."

Flags are spelled with underscores; dashes are accepted too. Exit codes: 0 done, 1 failed, 2 wrong usage, 130
interrupted. `dqkernels VERB --help` says more of each.
"""


def build():
    """The click command behind `dqkernels`."""
    app = typer.Typer(
        help=_HELP,
        no_args_is_help=True,
        add_completion=False,
        # Plain text: readable at 80 columns, in a pipe and in a log.
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={
            "help_option_names": ["-h", "--help"],
            "max_content_width": 100,
            # --weight-bits is --weight_bits; values are left alone.
            "token_normalize_func": lambda token: token.replace("-", "_"),
        },
    )
    app.callback()(_root)
    for module in (info, demo, quantize, generate, train, distill_data, eval, bench, plot, tune):
        module.register(app)
    return typer.main.get_command(app)


def _show_version(wanted: bool) -> None:
    if wanted:
        from dqkernels import __version__

        print(f"dqkernels {__version__}")
        raise typer.Exit()


def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_show_version)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of a failure (any place).")] = False,
) -> None:
    """Global options; `--debug` is taken off the arguments before they are parsed.

    Runs before every verb, so this is where the environment is checked: help needs none.
    """
    with common.checking_input():
        environment.check()
