"""What `bench cpu` times call by call: GEMVs against a loop that only reads, GEMMs against one that only multiplies,
steps, threads beside torch's.

Every candidate is proven first: ours bit-equal to the eager backend on the same codes, the loops by their sums.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dqkernels import decode, ops
from dqkernels.bench import generate_candidates, generate_cells, generate_lineup, protocol, record, size
from dqkernels.config import DQConfig
from dqkernels.decode import engine, native_step
from dqkernels.kernels import cpu_gemm, cpu_step, native
from dqkernels.models.native_parts import format_of, part_of
from dqkernels.nn import QLinear

CPU = torch.device("cpu")
#: Rows of the GEMMs.
TOKENS = (32, 256, 1024)
CACHES = ("cold", "warm")
#: The candidate that is the bound of a product of bytes.
MULTIPLY_LOOP = "multiply loop"
#: A sample of calls in one run of the core takes about so long.
_SAMPLE_S, _GUESS_BYTES_PER_S = 2e-3, 1e10
#: Samples of a candidate, and calls in a sample, at most.
MAX_ROUNDS, _MOST_CALLS = 100, 512
#: Tokens of the step part, and of its source.
_NEW, _SOURCE = 48, 256
#: A call of torch's that takes more than this part of a cell's seconds is not repeated.
_PATIENCE = 20


@dataclass(frozen=True)
class Work:
    """What a part is told.

    Attributes:
        shape: of the model whose layers these are.
        bits: weight widths of ours.
        seconds: for this part.
    """

    shape: size.Shape
    bits: tuple[int, ...]
    seconds: float

    def linears(self) -> list[tuple[int, int]]:
        """[out_features, in_features]: attention, both of the feed-forward, the head."""
        d, f = self.shape.d_model, self.shape.ffn
        return [(d, d), (f, d), (d, f), (self.shape.vocab, d)]


def packed(n: int, k: int, bits: int) -> QLinear:
    """A linear of random weights. Ternary (absmax above 2 bits) packs fastest; kernels do the same for any codes."""
    with torch.random.fork_rng():
        torch.manual_seed(bits)
        linear = nn.Linear(k, n)
    return QLinear.from_linear(linear, DQConfig(weight_bits=bits, weight_quantizer="ternary", attention="float"))


def eager(x: torch.Tensor, linear: QLinear) -> torch.Tensor:
    """What it has to give, bit by bit."""
    layer = linear.layer
    options = (layer.bits, layer.four_level, layer.group_size, linear.out_features, "per_token", None, None, "none")
    return ops.qlinear(x, *linear.packed(), linear.bias, None, *options, x.dtype, "eager", False)


def _samples(calls: float, run: Callable[[], object]) -> Callable[[], float]:
    def sample() -> float:
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) / calls

    return sample


def _short(value: float) -> float:
    return float(f"{value:.4g}")


# ---- GEMV ---------------------------------------------------------------------------------------------------


@torch.inference_mode()
def gemv(work: Work) -> list[dict]:
    """One token through each linear, many calls in one run of the core as in a decode step, against readers."""
    cells = [(n, k, bits) for bits in work.bits for n, k in work.linears()]
    rows: list[dict] = []
    for (n, k, bits), seconds in _shares(cells, work.seconds):
        if seconds is None:
            rows.append(_not_reached("gemv", 1, n, k, work, bits=bits))
            continue
        linear = packed(n, k, bits)
        for cache in CACHES:
            rows += _gemv_cell(linear, cache, seconds / len(CACHES))
    return rows


def _shares(cells: list, seconds: float) -> Iterator[tuple[Any, float | None]]:
    """Every cell with its share of what is left of `seconds`, None when nothing is; the first one has some."""
    until = time.perf_counter() + seconds
    for index, cell in enumerate(cells):
        left = until - time.perf_counter()
        yield cell, None if left <= 0 and index else max(left, 0.0) / (len(cells) - index)


def _not_reached(part: str, m: int, n: int, k: int, work: Work, **more) -> dict:
    row = {"part": part, "tokens": m, "out_features": n, "in_features": k, **more}
    return {**row, "status": "not run", "reason": f"the {work.seconds:.3g} s of this part were over"}


def _gemv_cell(linear: QLinear, cache: str, seconds: float) -> list[dict]:
    one_part, qweight = part_of(linear, None), linear.packed()[0]
    count = protocol.copies_for(qweight.nbytes, CPU) if cache == "cold" else 1
    copies = [qweight, *(qweight.clone() for _ in range(count - 1))]
    calls = max(count, min(_MOST_CALLS, int(_SAMPLE_S * _GUESS_BYTES_PER_S / qweight.nbytes) + 1))
    walk = [copies[i % count] for i in range(calls)]
    x = torch.randn(1, linear.in_features, generator=torch.Generator().manual_seed(1))
    tape, found = cpu_step.Tape(), []
    for one in walk:
        part = one_part._replace(qweight=one)
        found += cpu_gemm.gemm(x, [part], **format_of(linear), activation="none", out_dtype=x.dtype, into=tape)
    addresses, threads = [one.data_ptr() for one in walk], torch.get_num_threads()
    words = [one.view(-1).view(torch.int64) if one.nbytes % 8 == 0 else one for one in walk]
    read = native.require("read_bytes").read_bytes
    wanted = eager(x, linear)
    tape.run()
    wrong = sum(not torch.equal(y, wanted) for y in found)
    summed = read(addresses[:1], qweight.nbytes, threads), int(words[0].sum()) % 2**64
    rows = {}
    bits = linear.layer.bits
    for name, reason in (
        (f"dqkernels W{bits}", f"{wrong} of {len(found)} calls differ from eager" if wrong else None),
        ("read loop", None if summed[0] == summed[1] else "its sum is not torch's"),
        ("torch sum", None),
    ):
        rows[name] = {
            "part": "gemv",
            "candidate": name,
            "bits": bits,
            "tokens": 1,
            "out_features": linear.out_features,
            "in_features": linear.in_features,
            "cache": cache,
            "weights_bytes": qweight.nbytes,
            "copies": count,
            "status": "refused" if reason else "timed",
            "reason": reason,
        }
    samplers = {
        f"dqkernels W{bits}": _samples(calls, tape.run),
        "read loop": _samples(calls, lambda: read(addresses, qweight.nbytes, threads)),
        "torch sum": _samples(calls, lambda: [one.sum() for one in words]),
    }
    _fill(rows, samplers, seconds, qweight.nbytes)
    rates = {name: row["gb_per_s"] for name, row in rows.items() if row.get("gb_per_s")}
    readers = {name: rate for name, rate in rates.items() if not name.startswith("dqkernels")}
    if readers:
        fastest = max(readers, key=readers.__getitem__)
        for name, row in rows.items():
            if name in rates:
                row["reader"] = fastest
                row["read_fraction"] = _short(rates[name] / readers[fastest])
    return list(rows.values())


def _fill(rows: dict[str, dict], samplers: dict[str, Callable[[], float]], seconds: float, moved: int = 0) -> None:
    """Times those that are to be timed, by turns, and writes the figures into their rows."""
    alive = {name: sample for name, sample in samplers.items() if rows[name]["status"] == "timed"}
    found = protocol.interleave(alive, seconds=seconds, max_rounds=MAX_ROUNDS, patience=1.0)
    for name, reason in found.skipped.items():
        rows[name].update(status="too slow", reason=reason)
    for name, stats in found.stats.items():
        rows[name].update(stats.row("us"))
        if moved:
            rows[name]["gb_per_s"] = _short(moved / stats.median / 1e9)


# ---- GEMM ---------------------------------------------------------------------------------------------------


@torch.inference_mode()
def gemm(work: Work) -> list[dict]:
    """Int8 rows through the linears of a layer, against torch's int8 and fp32 products of the same sizes, and against
    the instruction set's byte products in registers."""
    cells = [(m, n, k) for n, k in work.linears()[:3] for m in TOKENS]
    rows: list[dict] = []
    for (m, n, k), seconds in _shares(cells, work.seconds):
        if seconds is None:
            rows.append(_not_reached("gemm", m, n, k, work))
        else:
            rows += _gemm_cell(m, n, k, work.bits, seconds)
    return rows


def _gemm_cell(m: int, n: int, k: int, bits: tuple[int, ...], seconds: float) -> list[dict]:
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(2))
    q, act_scale, _ = ops.quantize_activation(x, "per_token", backend="eager")
    rows: dict[str, dict] = {}
    samplers: dict[str, Callable[[], float]] = {}

    def add(name: str, run: Callable[[], object], reason: str | None, width: int) -> None:
        sizes = {"tokens": m, "out_features": n, "in_features": k}
        status = "refused" if reason else "timed"
        rows[name] = {"part": "gemm", "candidate": name, "bits": width, **sizes, "status": status, "reason": reason}
        samplers[name] = _samples(1, run)

    for width in bits:
        linear = packed(n, k, width)
        part = part_of(linear, None)
        options = {**format_of(linear), "activation": "none", "out_dtype": x.dtype, "act_scale": act_scale}

        def ours(part=part, options=options):
            return cpu_gemm.gemm(q, [part], **options)[0]

        same = torch.equal(ours(), eager(x, linear))
        add(f"dqkernels W{width}", ours, None if same else "differs from eager", width)
    weight = torch.randint(-127, 128, (k, n), dtype=torch.int8, generator=torch.Generator().manual_seed(3))
    exact = (q.double() @ weight.double()).int()
    start = time.perf_counter()
    try:
        reason = None if torch.equal(torch._int_mm(q, weight), exact) else "is not the exact product"
    except RuntimeError as error:
        reason = record.scrub(str(error).splitlines()[0])
    took = time.perf_counter() - start
    add("torch._int_mm", lambda: torch._int_mm(q, weight), reason, 8)
    if reason is None and took > seconds / _PATIENCE:  # as without VNNI: one call has to do
        words = f"one call takes {took:.2g} s: timed once, by its proof"
        rows["torch._int_mm"].update(status="too slow", reason=words, median_us=_short(took * 1e6), samples=1)
    floats = weight.t().contiguous().float()
    add("torch fp32", lambda: F.linear(x, floats), None, 32)
    _add_multiply_loop(add, rows, samplers, m * n * k)
    _fill(rows, samplers, seconds)
    loop = rows[MULTIPLY_LOOP].get("median_us")
    for row in rows.values():
        # Of what multiplies bytes; torch's fp32 product multiplies something else.
        mine = row.get("median_us") if row["bits"] <= 8 else None
        row["multiply_fraction"] = _short(loop / mine) if loop and mine else None
    base = {
        name: rows[name].get("median_us") for name in ("torch._int_mm", "torch fp32", "dqkernels W8") if name in rows
    }
    for row in rows.values():
        for name, key in (
            ("torch._int_mm", "int_mm_ratio"),
            ("torch fp32", "fp32_ratio"),
            ("dqkernels W8", "w8_ratio"),
        ):
            both = base.get(name), row.get("median_us")
            row[key] = _short(both[0] / both[1]) if all(both) else None
    return list(rows.values())


def _add_multiply_loop(add, rows: dict[str, dict], samplers: dict[str, Callable[[], float]], products: int) -> None:
    """The core's loop that multiplies as many pairs of bytes in registers and does nothing else, on as many threads."""
    core, threads = native.native(), torch.get_num_threads()
    instruction = core.multiply_instruction() if hasattr(core, "multiply_instruction") else None
    if instruction is None:
        older = "the compiled core is older than this benchmark: build it again"
        add(MULTIPLY_LOOP, lambda: None, None, 8)
        reason = f"no loop for {core.cpu_isa()}" if hasattr(core, "multiply_instruction") else older
        rows[MULTIPLY_LOOP].update(status="not supported", reason=reason, instruction=None)
        return
    # Blocks are whole, so that a small product is less than what is multiplied; every product is a 1.
    done = core.multiply_bytes(products, threads)
    right = products <= done == core.multiply_bytes(products, 1)
    wrong = None if right else f"its sum is {done}, of {products} products of one"
    add(MULTIPLY_LOOP, lambda: None, wrong, 8)
    rows[MULTIPLY_LOOP]["instruction"] = instruction
    samplers[MULTIPLY_LOOP] = _samples(done / products, lambda: core.multiply_bytes(products, threads))


# ---- between the runs of a step -----------------------------------------------------------------------------


def step(work: Work) -> list[dict]:
    """What passes between two native calls of a decode step, greedy and with beams: all that Python and torch do."""
    source = generate_cells.source(work.shape.name)
    cells = [(1, 1), (8, 1), (1, 4)]
    bits = 4 if 4 in work.bits else work.bits[0]
    lineup = generate_lineup.Lineup(
        generate_lineup.Options(source, (bits,), None, torch.float32, CPU, "auto", "int8", ("ours",)), source.layers
    )
    one = generate_candidates.packed("step", lineup.float32, bits, bits, torch.float32, CPU, "auto", "int8")
    ours = generate_candidates.engine_of(one)
    model = ours.model
    tokens = min(_SOURCE, (source.positions or _SOURCE) // 2)
    new = min(_NEW, (source.positions or _NEW) // 2)
    words = decode.describe(model)
    rows = []
    for batch, beams in cells:
        inputs = lineup.inputs(generate_cells.Cell(source.layers, batch, beams, tokens, new))
        row = {"part": "step", "candidate": f"dqkernels W{bits}", "bits": bits, "batch_size": batch, "num_beams": beams}
        row |= {"source_tokens": tokens, "new_tokens": new, "kernel": words}
        call = ours.bind(inputs, new, beams)
        with decode.plain(model):
            wanted = ours.tokens(call())
        reason = None if torch.equal(ours.tokens(call()), wanted) else "tokens are not those of plain(model)"
        if not reason and native_step.why_not(model.model.decoder, beams > 1) is not None:
            reason = engine.state_of(model).last or words
        rows.append({**row, "status": "refused" if reason else "timed", "reason": reason and record.scrub(reason)})
        if not reason:
            rows[-1] |= _between(call, work.seconds / len(cells))
    decode.free(model)
    return rows


def _between(call: Callable[[], object], seconds: float) -> dict:
    """Microseconds from the end of a run of the tape to the start of the next, and those of the runs."""
    gaps, runs, until = [], [], time.perf_counter() + seconds
    while not gaps or time.perf_counter() < until:
        with _watched() as spans:
            call()
        runs += [end - start for start, end in spans]
        gaps += [after[0] - before[1] for before, after in zip(spans, spans[1:], strict=False)]
    return {**protocol.Stats.of(gaps).row("us"), "native_us": _short(protocol.Stats.of(runs).median * 1e6)}


@contextlib.contextmanager
def _watched() -> Iterator[list[tuple[float, float]]]:
    """When each run of a tape began and ended, in seconds."""
    spans, run = [], cpu_step.Tape.run

    def watched(self, *args, **options):
        start = time.perf_counter()
        run(self, *args, **options)
        spans.append((start, time.perf_counter()))

    cpu_step.Tape.run = watched
    try:
        yield spans
    finally:
        cpu_step.Tape.run = run


# ---- beside torch's threads ---------------------------------------------------------------------------------


@torch.inference_mode()
def threads(work: Work) -> list[dict]:
    """One call, alone and right behind a parallel op of torch, whose threads then still spin."""
    n, k = work.linears()[-1]
    rows = []
    for m in (1, 64):
        bits = 4 if 4 in work.bits else work.bits[0]
        linear = packed(n, k, bits)
        x = torch.randn(m, k, generator=torch.Generator().manual_seed(4))
        tape = cpu_step.Tape()
        (y,) = cpu_gemm.gemm(
            x, [part_of(linear, None)], **format_of(linear), activation="none", out_dtype=x.dtype, into=tape
        )
        tape.run()
        reason = None if torch.equal(y, eager(x, linear)) else "differs from eager"
        row = {"part": "threads", "bits": bits, "tokens": m, "out_features": n, "in_features": k}
        row |= {"status": "refused" if reason else "timed", "reason": reason}
        names = ("alone", "behind torch")
        found = {name: {**row, "candidate": f"dqkernels W{bits} {name}"} for name in names}
        other = torch.randn(256, 256)

        def behind(tape=tape, other=other) -> float:
            for _ in range(3):
                torch.mm(other, other)
            start = time.perf_counter()
            tape.run()
            return time.perf_counter() - start

        _fill(found, {"alone": _samples(1, tape.run), "behind torch": behind}, work.seconds / 2)
        both = [found[name].get("median_us") for name in names]
        found["behind torch"]["alone_ratio"] = _short(both[0] / both[1]) if all(both) else None
        rows += found.values()
    return rows
