"""`bench gemm`: the GEMM of a decoding step, ours against cuBLAS and the int8 peers, in one run. Proven before timed.

Every candidate starts from float activations and ends with float outputs, bias added: quantizing is inside the timed
call of ours and of every int8 peer. Cells stand in order of worth, so that a short run has the rows that goals are
about.
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from dqkernels import ops
from dqkernels.bench import floors, gemm_goals, linear, peers, protocol, record
from dqkernels.bench import rows as shared
from dqkernels.bench.candidates import Contest, format_words, short
from dqkernels.config import DQConfig
from dqkernels.kernels import skinny
from dqkernels.nn import QLinear

#: (out_features, in_features) in order of worth: one large, the layers of BART-large and -base (square, fc1, fc2, the
#: decoder's QKV in one), another large, the tied heads, and what others publish.
GPU_SIZES = (
    (8192, 8192),
    (1024, 1024),
    (4096, 1024),
    (1024, 4096),
    (3072, 1024),
    (768, 768),
    (2304, 768),
    (3072, 768),
    (768, 3072),
    (22016, 4096),
    (50265, 768),
    (50265, 1024),
    (4096, 4096),
    (4096, 11008),
)
GPU_TOKENS = (1, 4, 8, 16, 32, 64)
CPU_SIZES = ((768, 768),)
CPU_TOKENS = (1, 16)
GROUP_SIZES = (-1, 128)
#: The rounds of a cell, each one replay of a graph per candidate. A cell ends with them, and may take so many seconds:
#: BART's layers at 2 bits need a thousand copies to leave the cache, and a replay walks through all of them.
ROUNDS = 200
_CELL_S = {"cuda": 10.0, "cpu": 0.0}
#: Of a large matrix the CPU recomputes these many columns; the device's own reference has them all.
_CPU_COLUMNS = 1024
_FLOOR_RULE = "max(bytes / bandwidth, 2 M N K / peak); bytes: packed weights, int8 input, 16-bit output, scales"


@dataclass(frozen=True)
class Cell:
    """One GEMM: x [tokens, in_features] . W [out_features, in_features]^T, weights with one kind of scales."""

    tokens: int
    n: int
    k: int
    group_size: int = -1

    def __str__(self) -> str:
        return f"{self.tokens}x{self.n}x{self.k}" + ("" if self.group_size == -1 else f" g{self.group_size}")


def plan(
    device: torch.device,
    shapes: Iterable[Sequence[int]] | None = None,
    tokens: Sequence[int] | None = None,
    bits: Sequence[int] = (8, 4, 2),
    group_sizes: Sequence[int] | None = None,
) -> list[Cell]:
    """The cells in order of worth: those with a goal, then the goals' numbers of tokens, then the rest, then groups.

    Raises:
        ValueError: for sizes below 1, or a width or group size that the packed format does not have.
    """
    gpu = device.type == "cuda"
    sizes = [tuple(int(v) for v in shape) for shape in shapes or (GPU_SIZES if gpu else CPU_SIZES)]
    if any(len(size) != 2 or min(size) < 1 for size in sizes):
        raise ValueError(f"shapes must be (out_features, in_features) pairs above 0, got {sizes}")
    rows = [int(m) for m in tokens or (GPU_TOKENS if gpu else CPU_TOKENS)]
    if min(rows) < 1:
        raise ValueError(f"tokens must be numbers above 0, got {rows}")
    groups = list(group_sizes or (GROUP_SIZES if gpu else (-1,)))
    if not set(groups) <= {-1, 32, 64, 128}:
        raise ValueError(f"group_sizes must be of -1, 32, 64 and 128, got {groups}")
    if not set(bits) <= {8, 4, 2}:
        raise ValueError(f"bits must be of 8, 4 and 2, got {list(bits)}")
    if set(bits) <= {8} and bits:
        groups = [group for group in groups if group == -1]
        if not groups:
            raise ValueError(f"group_sizes are for 2 and 4 bits, got {list(group_sizes or ())} and bits={list(bits)}")

    def worth(cell: Cell) -> tuple:
        goal = gemm_goals.concerns(cell.tokens, cell.n, cell.k)
        level = 0 if goal else 1 if cell.tokens in gemm_goals.TOKENS else 2
        return cell.group_size != -1, level, sizes.index((cell.n, cell.k)), rows.index(cell.tokens)

    found = dict.fromkeys(Cell(m, *size, group) for group in groups for size in sizes for m in rows)
    return sorted(found, key=lambda cell: (groups.index(cell.group_size) if cell.group_size != -1 else 0, worth(cell)))


class Decode(Contest):
    """One layer at 16 bits and everything here that can compute it, plain torch in fp16 first (on a CPU: in x's dtype).

    Attributes:
        group_size: of the packed weights.
    """

    def __init__(self, cell: Cell, dtype: torch.dtype, device: torch.device, bits, names, others, tune: bool):
        super().__init__(_random_linear(cell.n, cell.k, dtype, device))
        self.group_size = cell.group_size
        for kind in _float_types(device, dtype):
            one = self.linear if kind == dtype else copy.deepcopy(self.linear).to(kind)
            self._add_float(one, bind=_float_call)
        for width in bits:
            if (width, self.group_size != -1) != (8, True):
                self._add_width(width, dtype, device, names, others, tune)
        if self.group_size == -1:
            self._add_int_mm()

    def _add_width(self, bits: int, dtype: torch.dtype, device: torch.device, names, others, tune: bool) -> None:
        config = DQConfig(weight_bits=bits, weight_quantizer="ternary", group_size=self.group_size)
        # On the device: a proof compares with the reference on these very codes, wherever they come from.
        packed = QLinear.from_linear(self.linear, config.for_linear("linear"))
        count = len(self.found)
        self._add_backends(packed, names, cpu_columns=_CPU_COLUMNS, bind=_our_call)
        for one in self.found[count:]:
            if one.backend == "cuda" and skinny.can_overlap(torch.cuda.get_device_capability(device)):
                self._add(replace(one, name=f"{one.name} overlapped", bind=_overlapped_call))
        for name in others:
            try:
                self._add(peers.gemm(name, packed, tune))
            except peers.NotCompared as reason:
                self.absent[f"{name} {format_words(bits, self.group_size)}"] = str(reason)


def _random_linear(n: int, k: int, dtype: torch.dtype, device: torch.device) -> nn.Linear:
    """Normal weights, drawn where they are used: a CPU needs seconds for the large ones."""
    generator = torch.Generator(device).manual_seed(0)
    layer = nn.Linear(k, n, device=device, dtype=dtype).requires_grad_(False)
    layer.weight.copy_(torch.randn(n, k, generator=generator, device=device) * k**-0.5)
    layer.bias.copy_(torch.randn(n, generator=generator, device=device) * 0.1)
    return layer


def _float_types(device: torch.device, dtype: torch.dtype) -> list[torch.dtype]:
    """Of the float candidates: both 16-bit ones of cuBLAS and x's own. Ratios are to the first, fp16 on a GPU."""
    floats = [torch.float16, torch.bfloat16] if device.type == "cuda" else []
    return list(dict.fromkeys([*floats, dtype]))


def _float_call(module: nn.Linear, x: torch.Tensor) -> protocol.CALL:
    return functools.partial(F.linear, x.to(module.weight.dtype), module.weight, module.bias)


def _our_call(module: QLinear, x: torch.Tensor) -> protocol.CALL:
    """The op itself, without the module around it: that is what a host time is asked of."""
    weights = (module.qweight, module.weight_scale, module.group_mult, module.bias, None)
    layer = module.layer
    format_ = (layer.bits, layer.four_level, layer.group_size, module.out_features)
    options = ("per_token", None, None, "none", x.dtype, module.backend)
    return functools.partial(ops.qlinear, x, *weights, *format_, *options)


def _overlapped_call(module: QLinear, x: torch.Tensor) -> protocol.CALL:
    """The op as a decoding engine calls it, which knows that nobody packs weights meanwhile."""
    call = _our_call(module, x)

    def overlapped() -> torch.Tensor:
        with skinny.settled_weights():
            return call()

    return overlapped


def run(
    shapes: Iterable[Sequence[int]] | None = None,
    tokens: Sequence[int] | None = None,
    bits: Sequence[int] = (8, 4, 2),
    group_sizes: Sequence[int] | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    backends: Sequence[str] | None = None,
    seconds: float = 60,
    out: str | None = None,
    probe: bool = True,
    tune_peers: bool = False,
) -> dict:
    """Times the cells and gives the record.

    Args:
        shapes: (out_features, in_features) pairs; default BART's layers and some large ones.
        tokens: rows of x; default 1, 4, 8, 16, 32, 64.
        bits: weight widths.
        group_sizes: of -1 (one scale per channel), 32, 64, 128; default -1 and 128 on a GPU, -1 on a CPU.
        dtype: of activations; default float16 on a GPU, float32 on a CPU.
        device: default the GPU if there is one.
        backends: names to time; default the device's own, the slow `eager` only where nothing else runs.
        seconds: for all of it, building and proving included; cells that it does not reach say so. What a peer takes
            to compile itself comes on top.
        out: file for the record, or None.
        probe: on a CPU, measure the copy bandwidth for memory floors (0.3 s).
        tune_peers: let BitBLAS search its schedules: minutes a shape.

    Raises:
        ValueError: for a size, width, group size, dtype or name that is none.
    """
    device = protocol.pick_device(device)
    cells = plan(device, shapes, tokens, bits, group_sizes)
    kind = shared.dtypes(dtype, [torch.float16 if device.type == "cuda" else torch.float32])[0]
    names, absent = shared.backends(backends, device)
    if backends is None:
        names, absent = None, {}  # a layer takes the device's own, and says of each width what is not there
    others = []
    for peer in peers.of("gemm"):
        reason = peers.missing(peer, device.type)
        absent.update({} if reason is None else {peer.name: reason})
        others += [peer.name] if reason is None else []
    peak = shared.peak(device, probe)
    before = protocol.state(device)
    rows: list[dict] = []

    def made() -> dict:
        """The record of the cells so far."""
        described = protocol.describe(device, seconds, ROUNDS, before)
        described["floor"] = shared.floor_words(peak, _FLOOR_RULE)
        described["proof"] = "ours bit-equal to the reference; float and int8 peers within a relative error of float64"
        described["goals"] = gemm_goals.judged(rows if device.type == "cuda" else ())
        return record.new(
            "gemm",
            settings={
                "cells": [str(cell) for cell in cells],
                "bits": list(bits),
                "dtype": short(kind),
                "device": device.type,
                "backends": "the fast ones available" if names is None else names,
                "act_granularity": "per_token",
                "bias": True,
                "quantizing_the_input": "inside the timed region",
                "tune_peers": tune_peers,
            },
            protocol=described,
            rows=rows,
        )

    layer, key, deadline = None, None, time.perf_counter() + seconds
    with torch.inference_mode(), shared.on(device):
        for index, cell in enumerate(shared.progress("bench gemm", cells, str)):
            left = deadline - time.perf_counter()
            if left <= 0:
                rows.append({**_identity(cell, kind), "status": "not reached", "reason": f"{seconds:g} s were over"})
                continue
            if key != (cell.n, cell.k, cell.group_size):
                layer = None  # before the next one is made: both may not fit
                layer = Decode(cell, kind, device, bits, names, others, tune_peers)
                key = (cell.n, cell.k, cell.group_size)
            share = min(left, max(left / (len(cells) - index), _CELL_S[device.type]))
            rows += measure(cell, layer, share, peak, absent)
            if out is not None:  # after each cell: a peer may compile for longer than anybody waits
                record.write(made(), out)
    result = made()
    if out is not None:
        record.write(result, out)
    return result


def measure(
    cell: Cell, layer: Contest, seconds: float, peak: floors.Device | None, absent: dict[str, str] | None = None
) -> list[dict]:
    """All rows of one cell: those of `linear.measure`, and one for each candidate that is not here."""
    identity = _identity(cell, layer.key[1])
    rows = [{**row, **identity} for row in linear.measure(cell.tokens, layer, seconds, peak, ROUNDS)]
    for name, reason in {**layer.absent, **(absent or {})}.items():
        rows.append({**identity, "candidate": name, **shared.verdict(reason, "not compared")})
    return rows


def _identity(cell: Cell, kind: torch.dtype) -> dict:
    shape = {"tokens": cell.tokens, "out_features": cell.n, "in_features": cell.k}
    scales = "per_channel" if cell.group_size == -1 else f"group_size={cell.group_size}"
    return {**shape, "dtype": short(kind), "weight_scales": scales}


# -------------------------------------------------------------------------------------------- table


def render(result: dict):
    """Two rich tables of a gemm record: the rows by cell, and the goals."""
    from rich import box
    from rich.console import Group
    from rich.table import Table

    described, floor = result["protocol"], result["protocol"]["floor"]
    heads, keys, outside_words = shared.outside_column(result["rows"])
    columns = ("cold us", "p10-p90", "floor us", "share", "warm us", "share", "x", *heads)
    title = f"Decode GEMM, x {result['settings']['dtype']}, on {protocol.machine_words(result['environment'])}"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0, title=title)  # the box parts the columns
    for name in ("MxNxK", *columns):
        table.add_column(name.replace(" ", "\n"), justify="left" if name == "MxNxK" else "right", no_wrap=True)
    for label, found in _by_cell(result["rows"]).items():
        table.add_row(label)
        for index, (name, lines) in enumerate(found.items()):
            cells = _cells(lines[0], lines[-1], keys)
            table.add_row(f" {_name(name)}", *cells, end_section=index == len(found) - 1)
    device = floor["device"]
    words = [
        "Median microseconds a call, quantizing included; x: torch's own over it, cold.",
        f"cold: weights out of memory; warm: left in the {described['cache_bytes'] / 2**20:.0f} MiB cache.",
        "floor unknown for this device."
        if device is None
        else f"floor: bytes over bandwidth or operations over peak, the {device}'s ({floor['source']}).",
        "share: of the floor in the time; a cache can beat the floor of memory.",
        *outside_words,
        *([warning] if (warning := protocol.busy_words(described)) is not None else []),
        *_ungraphed(result["rows"]),
        *_short(result["rows"]),
        *shared.notes(result["rows"], _label),
    ]
    table.caption, table.caption_justify = "\n".join(words), "left"
    return Group(table, "", _goals(described["goals"], result["settings"]["device"]))


def _goals(lines: Sequence[dict], device: str):
    """The goals' own table."""
    from rich import box
    from rich.table import Table

    words = "" if device == "cuda" else " (GPU: not run)"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), title=f"Goals{words}")
    for name in ("goal", "wanted", "found", "verdict", "where"):
        table.add_column(name, justify="right" if name in ("wanted", "found") else "left", no_wrap=name != "where")
    for line in lines:
        unit = "x" if "wanted_ratio" in line else " us"
        wanted, found = (line.get(f"{word}_ratio", line.get(f"{word}_us")) for word in ("wanted", "found"))
        sign = ">=" if line["least"] else "<="
        figure = "" if found is None else f"{found:.2f}{unit}"
        table.add_row(line["goal"], f"{sign} {wanted:g}{unit}", figure, line["verdict"], line["where"] or "")
    return table


def _by_cell(lines: Iterable[dict]) -> dict[str, dict[str, list[dict]]]:
    """Rows by cell and candidate: two (cold, warm) of what is here, one of what is not."""
    found: dict[str, dict[str, list[dict]]] = {}
    for line in lines:
        if "candidate" in line:
            found.setdefault(_label(line), {}).setdefault(line["candidate"], []).append(line)
    return found


def _cells(cold: dict, warm: dict, outside: Sequence[str]) -> list[str]:
    """A row's cells: the times in a graph, and those of the keys `outside` it."""
    if cold["status"] != "timed":
        return ["", cold["status"]]
    spread = "-".join(shared.microseconds(cold[name]) for name in ("p10_us", "p90_us"))
    floor = "unknown" if cold["floor_us"] is None else f"{cold['floor_us']:.3g}"
    shares = shared.percent(cold), shared.percent(warm)
    times = [shared.cell(cold), spread, floor, shares[0], shared.cell(warm), shares[1]]
    return [*times, shared.ratio(cold), *(shared.microseconds(warm.get(key)) for key in outside)]


def _name(candidate: str) -> str:
    """`W4A8 cuda` of ours."""
    words = candidate.removeprefix("dqkernels ")
    head, _, tail = words.partition(" ")
    return f"{head}A8 {tail}" if words != candidate and tail else words


def _ungraphed(lines: Iterable[dict]) -> list[str]:
    """A line about what could not be captured in a CUDA graph: its times hold launches that the others' do not."""
    names = dict.fromkeys(line["candidate"] for line in lines if "cannot be captured" in (line.get("timer") or ""))
    return [f"not in a graph, so not to be compared: {', '.join(names)}"] if names else []


def _short(lines: Iterable[dict]) -> list[str]:
    """A line about cells whose time was over before they had their samples."""
    few = dict.fromkeys(_label(line) for line in lines if line.get("samples", ROUNDS) < ROUNDS)
    return [f"fewer than {ROUNDS} samples: {', '.join(few)}"] if few else []


def _label(line: dict) -> str:
    if "tokens" not in line:
        return ""
    group = line["weight_scales"].removeprefix("group_size=")
    words = f"{line['tokens']}x{line['out_features']}x{line['in_features']}"
    return words if group == "per_channel" else f"{words} g{group}"
