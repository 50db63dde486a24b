"""`bench cpu`: what the goals of the CPU are about, in one run: GEMV, GEMM, steps, threads, memory, whole models.

Parts stand in order; each is proven before it is timed and its candidates take turns. The record is written after every
part, and a run that was stopped goes on from it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from dqkernels.bench import cpu_goals, cpu_memory, cpu_parts, generate, generate_cells, protocol, record, size
from dqkernels.bench.cpu_view import render
from dqkernels.kernels import native

__all__ = ["PARTS", "SHAPES", "render", "run"]


def _generate(work: cpu_parts.Work) -> list[dict]:
    """Whole models, by `bench generate` itself."""
    made = generate.run(work.shape.name, bits=work.bits, candidates=CANDIDATES, device="cpu", seconds=work.seconds)
    return [{"part": "generate", **row} for row in made["rows"]]


#: Who generates: those that the goals name, and torch's dynamic int8.
CANDIDATES = ("torch", "ours", "ctranslate2", "dynamic")
#: Parts in order, what each measures, and its share of the seconds.
PARTS: dict[str, tuple[str, Callable[[cpu_parts.Work], list[dict]], float]] = {
    "gemv": ("one token through a linear, against a loop that only reads", cpu_parts.gemv, 0.15),
    "step": ("what Python and torch do between two native decode steps", cpu_parts.step, 0.05),
    "threads": ("a call alone, and right behind a parallel op of torch", cpu_parts.threads, 0.02),
    "memory": ("growth of a fresh process that loads a file and generates", cpu_memory.memory_of_processes, 0.08),
    "gemm": ("many tokens, against torch's products and a loop that only multiplies", cpu_parts.gemm, 0.15),
    "generate": ("encoder and decoding, by bench generate", _generate, 0.55),
}
SHAPES = ("tiny", "bart-base", "bart-large")
#: What has to agree before rows of two runs may stand in one record.
_SAME_MACHINE = ("cpu_model", "threads", "torch", "transformers", "source_sha256")


def run(
    shape: str = "bart-base",
    parts: Sequence[str] | None = None,
    bits: Sequence[int] = (8, 4, 2),
    *,
    seconds: float = 600,
    out: str | None = None,
    resume: bool = False,
) -> dict:
    """Measures the parts and gives the record, the goals among its rows.

    Args:
        shape: whose layers, and what random model; one of `SHAPES`.
        parts: of `PARTS`; default all of them.
        bits: weight widths of ours.
        seconds: for all of it. A part, or a cell of one, that is not reached says so; a first one is always run.
        out: file for the record, written after every part, or None.
        resume: go on with the record in `out`, if it is there: parts that are done stay.

    Raises:
        ValueError: for a name or a width that is none, and for a record in `out` of another machine or setting.
        RuntimeError: where the compiled core is absent.
    """
    names = list(PARTS) if parts is None else list(parts)
    if bad := [name for name in names if name not in PARTS]:
        raise ValueError(f"parts must be of {', '.join(PARTS)}, got {bad[0]!r}")
    if shape not in SHAPES:
        raise ValueError(f"shape must be one of {', '.join(SHAPES)}, got {shape!r}")
    if not bits or not set(bits) <= {8, 4, 2}:
        raise ValueError(f"bits must be of 8, 4 and 2, got {list(bits)}")
    core = native.require("read_bytes")
    device = torch.device("cpu")
    described = protocol.describe(device, seconds, cpu_parts.MAX_ROUNDS, protocol.state(device))
    described["isa"], described["gemm_kernel"] = core.cpu_isa(), core.cpu_gemm_kernel()
    described["thread_source"] = core.cpu_threads()
    described["reader"] = "the faster of a loop in the core and torch's sum of 64-bit words, over the same bytes"
    described["multiply_loop"] = (
        "byte products of the instruction set in registers, as many as the GEMM has, on as many threads, in turn; "
        "multiply_fraction is its time over the candidate's. 8 bits multiply 16-bit words without VNNI: half at most"
    )
    described["proof"] = (
        "ours bit-equal to the eager backend; readers by their sums; tokens those of transformers' loop, of a fresh "
        "process those of this one; whole models as bench generate"
    )
    settings = {"shape": shape, "bits": list(bits), "parts": names, "candidates": list(CANDIDATES), "device": "cpu"}
    made = record.new("cpu", settings=settings, protocol=described, rows=[])
    done = _earlier(made, out) if resume and out is not None else {}
    settings["parts"] = [name for name in PARTS if name in names or name in done]
    todo = [name for name in PARTS if name in names and name not in done]
    start, left = time.perf_counter(), sum(PARTS[name][2] for name in todo)
    for name in todo:
        _, measure, share = PARTS[name]
        remaining = seconds - (time.perf_counter() - start)
        if remaining <= 0 and name != todo[0]:
            break
        print(f"bench cpu: {name}", file=sys.stderr, flush=True)
        # What one part leaves over is the next ones'.
        done[name] = measure(cpu_parts.Work(size.SHAPES[shape], tuple(bits), max(remaining, 0.0) * share / left))
        left -= share
        _write(made, done, names, generate_cells.NOT_YET, out)
    described["after"] = protocol.state(device)
    _write(made, done, names, f"{seconds:g} s were over", out)
    return made


def _write(made: dict, done: dict[str, list[dict]], names: list[str], reason: str, out: str | None) -> None:
    """reason: why parts of `names` are not done."""
    rows = [row for name in PARTS for row in done.get(name, ())]
    missed = [
        {"part": name, "status": "not run", "reason": reason} for name in PARTS if name in names and name not in done
    ]
    goals = [{"part": "goal", "status": "goal", **line} for line in cpu_goals.judged(rows)]
    made["rows"] = [*rows, *missed, *goals]
    if out is not None:
        record.write(made, out)


def _earlier(made: dict, out: str) -> dict[str, list[dict]]:
    """Whole parts of the record in `out`, if there is one, of this very machine, code and settings: their rows."""
    if not Path(out).exists():
        return {}
    old = record.read(out)
    if old["kind"] != "cpu":
        raise ValueError(f"resume is for a record of bench cpu, {Path(out).name} is of kind {old['kind']!r}")
    pairs = [("environment", key) for key in _SAME_MACHINE] + [("settings", key) for key in ("shape", "bits")]
    for group, key in pairs:
        was, now = old[group].get(key), made[group][key]
        if was != now:
            words = f"resume needs the same {key} as in {Path(out).name}: {was!r} there, {now!r} now"
            raise ValueError(f"{words}; another record can hold it")
    found: dict[str, list[dict]] = {}
    for row in old["rows"]:
        if row["part"] in PARTS:
            found.setdefault(row["part"], []).append(row)
    return {name: rows for name, rows in found.items() if all(row["status"] != "not run" for row in rows)}
