"""`dqkernels tune` and `dqkernels warmup`: what can be done before the first request, on the GPU that will serve."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Annotated

import typer

from dqkernels.cli import common

_TUNE = """Measure which GEMM tile and plan is fastest on this GPU, once, and keep the answers in a file.

Triton's GEMM takes tiles; the CUDA GEMM for up to 64 rows takes plans of how its work is cut up, and for 17 to 64
rows the file also says which of the two is faster: backend="auto" follows. Without a file all of it is chosen by
rule; no kernel is ever timed while a model runs, and no result depends on a tile or a plan. Give MODEL for the
layers of a model (a shape such as bart-base, a folder or a hub id; only its config is read), or --sizes. The file is
written after every size and an interrupted run goes on where it stopped. Without --out it lies where dqkernels looks
for it; contributed files ship with the package. Needs a GPU.

\b
Examples:
  dqkernels tune bart-large
  dqkernels tune ./bart-cnn-w4 --bits 4 --tokens 1,16,64,1024
  dqkernels tune bart-base --backends cuda --tokens 1,4,16,32,64
  dqkernels tune --sizes 4096x1024,1024x4096 --group_size 64 --out h200.json
"""
_WARMUP = """Compile the kernels of a packed model ahead of its first request.

Runs one layer of every shape at every number of tokens; what is compiled stays in Triton's cache on disk
(TRITON_CACHE_DIR), so do it where an image is built. --tokens are rows of a layer: batch times beams in decoding,
batch times source length in encoding.

\b
Examples:
  dqkernels warmup ./bart-cnn-w4
  dqkernels warmup ./bart-cnn-w4 --tokens 4,64,4096 --dtype float16
"""


def register(app: typer.Typer) -> None:
    app.command("tune", help=_TUNE, short_help="Measure the best GEMM tiles and plans on this GPU.")(tune)
    app.command("warmup", help=_WARMUP, short_help="Compile a model's kernels ahead of time.")(warmup)


def tune(
    model: Annotated[str | None, typer.Argument(help="Shape, folder or hub id.", metavar="MODEL")] = None,
    sizes: Annotated[str | None, typer.Option("--sizes", help="OUTxIN, comma-separated; default: BART's own.")] = None,
    tokens: Annotated[str | None, typer.Option("--tokens", help="Rows, comma-separated; default: 1 to 4096.")] = None,
    bits: Annotated[str, typer.Option("--bits", help="Weight widths, comma-separated.")] = "8,4,2",
    group_size: Annotated[str, typer.Option("--group_size", help="-1, 32, 64, 128, comma-separated.")] = "-1",
    backends: Annotated[
        str | None, typer.Option("--backends", help="cuda, triton, comma-separated; default: those that run here.")
    ] = None,
    device: common.Device = "auto",
    seconds: Annotated[float, typer.Option("--seconds", help="Of timing for each size and number of tokens.")] = 1.0,
    out: Annotated[str | None, typer.Option("--out", help="File; default: where dqkernels looks for it.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what the file holds of them.")] = False,
    json_output: common.Json = False,
) -> None:
    if model is not None and sizes is not None:
        raise common.WrongUsage("give either MODEL or --sizes, not both")
    pairs = None if sizes is None else [common.numbers("--sizes", part, "x", 2, "OUTxIN") for part in sizes.split(",")]
    rows = None if tokens is None else _tokens(tokens)
    widths = common.choices("--bits", bits, (2, 4, 8))
    groups = common.choices("--group_size", group_size, (-1, 32, 64, 128))
    kernels = None if backends is None else _kernels(backends)
    if not 0 < seconds < 3600:
        raise common.WrongUsage(f"--seconds must be above 0, got {seconds:g}")
    common.check_new_file("--out", out, overwrite=True)
    from dqkernels import text
    from dqkernels.bench import tune as library

    common.quiet_transformers()
    with common.checking_input():
        place = text.check_device(device)
    try:
        kernels = library.usable_kernels(place, kernels)
    except library.TuneError as error:
        raise common.Failed(str(error)) from error
    with common.checking_input():
        if model is not None:
            pairs = library.model_sizes(model)
        wanted = library.cells(pairs or library.SIZES, rows or library.TOKENS, widths, groups, kernels)
    try:
        with _bar("tune") as progress, common.checking_input():
            result = library.run(wanted, device=place, out=out, seconds=seconds, fresh=fresh, progress=progress)
    except library.TuneError as error:
        raise common.Failed(str(error)) from error
    if json_output:
        common.print_json(result)
    else:
        common.console().print(library.render(result))
    where = out if out is not None else str(library.default_file(place))
    if wrong := library.mismatches(result):
        raise common.Failed(
            f"a tile or a plan gave other bits than the rule's, which must never be: {'; '.join(wrong)}. "
            "It was not taken; please report it with the file"
        )
    common.say(f"wrote {where}" + ("" if out is None else f"; DQKERNELS_TILES={out} takes it"))


def warmup(
    model: Annotated[str, typer.Argument(help="Folder or hub id of a packed model.", metavar="MODEL")],
    tokens: Annotated[str | None, typer.Option("--tokens", help="Rows, comma-separated; default: 1 to 2048.")] = None,
    dtype: common.Dtype = "auto",
    device: common.Device = "auto",
    json_output: common.Json = False,
) -> None:
    rows = None if tokens is None else _tokens(tokens)
    from dqkernels import text
    from dqkernels import warmup as library

    with common.checking_input():
        common.quiet_transformers()
        loaded, _ = text.open_any_model(model, dtype=dtype, device=device)
        with _bar("warmup") as progress:
            found = library.warmup(loaded, rows or library.TOKENS, progress)
    common.show(found, json_output)


def _kernels(text: str) -> tuple[str, ...]:
    names = tuple(part.strip() for part in text.split(","))
    if bad := [name for name in names if name not in ("cuda", "triton")]:
        raise common.WrongUsage(f"--backends must be cuda or triton, comma-separated, got {bad[0]!r}")
    return names


def _tokens(text: str) -> list[int]:
    return [common.numbers("--tokens", part, "x", 1)[0] for part in text.split(",")]


@contextlib.contextmanager
def _bar(name: str) -> Iterator:
    """A bar on stderr that the library's `progress(done, total, what comes next)` moves; none before its first call."""
    from tqdm import tqdm

    with contextlib.ExitStack() as stack:
        bars = []

        def progress(done: int, total: int, next_: str) -> None:
            if not bars:
                bar = tqdm(total=total, initial=done, desc=name, unit="", leave=False, dynamic_ncols=True)
                bars.append(stack.enter_context(bar))
            bars[0].n = done
            bars[0].set_postfix_str(next_, refresh=True)

        yield progress
