"""`dqkernels tune`: which tile is fastest on this GPU, measured offline, kept in a file that kernels/measured.py reads.

A cell is one format (bits, group_size) at one M x N x K. Its candidates are the tiles of `tiles.candidates`, each with
the K splits that M allows; the rule's own choice is always among them. Every candidate first has to give the rule's
bits, then the best few of a quick look take turns, weights cold. The file is written after every cell: a run that was
interrupted goes on where it stopped.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from dqkernels import backends, packing, text
from dqkernels.bench import protocol, record
from dqkernels.bench.size import SHAPES
from dqkernels.kernels import measured, tiles

#: BART-base and BART-large: attention projections and the feed-forward pair; (out_features, in_features).
SIZES = ((768, 768), (3072, 768), (768, 3072), (1024, 1024), (4096, 1024), (1024, 4096))
TOKENS = (1, 32, 64, 128, 256, 512, 1024, 2048, 4096)
_FINALISTS = 6
_MAX_ROUNDS = 60
#: A tile replaces the rule's only where it is faster by more than the noise of a median.
_GAIN = 1.02

Choice = tuple[tiles.Config, int]


class Cell(NamedTuple):
    """One entry of the table to be measured."""

    bits: int
    group_size: int
    m: int
    n: int
    k: int

    def __str__(self) -> str:
        group = "" if self.group_size == -1 else f" g{self.group_size}"
        return f"W{self.bits}{group} {self.m}x{self.n}x{self.k}"


class TuneError(RuntimeError):
    """Nothing can be measured here, or somebody else is measuring; the message says what and what to do."""


def cells(
    sizes: Iterable[Sequence[int]], tokens: Iterable[int], bits: Iterable[int], group_sizes: Iterable[int]
) -> list[Cell]:
    """Every combination that a kernel has, one cell per entry of the table.

    Raises:
        ValueError: for sizes below 1, or where no kernel has any of the formats.
    """
    sizes, tokens, bits, group_sizes = list(sizes), list(tokens), list(bits), list(group_sizes)
    if any(len(size) != 2 or min(size) < 1 for size in sizes) or any(m < 1 for m in tokens):
        raise ValueError(
            f"sizes must be (out_features, in_features) pairs and tokens numbers above 0, got {sizes}, {tokens}"
        )
    found: dict[tuple, Cell] = {}
    for (n, k), width, group, m in itertools.product(sizes, bits, group_sizes, tokens):
        if (width, group != -1) in tiles.FORMATS:
            found.setdefault((width, group, *measured.bucket(m, n, k)), Cell(width, group, m, n, k))
    if not found:
        raise ValueError(f"no kernel has bits={bits} with group_size={group_sizes}: groups are for 2 and 4 bits")
    return list(found.values())


def model_sizes(name: str) -> list[tuple[int, int]]:
    """(out_features, in_features) of a model's linear layers, each once; only its config is read.

    Args:
        name: a shape (`bart-base`), a folder or a hub id, float or packed.

    Raises:
        ValueError: where there is no such model.
    """
    with torch.device("meta"):
        if name in SHAPES:
            model = SHAPES[name].model_class()(SHAPES[name].hf_config())
        else:
            model = text.empty_model(name)
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    return list(dict.fromkeys((linear.out_features, linear.in_features) for linear in linears))


def check_device(device: str | torch.device) -> torch.device:
    """The device, if Triton kernels can be measured on it.

    Raises:
        TuneError: if not, with the reason.
    """
    device = torch.device(device)
    usable, reason = backends.available("triton", "cuda")
    if device.type != "cuda" or not usable:
        why = f"device is {device}" if usable else reason
        raise TuneError(f"tune measures Triton kernels on a CUDA GPU, and none can be used here: {why}")
    return device


def default_file(device: str | torch.device) -> Path:
    """Where the table of a GPU is written, and found."""
    return measured.user_file(torch.cuda.get_device_name(device))


def run(
    wanted: Sequence[Cell],
    *,
    device: str | torch.device = "cuda",
    out: str | os.PathLike[str] | None = None,
    seconds: float = 1.0,
    fresh: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict:
    """Measures the cells and gives the record, which `out` holds after every one of them.

    Args:
        wanted: what `cells` gave.
        device: the GPU.
        out: the file; default the one that dqkernels looks for on this machine (`measured.user_file`).
        seconds: of timing per cell; compiling its candidates the first time takes longer.
        fresh: forget what `out` holds; otherwise cells that stand there are kept.
        progress: called with (cells done, cells, what comes next).

    Raises:
        TuneError: without a GPU that runs Triton kernels, or while another process measures on this machine.
        ValueError: if `out` holds something else, or was measured on another GPU or with another Triton.
    """
    device = check_device(device)
    from dqkernels.kernels import gemm  # imports Triton

    gpu = torch.cuda.get_device_name(device)
    out = measured.user_file(gpu) if out is None else Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    before = protocol.state(device)
    with _alone(measured.user_file(gpu)), torch.cuda.device(device), torch.inference_mode():
        rows = {} if fresh else _kept(out, gpu)
        todo = [cell for cell in wanted if _key(cell) not in rows]
        done = len(wanted) - len(todo)
        found = _record(rows, device, before, seconds)
        for cell in todo:
            if progress is not None:
                progress(done, len(wanted), str(cell))
            rows[_key(cell)] = measure(cell, device, seconds)
            found = _record(rows, device, before, seconds)
            record.write(found, out)
            done += 1
        if progress is not None:
            progress(done, len(wanted), "")
    gemm.refresh()
    return found


def measure(cell: Cell, device: torch.device, seconds: float) -> dict:
    """The row of one cell: the fastest choice that gives the rule's bits, and the rule's own time beside it."""
    from dqkernels.kernels import gemm

    rule = tiles.choose(
        cell.m, cell.n, cell.k, cell.bits, cell.group_size, tiles.family(device), tiles.multiprocessors(device)
    )
    arguments, copies = _operands(cell, device)
    wanted = gemm.qgemm(**arguments, tile=rule[0], split_k=rule[1])
    samplers, refused, mismatched = {}, {}, []
    for choice in choices(cell, rule, tiles.family(device)):
        call = functools.partial(gemm.qgemm, tile=choice[0], split_k=choice[1])
        try:
            if not torch.equal(call(**arguments), wanted):
                mismatched.append(describe(choice))
                continue
            calls = [functools.partial(call, **{**arguments, "qweight": copy}) for copy in copies]
            samplers[choice] = protocol.sampler(calls, device, weight_bytes=copies[0].numel()).sample
        except Exception as error:  # noqa: BLE001 - a tile that does not fit this GPU is refused, the others go on
            if choice == rule:
                raise
            refused[choice] = f"{type(error).__name__}: {error}"
    # One look at each, then the best few by turns.
    quick = protocol.interleave(samplers, seconds=seconds / 3, max_rounds=5, patience=float("inf"))
    order = sorted(quick.stats, key=lambda choice: quick.stats[choice].median)
    finalists = dict.fromkeys([rule, *order[:_FINALISTS]])
    # The table serves every epilogue: what is not timed must at least fit this GPU and be right.
    for other in _other_epilogues(arguments, cell):
        wanted = gemm.qgemm(**other, tile=rule[0], split_k=rule[1])
        for choice in [choice for choice in finalists if choice != rule]:
            try:
                if not torch.equal(gemm.qgemm(**other, tile=choice[0], split_k=choice[1]), wanted):
                    mismatched.append(describe(choice))
                    del finalists[choice]
            except Exception as error:  # noqa: BLE001 - as above
                refused[choice] = f"{type(error).__name__}: {error}"
                del finalists[choice]
    final = protocol.interleave(
        {choice: samplers[choice] for choice in finalists},
        seconds=seconds,
        max_rounds=_MAX_ROUNDS,
        patience=float("inf"),
    )
    times = {choice: final.stats[choice].median for choice in finalists}
    best = decide(times, rule)
    tile, split = best
    return {
        **cell._asdict(),
        **tile._asdict(),
        "split_k": split,
        **final.stats[best].row("us"),
        "rule_us": final.stats[rule].row("us")["median_us"],
        "is_rule": best == rule,
        "candidates": len(samplers),
        "mismatched": sorted(set(mismatched)),
        "refused": sorted({record.scrub(reason.splitlines()[0]) for reason in refused.values()}),
    }


def choices(cell: Cell, rule: Choice, arch: str) -> Iterator[Choice]:
    """The rule's choice first, then every other tile and number of splits that M and K have room for."""
    yield rule
    for tile in tiles.candidates(arch, cell.bits, cell.group_size):
        if tile.block_m > 16 and tile.block_m >= 4 * cell.m:
            continue  # three quarters of its rows would be padding
        for split in tiles.SPLITS if cell.m <= tiles.SPLIT_M else (1,):
            if split <= -(-cell.k // tile.block_k) and (tile, split) != rule:
                yield tile, split


def describe(choice: Choice) -> str:
    """`64x128x128 w4 s3 /2`: the tile, its warps and stages, and the splits of K where there are any."""
    tile, split = choice
    words = f"{tile.block_m}x{tile.block_n}x{tile.block_k} w{tile.num_warps} s{tile.num_stages}"
    return words + (f" /{split}" if split > 1 else "")


def decide(times: dict[Choice, float], rule: Choice) -> Choice:
    """The fastest, or the rule's own where that is not slower by more than `_GAIN`."""
    best = min(times, key=times.__getitem__)
    return best if times[rule] > _GAIN * times[best] else rule


def _operands(cell: Cell, device: torch.device) -> tuple[dict, list[torch.Tensor]]:
    """Arguments of `gemm.qgemm` with random codes, and copies of the packed weight for a cold rotation."""
    g = torch.Generator().manual_seed(0)
    shape = packing.packed_shape(cell.n, cell.k, cell.bits)
    qweight = torch.randint(0, 256, shape, dtype=torch.uint8, generator=g).to(device)
    groups = None
    if cell.group_size != -1:
        groups = torch.randint(1, 4, (cell.n, -(-cell.k // cell.group_size)), dtype=torch.uint8, generator=g).to(device)
    arguments = {
        "xq": torch.randint(-127, 128, (cell.m, cell.k), dtype=torch.int8, generator=g).to(device),
        "act_scale": torch.rand(cell.m, generator=g).to(device),
        "row_sum": None,
        "qweight": qweight,
        "weight_scale": torch.rand(cell.n, generator=g).to(device),
        "bits": cell.bits,
        "four_level": False,
        "out_features": cell.n,
        "bias": torch.rand(cell.n, generator=g).to(device, torch.bfloat16),
        "out_dtype": torch.bfloat16,
        "group_mult": groups,
        "group_size": cell.group_size,
    }
    return arguments, [qweight, *(qweight.clone() for _ in range(protocol.copies_for(qweight.numel(), device) - 1))]


def _other_epilogues(arguments: dict, cell: Cell) -> Iterator[dict]:
    """The heaviest of the other ones: fp32 with a residual, and four_level with its row sums at 2 bits."""
    device = arguments["xq"].device
    residual = torch.ones(cell.m, cell.n, device=device)
    full = {**arguments, "out_dtype": torch.float32, "bias": arguments["bias"].float(), "residual": residual}
    yield full
    if cell.bits == 2:
        yield {**full, "four_level": True, "row_sum": arguments["xq"].sum(dim=1, dtype=torch.int32)}


def _key(cell: Cell) -> measured.Key:
    return (cell.bits, cell.group_size, *measured.bucket(cell.m, cell.n, cell.k))


def _record(rows: dict, device: torch.device, before: dict, seconds: float) -> dict:
    properties = torch.cuda.get_device_properties(device)
    return record.new(
        measured.KIND,
        settings={
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "gain_ratio": _GAIN,
            "out_dtype": "bf16",
            "bias": True,
        },
        protocol={
            **protocol.describe(device, seconds, _MAX_ROUNDS, before),
            "proof": "bit-equal to the rule's tile",
            "quantizing_the_input": "outside: the tile has no part in it",
        },
        rows=list(rows.values()),
    )


def _kept(out: Path, gpu: str) -> dict[measured.Key, dict]:
    """Rows of an earlier run that still hold."""
    if not out.exists():
        return {}
    table, old = measured.read(out), record.read(out)
    triton = record.environment()["triton"]
    if (table.gpu, table.triton) != (gpu, triton):
        raise ValueError(
            f"out {out.name!r} was measured on {table.gpu} with Triton {table.triton}, this is {gpu} with {triton}: "
            "give another file, or fresh to measure all of it again"
        )
    return {_key(Cell(*(row[name] for name in Cell._fields))): row for row in old["rows"]}


class _alone:
    """Holds a lock beside `path`: two runs on one machine would measure each other. Freed when the process ends."""

    def __init__(self, path: Path) -> None:
        from filelock import FileLock

        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(path.with_suffix(".lock"))

    def __enter__(self) -> None:
        from filelock import Timeout

        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise TuneError(
                "another dqkernels tune is measuring on this GPU: wait for it, two at once measure each other"
            ) from None

    def __exit__(self, *_) -> None:
        self._lock.release()


# -------------------------------------------------------------------------------------------- table


def mismatches(result: dict) -> list[str]:
    """Tiles that gave other bits than the rule's, with their sizes: a bug of a kernel or of the compiler."""
    return [
        f"{Cell(*(row[name] for name in Cell._fields))} with {', '.join(row['mismatched'])}"
        for row in result["rows"]
        if row["mismatched"]
    ]


def render(result: dict):
    """A rich table of a record: one line per cell, the tile taken and what it gains over the rule."""
    from rich import box
    from rich.table import Table

    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, title=f"GEMM tiles on {protocol.machine_words(result['environment'])}"
    )
    for name, justify in (
        ("MxNxK", "left"),
        ("W", "right"),
        ("group", "right"),
        ("tile", "left"),
        ("us", "right"),
        ("x", "right"),
    ):
        table.add_column(name, justify=justify, no_wrap=True)
    for row in result["rows"]:
        choice = (tiles.Config(*(row[name] for name in tiles.Config._fields)), row["split_k"])
        table.add_row(
            f"{row['m']}x{row['n']}x{row['k']}",
            str(row["bits"]),
            "" if row["group_size"] == -1 else str(row["group_size"]),
            describe(choice) + (" (rule)" if row["is_rule"] else ""),
            f"{row['median_us']:.1f}",
            f"{row['rule_us'] / row['median_us']:.2f}",
        )
    words = [
        "Median microseconds, weights cold; x: the rule's time over it.",
        "wN: warps, sN: stages, /N: splits of K.",
    ]
    warning = protocol.busy_words(result["protocol"])
    table.caption, table.caption_justify = "\n".join(words + ([warning] if warning else [])), "left"
    return table
