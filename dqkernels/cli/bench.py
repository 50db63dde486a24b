"""`dqkernels bench ...`: measured tables of this machine, as text and as a JSON record, and two of them compared."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Annotated

import typer

from dqkernels.cli import bench_quality, bench_train, common, compare, peers, projected

_GROUP = """Measure layers, ops, whole models, file sizes, training steps and scores on this machine.

Every run prints a table; --out writes the record: rows, protocol, machine and versions. `dqkernels plot` draws it.
--table writes the rows alone: CSV with every field, or Markdown with those for people.

\b
Examples:
  dqkernels bench linear
  dqkernels bench gemm --seconds 120
  dqkernels bench kernels --seconds 10
  dqkernels bench generate tiny --seconds 30
  dqkernels bench cpu --seconds 600
  dqkernels bench size --shape bart-base --layers 6-3 --bits 2-2
  dqkernels bench train --seconds 30
  dqkernels bench quality --pairs 64
  dqkernels bench compare before.json after.json
  dqkernels bench projected --card a100-80-sxm
  dqkernels bench peers
"""
_LINEAR = """One linear layer at every bit width on every kernel that runs here, against torch's and other projects'.

A candidate is timed only after it was proven: ours bit-equal to the reference, others within a bound. Times
are medians of interleaved rounds, with the weights cold (from memory) and warm (from the cache).

\b
Examples:
  dqkernels bench linear
  dqkernels bench linear --shapes 1x768x768,128x3072x768 --bits 4,2
  dqkernels bench linear --backends cpu,eager --out linear.json
  dqkernels bench linear --shapes 1xllama-7b-linear --bits 4,2 \\
      --group_sizes -1,64
"""
_GEMM = """The GEMM of a decoding step, 1 to 64 rows: ours, cuBLAS, gemlite, Humming and BitBLAS in one run.

Input is float and output is float: quantizing it is inside the timed call of every int8 candidate. Times are medians
of 200 replays of CUDA graphs, cold and warm, the device's floor beside each; the goals of the project stand below,
each met, not met or not measured. Cells come in order of worth: a short run has those with goals. What is not
installed, or does not run here, is named as not compared.

\b
Examples:
  dqkernels bench gemm --seconds 120 --out gemm.json
  dqkernels bench gemm --shapes 4096x1024,1024x4096 --tokens 1,16 --bits 4,2
  dqkernels bench gemm --shapes llama-7b-linear --tokens 1
  dqkernels bench gemm --shapes 50265x768 --group_sizes -1,64 \\
      --backends cuda,triton
"""
_KERNELS = """Every op but the linear, at BART's shapes: on each backend that can, against torch's own and a copy.

A candidate is timed only after it was proven: exact ops bit-equal to the reference, others within their bound.
The quantizers, LayerNorm, GELU, attention over a cache and the rest that moves more than it computes also get their
share of the bandwidth of a copy, timed in turn with them. On a GPU there is the caller's time per call as well.

\b
Examples:
  dqkernels bench kernels --seconds 10
  dqkernels bench kernels --ops layernorm_quantize,gelu_quantize \\
      --dtype bfloat16
  dqkernels bench kernels --ops qembedding --bits 4,2 --out kernels.json
"""
_GENERATE = """Tokens by whole models: ours in its own loop and in transformers', float, int8 and 4-bit peers.

MODEL is a shape with random weights (tiny, bart-base, bart-large, mbart-large, t5-base; nothing is downloaded) or the
folder of a float model; by default bart-large on a GPU and in the sweep of memory, else bart-base. Every candidate
generates the same number of tokens, is proven to compute the same function, and takes turns with the others. Printed
are time per token, tokens a second, and memory: weights, cache, peak.

A sweep is a list of cells in order of worth: headline, layers (shallower models) or memory (4 beams over 1024 tokens,
batch 1 to 64, for a GPU). An axis that is given takes its place in every cell. What --seconds does not reach is named
as not run; --out is written after every cell, and --resume goes on with it.

\b
Examples:
  dqkernels bench generate tiny --seconds 30
  dqkernels bench generate bart-base --batch_size 1,8 --num_beams 1,4 \\
      --source_tokens 256 --new_tokens 64
  dqkernels bench generate bart-large --sweep memory \\
      --out memory.json --plot memory.png
  dqkernels bench generate ./bart-cnn --bits 4 \\
      --candidates torch,ours,ctranslate2
"""
_CPU = """What the goals of the CPU are about, in one run: each named at the end, met, not met or not measured.

Parts: gemv (one token through a linear, against a loop that only reads the same bytes), gemm (against torch's int8 and
fp32), step (what passes between two native decode steps), threads (a call right behind a parallel op of torch), memory
(a fresh process that loads a file and generates), generate (bench generate, with the peers that are installed).

Everything is proven before it is timed. --out is written after every part, and --resume goes on with it.

\b
Examples:
  dqkernels bench cpu --seconds 600 --out cpu.json
  dqkernels bench cpu --parts gemv,gemm --bits 4,2 --seconds 60
  dqkernels bench cpu --shape tiny --parts step,memory --seconds 10
"""
_SIZE = """The file of a packed student against its fp32 teacher's, really written, with random weights.

Layers are encoder-decoder, bits are weights-embeddings: 6-3 at 2-2 is the paper's smallest BART-base.

\b
Examples:
  dqkernels bench size
  dqkernels bench size --shape bart-base --layers 6-3 --bits 2-2,4-4,8-8
"""

LayerDtype = Annotated[
    str | None, typer.Option("--dtype", help="float32, float16 or bfloat16; default: what suits the device.")
]
Widths = Annotated[str, typer.Option("--bits", help="Weight widths, comma-separated.")]
Backends = Annotated[
    str | None, typer.Option("--backends", help="Kernels, comma-separated; default: all that run here.")
]
Seconds = Annotated[float, typer.Option("--seconds", help="About what the timing may take.")]


def register(app: typer.Typer) -> None:
    group = typer.Typer(no_args_is_help=True, rich_markup_mode=None, add_completion=False)
    group.command("linear", help=_LINEAR, short_help="One layer, every width and kernel.")(linear)
    group.command("gemm", help=_GEMM, short_help="The GEMM of decoding, against other projects'.")(gemm)
    group.command("kernels", help=_KERNELS, short_help="Every other op, on every backend.")(kernels)
    group.command("generate", help=_GENERATE, short_help="Whole models, against other projects'.")(generate)
    group.command("cpu", help=_CPU, short_help="What the goals of the CPU are about.")(cpu)
    group.command("size", help=_SIZE, short_help="Packed files against the fp32 file.")(size)
    bench_train.register(group)
    bench_quality.register(group)
    compare.register(group)
    projected.register(group)
    peers.register(group)
    app.add_typer(group, name="bench", help=_GROUP, short_help="Measure layers, models, sizes, scores here.")


def linear(
    shapes: Annotated[
        str | None,
        typer.Option(
            "--shapes",
            help="TOKENSxOUTxIN, comma-separated; llama-7b-linear, or with tokens, 1xllama-7b-linear; default: BART's.",
        ),
    ] = None,
    bits: Widths = "8,4,2",
    group_sizes: Annotated[
        str, typer.Option("--group_sizes", help="Of -1 (a scale per channel), 32, 64, 128; groups at 2 and 4 bits.")
    ] = "-1",
    dtype: LayerDtype = None,
    device: common.Device = "auto",
    backends: Backends = None,
    seconds: Seconds = 20.0,
    out: common.Out = None,
    table: common.Table = None,
    overwrite: common.Overwrite = False,
    json_output: common.Json = False,
) -> None:
    triples = None if shapes is None else common.sizes("--shapes", shapes, tokens=True)
    widths = common.choices("--bits", bits, (8, 4, 2))
    groups = common.choices("--group_sizes", group_sizes, (-1, 32, 64, 128))
    if set(widths) == {8} and -1 not in groups:
        raise common.WrongUsage(f"--group_sizes are for 2 and 4 bits, got {group_sizes} and --bits {bits}")
    library, place, dtype = _prepared("linear", dtype, device, backends, seconds, out, overwrite, table)
    if triples is not None:
        tokens = library.default_tokens(place)
        triples = [full for one in triples for full in ([one] if len(one) == 3 else [(m, *one) for m in tokens])]
    result = library.run(
        triples,
        bits=widths,
        dtype=dtype,
        device=place,
        backends=None if backends is None else backends.split(","),
        seconds=seconds,
        out=out,
        group_sizes=groups,
    )
    _finish(library, result, out, json_output, table)


def gemm(
    shapes: Annotated[
        str | None,
        typer.Option("--shapes", help="OUTxIN or llama-7b-linear, comma-separated; default: BART's and larger."),
    ] = None,
    tokens: Annotated[
        str | None, typer.Option("--tokens", help="Rows, comma-separated; default: 1,4,8,16,32,64.")
    ] = None,
    bits: Widths = "8,4,2",
    group_sizes: Annotated[
        str | None, typer.Option("--group_sizes", help="Of -1 (a scale per channel), 32, 64, 128; default: -1,128.")
    ] = None,
    dtype: LayerDtype = None,
    device: common.Device = "auto",
    backends: Backends = None,
    tune_peers: Annotated[
        bool, typer.Option("--tune_peers", help="Let BitBLAS search its schedules, minutes a shape.")
    ] = False,
    seconds: Seconds = 60.0,
    out: common.Out = None,
    table: common.Table = None,
    overwrite: common.Overwrite = False,
    json_output: common.Json = False,
) -> None:
    sizes = None if shapes is None else common.sizes("--shapes", shapes)
    rows = None if tokens is None else [common.numbers("--tokens", part, "x", 1)[0] for part in tokens.split(",")]
    widths = common.choices("--bits", bits, (8, 4, 2))
    groups = None if group_sizes is None else common.choices("--group_sizes", group_sizes, (-1, 32, 64, 128))
    library, place, dtype = _prepared("gemm", dtype, device, backends, seconds, out, overwrite, table)
    with common.checking_input():
        library.plan(place, sizes, rows, widths, groups)
    result = library.run(
        sizes,
        rows,
        widths,
        groups,
        dtype=dtype,
        device=place,
        backends=None if backends is None else backends.split(","),
        seconds=seconds,
        out=out,
        tune_peers=tune_peers,
    )
    _finish(library, result, out, json_output, table)


def kernels(
    ops: Annotated[str | None, typer.Option("--ops", help="Ops, comma-separated; default: all of them.")] = None,
    bits: Widths = "8,4,2",
    dtype: LayerDtype = None,
    device: common.Device = "auto",
    backends: Backends = None,
    seconds: Seconds = 20.0,
    out: common.Out = None,
    table: common.Table = None,
    overwrite: common.Overwrite = False,
    json_output: common.Json = False,
) -> None:
    widths = common.choices("--bits", bits, (8, 4, 2))
    library, place, dtype = _prepared("kernels", dtype, device, backends, seconds, out, overwrite, table)
    names = None if ops is None else [name.strip() for name in ops.split(",")]
    if unknown := [name for name in names or () if name not in library.OPS]:
        raise common.WrongUsage(f"--ops must be of {', '.join(library.OPS)}, got {unknown[0]!r}")
    result = library.run(
        ops=names,
        bits=widths,
        dtype=dtype,
        device=place,
        backends=None if backends is None else backends.split(","),
        seconds=seconds,
        out=out,
    )
    _finish(library, result, out, json_output, table)


def generate(
    preset_or_path: Annotated[
        str | None, typer.Argument(help="Shape, or folder of a float model.", metavar="MODEL", show_default=False)
    ] = None,
    sweep: Annotated[str, typer.Option("--sweep", help="headline, layers or memory.")] = "headline",
    bits: Widths = "8,4,2",
    embedding_bits: Annotated[
        int | None, typer.Option("--embedding_bits", help="2, 4, 8 or 16; default: the weights' own.")
    ] = None,
    batch_size: Annotated[str | None, typer.Option("--batch_size", help="Texts at once, comma-separated.")] = None,
    num_beams: Annotated[str | None, typer.Option("--num_beams", help="1 is greedy; comma-separated.")] = None,
    source_tokens: Annotated[
        str | None, typer.Option("--source_tokens", help="Length of each source, comma-separated.")
    ] = None,
    new_tokens: Annotated[
        str | None, typer.Option("--new_tokens", help="Tokens each text gets, exactly; comma-separated.")
    ] = None,
    layers: Annotated[
        str | None, typer.Option("--layers", help="Encoder-decoder, comma-separated: 6-6,6-3; of a shape.")
    ] = None,
    candidates: Annotated[
        str | None,
        typer.Option(
            "--candidates",
            help="Of torch, plain, ours, static, compile, ctranslate2, onnxruntime, torchao, bitsandbytes, dynamic, "
            "comma-separated; default: all, but compile on a GPU only.",
        ),
    ] = None,
    dtype: LayerDtype = None,
    device: common.Device = "auto",
    backend: Annotated[str, typer.Option("--backend", help="Of ours: auto, or the kernels to force.")] = "auto",
    attention: Annotated[
        str, typer.Option("--attention", help="Of ours: int8, which our own loop needs, float or auto.")
    ] = "int8",
    process_memory: Annotated[
        bool, typer.Option("--process_memory", help="Also a process of its own for each, and what it takes in all.")
    ] = False,
    seconds: Annotated[
        float, typer.Option("--seconds", help="For all of it; the first cell is always measured.")
    ] = 300.0,
    out: common.Out = None,
    table: common.Table = None,
    plot: Annotated[str | None, typer.Option("--plot", help="File for the picture (PNG).")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the record in --out.")] = False,
    overwrite: common.Overwrite = False,
    json_output: common.Json = False,
) -> None:
    widths = common.choices("--bits", bits, (8, 4, 2))
    axes = {"batch_size": batch_size, "num_beams": num_beams, "source_tokens": source_tokens, "new_tokens": new_tokens}
    given = {
        name: None if text is None else [common.numbers(f"--{name}", part, "x", 1)[0] for part in text.split(",")]
        for name, text in axes.items()
    }
    _check_seconds(seconds)
    if embedding_bits not in (None, 2, 4, 8, 16):
        raise common.WrongUsage(f"--embedding_bits must be 2, 4, 8 or 16, got {embedding_bits}")
    if attention not in ("auto", "int8", "float"):
        raise common.WrongUsage(f"--attention must be auto, int8 or float, got {attention!r}")
    if resume and (out is None or (overwrite and table is None and plot is None)):
        raise common.WrongUsage(
            "--resume goes on with the record in --out: --overwrite with it is for --table and --plot alone"
        )
    common.check_record(out, resume, overwrite)
    common.check_table(table, overwrite)
    common.check_new_file("--plot", plot, overwrite)
    from dqkernels import text
    from dqkernels.bench import generate as library

    common.quiet_transformers()
    # The library refuses what it cannot measure with a ValueError, before it measures.
    with _model_by_its_name(), common.checking_input():
        place = str(text.check_device(device))
        dtype = None if dtype in (None, "auto") else text.check_dtype(dtype)
        _check_backends(None if backend == "auto" else backend, "--backend")
        result = library.run(
            preset_or_path,
            sweep,
            widths,
            embedding_bits=embedding_bits,
            **given,
            layers=None if layers is None else [part.strip() for part in layers.split(",")],
            candidates=None if candidates is None else [part.strip() for part in candidates.split(",")],
            dtype=dtype,
            device=place,
            backend=backend,
            attention=attention,
            process_memory=process_memory,
            seconds=seconds,
            out=out,
            resume=resume,
        )
    _finish(library, result, out, json_output, table)
    if plot is not None and not any(row["status"] == "timed" for row in result["rows"]):
        common.say("nothing timed, no picture")
    elif plot is not None:
        library.write_plot(result, plot)
        common.say(f"wrote {plot}")


def cpu(
    shape: Annotated[str, typer.Option("--shape", help="tiny, bart-base or bart-large.")] = "bart-base",
    parts: Annotated[
        str | None,
        typer.Option("--parts", help="Of gemv, step, threads, memory, gemm, generate, comma-separated; default: all."),
    ] = None,
    bits: Widths = "8,4,2",
    seconds: Annotated[float, typer.Option("--seconds", help="For all of it, shared among the parts.")] = 600.0,
    out: common.Out = None,
    table: common.Table = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the record in --out.")] = False,
    overwrite: common.Overwrite = False,
    json_output: common.Json = False,
) -> None:
    widths = common.choices("--bits", bits, (8, 4, 2))
    _check_seconds(seconds)
    if resume and (out is None or (overwrite and table is None)):
        raise common.WrongUsage("--resume goes on with the record in --out: --overwrite with it is for --table alone")
    common.check_record(out, resume, overwrite)
    common.check_table(table, overwrite)
    from dqkernels.bench import cpu as library

    common.quiet_transformers()
    with common.checking_input():  # the library refuses what it cannot measure before it measures
        result = library.run(
            shape,
            None if parts is None else [part.strip() for part in parts.split(",")],
            widths,
            seconds=seconds,
            out=out,
            resume=resume,
        )
    _finish(library, result, out, json_output, table)


def size(
    shape: Annotated[str, typer.Option("--shape", help="tiny, bart-base, bart-large or mbart-large.")] = "bart-base",
    layers: Annotated[
        str | None, typer.Option("--layers", help="Of the student, encoder-decoder; default: the teacher's.")
    ] = None,
    bits: Annotated[
        str, typer.Option("--bits", help="Weights-embeddings, comma-separated: each of 2, 4, 8.")
    ] = "8-8,4-4,2-2",
    out: common.Out = None,
    table: common.Table = None,
    overwrite: common.Overwrite = False,
    json_output: common.Json = False,
) -> None:
    pairs = [common.numbers("--bits", part, "-", 2) for part in bits.split(",")]
    if bad := [part for part in pairs if any(width not in (2, 4, 8) for width in part)]:
        raise common.WrongUsage(f"--bits must be pairs of 2, 4 or 8 such as 4-8, got {bad[0][0]}-{bad[0][1]}")
    common.check_new_file("--out", out, overwrite)
    common.check_table(table, overwrite)
    from dqkernels.bench import size as library

    if shape not in library.SHAPES:
        raise common.WrongUsage(f"--shape must be one of {', '.join(library.SHAPES)}, got {shape!r}")
    teacher = library.SHAPES[shape]
    depth = (teacher.encoder, teacher.decoder) if layers is None else common.numbers("--layers", layers, "-", 2)
    if any(student > most for student, most in zip(depth, (teacher.encoder, teacher.decoder), strict=True)):
        raise common.WrongUsage(f"--layers must be at most the teacher's {teacher.layers}, got {layers}")
    common.quiet_transformers()
    result = library.run([library.Case(shape, *depth, *pair) for pair in pairs], teachers=[shape], out=out)
    _finish(library, result, out, json_output, table)


def _prepared(
    name: str,
    dtype: str | None,
    device: str,
    backends: str | None,
    seconds: float,
    out: str | None,
    overwrite: bool,
    table: str | None,
):
    """What the benchmarks of calls check alike; gives the library, the device and the dtype (None: its default)."""
    _check_seconds(seconds)
    common.check_new_file("--out", out, overwrite)
    common.check_table(table, overwrite)
    from dqkernels import text

    library = importlib.import_module(f"dqkernels.bench.{name}")
    with common.checking_input():
        place = text.check_device(device)
        dtype = None if dtype in (None, "auto") else text.check_dtype(dtype)
        _check_backends(backends)
    return library, place, dtype


def _finish(library, result: dict, out: str | None, json_output: bool, table: str | None) -> None:
    if json_output:
        common.print_json(result)
    else:
        common.console().print(library.render(result))
    common.wrote(result, out, table)


def _check_seconds(seconds: float) -> None:
    if not 0 < seconds < 86400:
        raise common.WrongUsage(f"--seconds must be above 0, got {seconds:g}")


@contextlib.contextmanager
def _model_by_its_name() -> Iterator[None]:
    """What the library says of its argument `preset_or_path` is said of MODEL, as the help spells it."""
    try:
        yield
    except common.WrongUsage as error:
        raise common.WrongUsage(str(error).replace("preset_or_path", "MODEL")) from error


def _check_backends(backends: str | None, flag: str = "--backends") -> None:
    from dqkernels.backends import NAMES

    for name in () if backends is None else backends.split(","):
        if name not in NAMES:
            raise common.WrongUsage(f"{flag} must be of {', '.join(NAMES)}, got {name!r}")
