"""`bench generate`: tokens by whole models: ours, Hugging Face's loop, torch's int8, bitsandbytes and CTranslate2.

Every candidate generates the same number of new tokens from the same sources; each is proven before it is timed, and
they take turns. Cells of work stand in order of worth; the record is written after each of them, and a run that was
stopped goes on from it.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dqkernels.bench import generate_candidates as ours
from dqkernels.bench import generate_cells as cells_
from dqkernels.bench import generate_process, memory, protocol, record
from dqkernels.bench import generate_proofs as proofs
from dqkernels.bench import rows as shared
from dqkernels.bench.candidates import short
from dqkernels.bench.generate_cells import Cell
from dqkernels.bench.generate_lineup import FAMILIES, Lineup, Options
from dqkernels.bench.generate_view import render, write_plot

__all__ = ["render", "run", "write_plot"]

#: The least seconds of timing that a cell gets while there is time: the first ones must not be thin.
_CELL_S = 20.0
#: A call that takes so many times what the float model's takes may be given up as too slow.
_SLOWER = 5.0
#: What has to agree before rows of two runs may stand in one record.
_SAME_MACHINE = ("gpu", "cpu_model", "threads", "torch", "triton", "transformers", "source_sha256")
_FREE_SETTINGS = ("sweep", "cells")


def run(
    preset_or_path: str | None = None,
    sweep: str = "headline",
    bits: Sequence[int] = (8, 4, 2),
    *,
    embedding_bits: int | None = None,
    batch_size: Sequence[int] | None = None,
    num_beams: Sequence[int] | None = None,
    source_tokens: Sequence[int] | None = None,
    new_tokens: Sequence[int] | None = None,
    layers: Sequence[str] | None = None,
    candidates: Sequence[str] | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    backend: str = "auto",
    attention: str = "int8",
    process_memory: bool = False,
    seconds: float = 300,
    out: str | None = None,
    resume: bool = False,
) -> dict:
    """Times the cells of a sweep and gives the record.

    Args:
        preset_or_path: a shape with random weights (`tiny`, `bart-base`, `bart-large`, `mbart-large`, `t5-base`;
            nothing is downloaded) or the folder of a float encoder-decoder; default bart-large on a GPU and in the
            sweep of memory, else bart-base.
        sweep: `headline`, `layers` or `memory`.
        bits: weight widths of ours.
        embedding_bits: of ours; default the weights' own.
        batch_size, num_beams, source_tokens, new_tokens, layers: values of an axis, in place of the sweep's.
        candidates: of `FAMILIES`; default all, but `compile` on a GPU only.
        dtype: of the float model that ratios are to, and of what stays float in ours; default float16 on a GPU, float32
            on a CPU.
        device: default the GPU if there is one.
        backend: of ours: the one to force, or `auto`.
        attention: of ours, as in `DQConfig`; our own loop needs int8.
        process_memory: also what a process of its own takes with each candidate, whose model is made anew there.
        seconds: for all of it, building and proving included; cells that it does not reach say so. The first cell is
            measured in any case.
        out: file for the record, written after every cell, or None.
        resume: go on with the record in `out`, if it is there.

    Raises:
        ValueError: for a name, a size or a dtype that is none, and for a record in `out` of another machine or setting.
    """
    device = protocol.pick_device(device)
    if bad := sorted(set(candidates or ()) - set(FAMILIES)):
        raise ValueError(f"candidates must be of {', '.join(FAMILIES)}, got {bad[0]!r}")
    if not set(bits) <= {8, 4, 2}:
        raise ValueError(f"bits must be of 8, 4 and 2, got {list(bits)}")
    kind = shared.dtypes(dtype, [torch.float16 if device.type == "cuda" else torch.float32])[0]
    found = cells_.source(preset_or_path or cells_.default_model(device, sweep))
    axes = {"batch_size": batch_size, "num_beams": num_beams, "source_tokens": source_tokens, "new_tokens": new_tokens}
    cells = cells_.plan(found, device, sweep, layers=layers, **axes)
    families = [name for name in FAMILIES if name in (candidates or FAMILIES)]
    if candidates is None and device.type != "cuda":
        families.remove("compile")
    before = protocol.state(device)
    described = protocol.describe(device, seconds, cells_.ROUNDS[sweep], before)
    described.update(_protocol_words(device))
    described["process"] = generate_process.HOW[device.type] if process_memory else None
    made = record.new(
        "generate",
        settings={
            "model": found.name,
            "weights": "random" if found.shape is not None else "from a folder",
            "sweep": sweep,
            "cells": [str(cell) for cell in cells],
            "bits": list(bits),
            "embedding_bits": embedding_bits,
            "candidates": families,
            "dtype": short(kind),
            "device": device.type,
            "backend": backend,
            "attention": attention,
            "process_memory": process_memory,
        },
        protocol=described,
        rows=[],
    )
    old = _earlier(made, out) if resume and out is not None else None
    options = Options(found, tuple(bits), embedding_bits, kind, device, backend, attention, tuple(families))
    book = Book(made, cells, *_rows_of(old), out)
    todo = book.todo()
    if old is not None:
        _go_on(described, old["protocol"], measures=bool(todo))
    _measure_all(book, todo, options, sweep, seconds, process_memory)
    if todo:
        described["after"] = protocol.state(device)
    book.write(over=True)
    return made


@dataclass
class Book:
    """The record while it grows.

    Attributes:
        made: the record.
        cells: of this run, in order.
        done: rows by cell: those of an earlier run first, of other cells too.
        absent: candidates that are not here, with the reason; of an earlier run first, too.
        out: its file, or None.
    """

    made: dict
    cells: list[Cell]
    done: dict[Cell, list[dict]]
    absent: dict[str, str]
    out: str | None

    def todo(self) -> list[Cell]:
        """The cells that are not done, or in part."""
        return [cell for cell in self.cells if not _complete(self.done.get(cell, ()))]

    def add(self, cell: Cell, rows: list[dict]) -> None:
        """What was measured of a cell now; of what was measured before, what that does not take the place of."""
        self.done[cell] = _merged(self.done.get(cell, ()), rows)

    def write(self, over: bool) -> None:
        """Rows in the order of the cells, then what was not reached, then who is not here; into the file, if any.

        over: whether the run is, so that what was not reached never will be.
        """
        order = [*self.cells, *(cell for cell in self.done if cell not in self.cells)]
        self.made["settings"]["cells"] = [str(cell) for cell in order]
        reached = [row for cell in order for row in self.done.get(cell, ())]
        reason = f"{self.made['protocol']['budget_s']:g} s were over" if over else cells_.NOT_YET
        missed = [{**cell.row(), **not_run(reason)} for cell in order if cell not in self.done]
        gone = [
            {"candidate": name, "status": "not compared", "reason": why}
            for name, why in self.absent.items()
            # Not who came since, and is in every cell.
            if any(name not in _names(rows) for rows in self.done.values())
        ]
        self.made["rows"] = [*reached, *missed, *gone]
        if self.out is not None:
            record.write(self.made, self.out)


def not_run(reason: str) -> dict:
    """The fields of a cell or candidate that time did not reach."""
    return {"status": "not run", "reason": reason}


def _measure_all(book: Book, todo: list[Cell], options: Options, sweep: str, seconds: float, process: bool) -> None:
    from tqdm import tqdm

    deadline = time.perf_counter() + seconds
    lineup = None
    with (
        shared.on(options.device),
        tqdm(total=len(todo), desc="bench generate", unit="cell", disable=None, leave=False, dynamic_ncols=True) as bar,
    ):
        for index, cell in enumerate(todo):
            left = deadline - time.perf_counter()
            if left <= 0 and index:
                break
            if lineup is None or lineup.layers != cell.layers:
                lineup = None  # before the next one is made: both may not fit
                lineup = Lineup(options, cell.layers)
            if not sys.stderr.isatty():  # no bar there, and a log of a long run should say where it is
                print(f"bench generate: {index + 1} of {len(todo)}: {cell}", file=sys.stderr, flush=True)
            work = Work(
                cell, lineup, deadline, seconds, len(todo) - index, cells_.ROUNDS[sweep],
                lambda words, cell=cell: bar.set_postfix_str(f"{cell}: {words}", refresh=True), process,
                must=index == 0,
            )  # fmt: skip
            book.add(cell, measure(work))
            book.absent.update(lineup.absent)
            book.write(over=False)
            bar.update()


def _complete(rows: Sequence[dict]) -> bool:
    return bool(rows) and all(row["status"] != "not run" for row in rows)


def _names(rows: Sequence[dict]) -> set[str]:
    return {row["candidate"] for row in rows}


def _merged(before: Sequence[dict], now: list[dict]) -> list[dict]:
    """Rows of two runs of one cell, by candidate. Time that ran out, or a machine that was short of memory, takes
    nothing back of what was timed; a proof that failed does."""
    rows = {row["candidate"]: row for row in before if row["status"] != "not run"}
    for row in now:
        old = rows.get(row["candidate"])
        timed = old is not None and old["status"] == "timed" and row["status"] not in ("timed", "refused")
        kept = timed or (old is not None and row["status"] == "not run")
        if not kept:
            rows[row["candidate"]] = row
    order = dict.fromkeys([row["candidate"] for row in now] + list(rows))
    return [rows[name] for name in order]


def _go_on(described: dict, old: dict, measures: bool) -> None:
    """Writes into the protocol what it is of both: seconds, the busier start's load, why either was throttled."""
    if not measures:
        described.update({name: old[name] for name in ("budget_s", "before", "after")})
        return
    described["budget_s"] += old["budget_s"]
    loads = [one["before"]["load_fraction"] for one in (described, old)]
    described["before"]["load_fraction"] = max((load for load in loads if load is not None), default=None)
    reasons = [one[when].get("throttle_reasons") for one in (described, old) for when in ("before", "after")]
    if any(one is not None for one in reasons):
        described["before"]["throttle_reasons"] = list(dict.fromkeys(r for one in reasons for r in one or ()))


def _earlier(made: dict, out: str) -> dict | None:
    """The record in `out`, if there is one, of this very machine, code and settings."""
    if not Path(out).exists():
        return None
    old = record.read(out)
    if old["kind"] != "generate":
        raise ValueError(f"resume is for a record of bench generate, {Path(out).name} is of kind {old['kind']!r}")
    for name, keys in (("environment", _SAME_MACHINE), ("settings", made["settings"])):
        for key in keys:
            was, now = old[name].get(key), made[name][key]
            if key not in _FREE_SETTINGS and was != now:
                words = f"resume needs the same {key} as in {Path(out).name}: {was!r} there, {now!r} now"
                raise ValueError(f"{words}; another record can hold it")
    return old


def _rows_of(old: dict | None) -> tuple[dict[Cell, list[dict]], dict[str, str]]:
    """Rows by cell of a record, and who is not here with the reason."""
    rows: dict[Cell, list[dict]] = {}
    absent: dict[str, str] = {}
    for row in () if old is None else old["rows"]:
        if "batch_size" in row and "candidate" in row:
            rows.setdefault(Cell.of(row), []).append(row)
        elif "candidate" in row:
            absent[row["candidate"]] = row["reason"]
    return rows, absent


def _protocol_words(device: torch.device) -> dict:
    """What differs from the protocol of single calls."""
    return {
        "timer": "perf_counter" + (", device synchronized" if device.type == "cuda" else ""),
        "warmup_rounds": 1,
        "cold": None,  # of single layers; generation finds its caches as it left them
        "warm": None,
        "host": None,
        "data": "random token ids, seeded, no padding; weights random unless they are a folder's",
        "latency": "wall time of a whole call over its new tokens, the encoder included",
        "first_token": "wall time of a call with one new token: the encoder and one step",
        "decode": "latency of the tokens behind the first",
        "search": "no forced tokens, no banned n-grams, length penalty 1, exactly the new tokens asked for",
        "proof": f"greedy logits of {proofs.ROWS} sources and {proofs.TOKENS} tokens within a relative error of the "
        "float32 model's, ours of the eager backend's on the same codes; the engine's search against the plain loop's",
        "weights": "bytes of the weights in memory, tied ones once (ctranslate2: of its file)",
        "cache": "keys, values and their scales at the end of a call; null where nobody says",
        "peak": f"the weights, and {memory.HOW[device.type]}; of the first call of the cell, its caches "
        "included (ctranslate2: null, its memory is its own and outlives a proof)",
    }


# --------------------------------------------------------------------------------------------- one cell


@dataclass
class Work:
    """A cell on its way.

    Attributes:
        cell, lineup: what and who.
        deadline: by `perf_counter`, after which no candidate is begun.
        seconds: of the whole run.
        cells_left: this one and those behind it.
        max_rounds: samples of a candidate at most.
        say: told what is being done.
        process: whether each candidate's work is also done in a process of its own, for its memory.
        must: the run's first cell, which ignores the deadline.
    """

    cell: Cell
    lineup: Lineup
    deadline: float
    seconds: float
    cells_left: int
    max_rounds: int
    say: Callable[[str], None]
    process: bool = False
    must: bool = False
    tokens: dict[str, torch.Tensor] = field(default_factory=dict)
    call_s: dict[str, float] = field(default_factory=dict)

    def timing_s(self) -> float:
        """Seconds of timing, now that everything is built: a fair share, and not thin where there is time."""
        left = max(1.0, self.deadline - time.perf_counter())  # what is built is timed, one round at least
        share = max(left / self.cells_left, min(left, _CELL_S))
        return max(share, self.seconds / 4) if self.must else share


def measure(work: Work) -> list[dict]:
    """All rows of one cell: proven, looked at for memory, then timed in turn."""
    cell, lineup = work.cell, work.lineup
    gc.collect()  # what earlier cells left would be taken for memory of this one
    inputs = lineup.inputs(cell)
    rows: dict[str, dict] = {}
    calls: dict[tuple[str, str], protocol.CALL] = {}
    used: list[ours.Candidate] = []
    try:
        for name, get in lineup.candidates():
            if rows and not work.must and time.perf_counter() > work.deadline:
                rows[name] = {**cell.row(), "candidate": name, **not_run("the time was over")}
                continue
            work.say(name)
            one = get()
            if one is None:
                continue
            used.append(one)
            row = rows[name] = {**cell.row(), **_identity(one)}
            row.update(_prepare(one, work, inputs))
            if row["status"] == "timed" and work.process:
                work.say(f"{name}, memory of a process")
                left = work.deadline - time.perf_counter()
                row.update(generate_process.of_candidate(lineup.options, name, one.family, cell, left))
            if row["status"] == "timed":
                calls[name, "all"] = one.bind(inputs, cell.new_tokens, cell.num_beams)
                if cell.new_tokens > 1:
                    calls[name, "first"] = one.bind(inputs, 1, cell.num_beams)
        work.say("timing")
        _time(rows, calls, work)
    finally:
        for one in used:
            one.reset()
        work.tokens.clear()
    return list(rows.values())


def _identity(one: ours.Candidate) -> dict:
    """What a row says of its candidate, measured or not."""
    return {
        "candidate": one.name,
        "family": one.family,
        "foreign": one.foreign,
        "dtype": one.dtype,
        "weight_bits": one.weight_bits,
        "embedding_bits": one.embedding_bits,
        "weight_quantizer": one.weight_quantizer,
        "weights_bytes": one.weights_bytes(),
        "kernel": one.kernel(),
        "logits_error": None,
    }


def _prepare(one: ours.Candidate, work: Work, inputs: dict) -> dict:
    """Status and reason, what the proof found, and the memory of a call."""
    cell = work.cell
    cannot = one.cannot(cell)
    if cannot is not None:
        return {"status": "not supported", "reason": cannot}
    try:
        reason, error = proofs.function(one, inputs, cell.new_tokens, work.lineup.reference)
        found: dict = {"logits_error": error}
        if reason is None:
            one.free()
            reason = _first_call(one, work, inputs, found)
        if isinstance(one, ours.Engine) and (why := one.handed_on()) is not None:
            return {**found, "status": "not supported", "reason": record.scrub(f"Hugging Face's loop ran it: {why}")}
    except torch.OutOfMemoryError as error:
        one.free()
        if work.lineup.options.device.type == "cuda":
            torch.cuda.empty_cache()
        return {"status": "out of memory", "reason": record.scrub(shared.raised(error))}
    except Exception as error:  # noqa: BLE001 - whatever a candidate raises is its refusal, not ours
        return {"status": "not compared" if one.foreign else "refused", "reason": record.scrub(shared.raised(error))}
    return {**found, "status": "timed" if reason is None else "refused", "reason": reason and record.scrub(reason)}


def _first_call(one: ours.Candidate, work: Work, inputs: dict, found: dict) -> str | None:
    """Runs the work once: fills in its memory, and says why it is not the work that was asked for, or None."""
    cell = work.cell
    call = one.bind(inputs, cell.new_tokens, cell.num_beams)
    start = time.perf_counter()
    result, growth = memory.during(call, work.lineup.options.device)
    work.call_s[one.name] = time.perf_counter() - start
    tokens = one.tokens(result)
    if tuple(tokens.shape) != (cell.batch_size, cell.new_tokens):
        return f"generated tokens {list(tokens.shape)}, wanted {[cell.batch_size, cell.new_tokens]}"
    work.tokens[one.name] = tokens
    found["cache_bytes"] = one.cache_bytes(inputs, cell.new_tokens, cell.num_beams)
    weights = one.weights_bytes()
    # On a GPU torch's allocator does not see it; on a CPU it grew in its proof, and keeps that for the next call.
    outside = one.family == "ctranslate2"
    found["peak_bytes"] = None if growth.allocated is None or outside else weights + growth.allocated
    found["peak_reserved_bytes"] = None if growth.reserved is None or outside else weights + growth.reserved
    if not isinstance(one, ours.Engine):
        return None
    twin = work.tokens.get(one.twin.name)
    if twin is None:
        twin = one.twin.tokens(one.twin.bind(inputs, cell.new_tokens, cell.num_beams)())
    reason, found["equal_tokens_fraction"] = proofs.search(one, inputs, cell.num_beams, tokens, twin)
    one.bind(inputs, cell.new_tokens, cell.num_beams)()  # `handed_on` speaks of the last call
    return reason


def _time(rows: dict[str, dict], calls: dict[tuple[str, str], protocol.CALL], work: Work) -> None:
    """Takes turns, and writes the figures into the rows."""
    cell, device, seconds = work.cell, work.lineup.options.device, work.timing_s()
    # The first call told what a sample takes. None is given up that is about as fast as the one that ratios are to.
    limit = max(seconds / 4, _SLOWER * work.call_s.get(work.lineup.base, float("inf")))
    for name in dict.fromkeys(name for name, _ in calls):
        if work.call_s[name] > limit:  # it may have compiled something, or captured
            work.call_s[name] = protocol.wall_sampler(calls[name, "all"], device).sample()
        took = work.call_s[name]
        if took > limit:
            rows[name].update(status="too slow", reason=f"one call takes {took:.2g} s of {seconds:.2g} s for all")
    samplers = {
        key: protocol.wall_sampler(call, device) for key, call in calls.items() if rows[key[0]]["status"] == "timed"
    }
    outcome = protocol.interleave(
        {key: one.sample for key, one in samplers.items()},
        seconds=seconds,
        max_rounds=work.max_rounds,
        warmup_rounds=1,
        patience=float("inf"),
    )
    base = rows.get(work.lineup.base, {})
    base_time = outcome.stats.get((work.lineup.base, "all"))
    for name, row in rows.items():
        stats, first = outcome.stats.get((name, "all")), outcome.stats.get((name, "first"))
        if stats is None:
            continue
        times = {key: getattr(stats, key) * 1e3 for key in ("median", "p20", "p80")}
        row["latency_ms"] = _short(times["median"])
        row["latency_ms_per_token"] = _short(times["median"] / cell.new_tokens)
        row["p20_ms_per_token"] = _short(times["p20"] / cell.new_tokens)
        row["p80_ms_per_token"] = _short(times["p80"] / cell.new_tokens)
        row["first_token_ms"] = None if first is None else _short(first.median * 1e3)
        behind = None if first is None else (stats.median - first.median) * 1e3 / (cell.new_tokens - 1)
        row["decode_ms_per_token"] = None if behind is None else _short(max(0.0, behind))
        row["tokens_per_s"] = _short(cell.batch_size * cell.new_tokens / stats.median)
        row["samples"], row["timer"] = stats.n, samplers[name, "all"].timer
        row["speedup_ratio"] = None if base_time is None else _short(base_time.median / stats.median)
    for row in rows.values():
        both = row.get("peak_bytes"), base.get("peak_bytes")
        row["peak_ratio"] = _short(both[0] / both[1]) if all(both) else None


def _short(value: float) -> float:
    return float(f"{value:.4g}")
