"""`dqkernels tune`: which tile and which plan is fastest on this GPU, measured offline for kernels/measured.py.

A cell is one format (bits, group_size) at one M x N x K. A Triton cell's candidates are the tiles of
`tiles.candidates`, each with the K splits that M allows; tune_cuda.py has those of the CUDA kernels. The rule's own
choice is always among them. Every candidate first has to give the rule's bits, then the best few of a quick look take
turns, weights cold (race.py). The file is written after every cell: a run that was interrupted goes on where it
stopped.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from dqkernels import backends, packing, text
from dqkernels.bench import protocol, race, record, tune_cuda
from dqkernels.bench.size import SHAPES
from dqkernels.kernels import measured, plans, skinny, tiles

#: BART-base and BART-large: attention projections and the feed-forward pair; (out_features, in_features).
SIZES = ((768, 768), (3072, 768), (768, 3072), (1024, 1024), (4096, 1024), (1024, 4096))
TOKENS = (1, 4, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
#: Whose kernels can be measured. A size's tiles come before its plans, which are then compared with them.
KERNELS = ("triton", "cuda")

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
    sizes: Iterable[Sequence[int]],
    tokens: Iterable[int],
    bits: Iterable[int],
    group_sizes: Iterable[int],
    kernels: Collection[str] = ("triton",),
) -> list[Cell | tune_cuda.PlanCell]:
    """Every combination that a kernel has, one cell per entry of the table.

    Raises:
        ValueError: for sizes below 1, or where no kernel has any of the formats, or the CUDA ones none of the tokens.
    """
    sizes, tokens, bits, group_sizes = list(sizes), list(tokens), list(bits), list(group_sizes)
    if any(len(size) != 2 or min(size) < 1 for size in sizes) or any(m < 1 for m in tokens):
        raise ValueError(
            f"sizes must be (out_features, in_features) pairs and tokens numbers above 0, got {sizes}, {tokens}"
        )
    found: dict[tuple, Cell | tune_cuda.PlanCell] = {}
    for size, width, group in itertools.product(sizes, bits, group_sizes):
        if (width, group != -1) not in tiles.FORMATS:
            continue
        here = [Cell(width, group, m, *size) for m in tokens] if "triton" in kernels else []
        here += tune_cuda.cells([size], tokens, [width], [group]) if "cuda" in kernels else []
        for cell in here:
            found.setdefault(_key(cell), cell)
    if not found and any((width, group != -1) in tiles.FORMATS for width in bits for group in group_sizes):
        raise ValueError(f"the CUDA plans are for at most {plans.ROWS[-1]} tokens, got {tokens}")
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


def usable_kernels(device: str | torch.device, asked: Sequence[str] | None = None) -> tuple[str, ...]:
    """Those of `asked` (default: of `KERNELS`) that can be measured on a device, in the order of `KERNELS`.

    Raises:
        TuneError: if there is none, or one that was asked for by name is not there; with the reason.
    """
    reasons = {}
    for name in KERNELS if asked is None else asked:
        usable, why = backends.available(name, "cuda")
        if torch.device(device).type != "cuda":
            usable, why = False, f"device is {device}" if usable else why
        if not usable:
            reasons[name] = why
    found = tuple(name for name in KERNELS if name not in reasons and (asked is None or name in asked))
    if found and (asked is None or not reasons):
        return found
    which = f"{' and '.join(reasons)} cannot" if found else "none can"
    why = "; ".join(dict.fromkeys(reasons.values()))
    raise TuneError(f"tune measures kernels on a CUDA GPU, and {which} be used here: {why}")


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
        TuneError: without a GPU that runs these kernels, or while another process measures on this machine.
        ValueError: if `out` holds something else, or what it holds was measured on another GPU, with another Triton or
            with other CUDA kernels.
    """
    device, kinds = torch.device(device), {_kernel_of(cell) for cell in wanted}
    usable_kernels(device, [name for name in KERNELS if name in kinds])
    against_triton = "cuda" in kinds and backends.available("triton", "cuda")[0]
    gpu = torch.cuda.get_device_name(device)
    out = measured.user_file(gpu) if out is None else Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    before = protocol.state(device)
    with _alone(measured.user_file(gpu)), torch.cuda.device(device), torch.inference_mode():
        rows = _kept(out, gpu, kinds if fresh else ())
        todo = [cell for cell in wanted if _key(cell) not in rows]
        done = len(wanted) - len(todo)
        found = _record(rows, device, before, seconds)
        for cell in todo:
            if progress is not None:
                progress(done, len(wanted), str(cell))
            if isinstance(cell, Cell):
                row = measure(cell, device, seconds)
            else:
                row = tune_cuda.measure(cell, device, seconds, _tile_of(cell, rows), against_triton)
            rows[_key(cell)] = row
            found = _record(rows, device, before, seconds)
            record.write(found, out)
            done += 1
        if progress is not None:
            progress(done, len(wanted), "")
    _refresh()
    return found


def _refresh() -> None:
    """What was chosen by the table of before is chosen again."""
    measured.refresh()
    skinny.refresh()
    backends.refresh()
    if backends.available("triton", "cuda")[0]:
        from dqkernels.kernels import gemm  # imports Triton

        gemm.refresh()


def measure(cell: Cell, device: torch.device, seconds: float) -> dict:
    """The row of one cell: the fastest choice that gives the rule's bits, and the rule's own time beside it."""
    from dqkernels.kernels import gemm

    arch = tiles.family(device)
    rule = tiles.choose(cell.m, cell.n, cell.k, cell.bits, cell.group_size, arch, tiles.multiprocessors(device))
    arguments, copies = _operands(cell, device)

    def call(choice: Choice, **form):
        return gemm.qgemm(**form, tile=choice[0], split_k=choice[1])

    # The table serves every epilogue.
    forms = [arguments, *_other_epilogues(arguments, cell)]
    found = race.run(
        choices(cell, rule, arch), rule, call, forms, copies, describe=describe, device=device, seconds=seconds
    )
    tile, split = found.best
    return {"kernel": "triton", **cell._asdict(), **tile._asdict(), "split_k": split, **found.row(rule)}


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


def _kernel_of(cell: Cell | tune_cuda.PlanCell) -> str:
    return "triton" if isinstance(cell, Cell) else "cuda"


def _key(cell: Cell | tune_cuda.PlanCell) -> tuple:
    if isinstance(cell, tune_cuda.PlanCell):
        return tune_cuda.key(cell)
    return (cell.bits, cell.group_size, *measured.bucket(cell.m, cell.n, cell.k))


def _cell(row: dict) -> Cell | tune_cuda.PlanCell:
    kind = tune_cuda.PlanCell if row.get("kernel") == "cuda" else Cell
    return kind(*(row[name] for name in kind._fields))


def _tile_of(cell: tune_cuda.PlanCell, rows: dict) -> Choice | None:
    """The tile that this file has for Triton's GEMM of the same sizes."""
    row = rows.get(_key(Cell(cell.bits, cell.group_size, cell.m, cell.n, cell.k)))
    return None if row is None else (tiles.Config(*(row[name] for name in tiles.Config._fields)), row["split_k"])


def _record(rows: dict, device: torch.device, before: dict, seconds: float) -> dict:
    properties = torch.cuda.get_device_properties(device)
    with_plans = any(row.get("kernel") == "cuda" for row in rows.values())
    return record.new(
        measured.KIND,
        settings={
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "cuda_kernels": measured.cuda_kernels() if with_plans else None,
            "gain_ratio": race.GAIN,
            "out_dtype": "bf16",
            "bias": True,
        },
        protocol={
            **protocol.describe(device, seconds, race.MAX_ROUNDS, before),
            "proof": "bit-equal to the rule's tile or plan",
            "quantizing_the_input": "outside, but for the CUDA kernels' float rows",
            "counters_of_splits": "zeroed by a launch of their own, as in any captured graph",
        },
        rows=list(rows.values()),
    )


def _kept(out: Path, gpu: str, forgotten: Collection[str]) -> dict[tuple, dict]:
    """Rows of an earlier run that still hold, but for those of the `forgotten` kernels."""
    if not out.exists() or set(forgotten) == set(KERNELS):
        return {}
    try:
        table, old = measured.read(out), record.read(out)
    except ValueError:
        if forgotten:
            return {}
        raise
    rows = [row for row in old["rows"] if row.get("kernel", "triton") not in forgotten]
    plans_ = [row for row in rows if row.get("kernel") == "cuda"]
    was, this = [table.gpu], [gpu]
    if len(plans_) < len(rows) or any(row["triton_us"] is not None for row in plans_):
        was.append(f"Triton {table.triton}")
        this.append(f"Triton {record.environment()['triton']}")
    if plans_:
        was.append(f"the CUDA kernels of {table.cuda}")
        this.append(f"the CUDA kernels of {measured.cuda_kernels()}")
    if rows and was != this:
        raise ValueError(
            f"out {out.name!r} was measured on {' with '.join(was)}, this is {' with '.join(this)}: "
            "give another file, or fresh to measure all of it again"
        )
    return {_key(_cell(row)): row for row in rows}


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
    """Tiles and plans that gave other bits than the rule's, with their sizes: a bug of a kernel or of the compiler."""
    return [f"{_cell(row)} with {', '.join(row['mismatched'])}" for row in result["rows"] if row["mismatched"]]


def render(result: dict):
    """Rich tables of a record, of tiles and of plans: what was taken and what it gains over the rule."""
    from rich import box
    from rich.console import Group
    from rich.table import Table

    machine = protocol.machine_words(result["environment"])
    found = [row for row in result["rows"] if row.get("kernel") == "cuda"]
    parts = ["", tune_cuda.render(found, f"CUDA plans on {machine}")] if found else []
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=f"GEMM tiles on {machine}")
    for name, justify in (
        ("MxNxK", "left"),
        ("W", "right"),
        ("group", "right"),
        ("tile", "left"),
        ("us", "right"),
        ("x", "right"),
    ):
        table.add_column(name, justify=justify, no_wrap=True)
    for row in (row for row in result["rows"] if row.get("kernel") != "cuda"):
        choice = (tiles.Config(*(row[name] for name in tiles.Config._fields)), row["split_k"])
        table.add_row(
            f"{row['m']}x{row['n']}x{row['k']}",
            str(row["bits"]),
            "" if row["group_size"] == -1 else str(row["group_size"]),
            describe(choice) + (" (rule)" if row["is_rule"] else ""),
            f"{row['median_us']:.1f}",
            f"{row['rule_us'] / row['median_us']:.2f}",
        )
    table.caption, table.caption_justify = "wN: warps, sN: stages, /N: splits of K.", "left"
    words = ["Median microseconds, weights cold; x: the rule's time over it."]
    warning = protocol.busy_words(result["protocol"])
    return Group(*([table] if table.row_count else []), *parts, "", "\n".join(words + ([warning] if warning else [])))
