"""How things are timed here: warm-up, interleaved rounds, median with p10, p20, p80, p90, and a bound on the whole.

On a GPU one sample is the replay of a CUDA graph between two events, divided by the launches in it; `cold`
graphs walk through copies of the weights that together exceed three times the L2 cache, `warm` ones repeat
one copy. On a CPU one sample is a run of calls between two readings of `perf_counter`. Candidates take
turns within a round, so that a clock that drifts or a neighbour that wakes up hits all of them.
"""

from __future__ import annotations

import functools
import os
import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dqkernels.bench import record
from dqkernels.bench.words import BUSY, busy_words, machine_words, thread_words  # noqa: F401 - where they are looked for

CALL = Callable[[], object]
#: A rotation is cold when it is this many times larger than the cache.
ROTATE_OVER = 3
#: Weight copies of one candidate stay below this, whatever the cache: a virtual CPU often reports the last-
#: level cache of its whole host (hundreds of MiB), of which it owns a share that nobody names.
MAX_ROTATION_BYTES = {"cuda": 1 << 30, "cpu": 1 << 28}
#: And there are never more than this: graphs and lists of a thousand calls are long enough.
MAX_COPIES = 2048
#: A sample shorter than this would measure the clock and the launch of the graph.
_LEAST_SAMPLE_S = {"cuda": 4e-4, "cpu": 1e-3}
_WARMUP_ROUNDS = 2
#: nvmlClocksEventReason*, by bit.
THROTTLE_REASONS = {
    0x1: "gpu_idle",
    0x2: "applications_clocks_setting",
    0x4: "sw_power_cap",
    0x8: "hw_slowdown",
    0x10: "sync_boost",
    0x20: "sw_thermal_slowdown",
    0x40: "hw_thermal_slowdown",
    0x80: "hw_power_brake_slowdown",
    0x100: "display_clock_setting",
}
#: Calls of one sample outside a graph: a GPU queues about a thousand launches before it makes the caller wait.
EAGER_CALLS = 10
_EAGER_ROUNDS = 20


@dataclass(frozen=True)
class Stats:
    """Seconds per operation over `n` samples; linear interpolation between neighbours."""

    p10: float
    p20: float
    median: float
    p80: float
    p90: float
    mean: float
    n: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Stats:
        """Statistics of at least one sample."""
        if not samples:
            raise ValueError("samples is empty: nothing was timed")
        ordered = sorted(samples)
        mean = sum(ordered) / len(ordered)
        return cls(*(percentile(ordered, percent) for percent in (10, 20, 50, 80, 90)), mean, len(ordered))

    def row(self, unit: str) -> dict:
        """As it stands in a record: `median_us`, `p20_us`, ..., `samples`. `unit` is `us`, `ms` or `s`."""
        factor = {"us": 1e6, "ms": 1e3, "s": 1.0}[unit]
        names = ("median", "p10", "p20", "p80", "p90", "mean")
        row = {f"{name}_{unit}": _short(getattr(self, name) * factor) for name in names}
        return {**row, "samples": self.n}


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Of sorted values, by linear interpolation."""
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


@dataclass
class Sampler:
    """One timed thing.

    Attributes:
        sample: runs it once or many times and returns seconds per operation.
        timer: in words, for the record.
        rotated_bytes: weights it walked through; 0 when warm.
    """

    sample: Callable[[], float]
    timer: str
    rotated_bytes: int = 0


@dataclass
class Outcome:
    """What `interleave` found: statistics by name, and the reason of each candidate it gave up."""

    stats: dict[str, Stats] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    rounds: int = 0


def interleave(
    samplers: Mapping[str, Callable[[], float]],
    *,
    seconds: float,
    max_rounds: int = 200,
    warmup_rounds: int = _WARMUP_ROUNDS,
    patience: float = 0.25,
    clock: Callable[[], float] = time.perf_counter,
) -> Outcome:
    """Takes one sample of every candidate per round until `seconds` or `max_rounds` are used up.

    Warm-up samples are thrown away. A candidate whose first sample alone takes more than `patience * seconds`
    is given up with that reason. At least one round is timed, however late it is by then.
    """
    start = clock()
    outcome = Outcome()
    alive = dict(samplers)
    share = seconds * patience
    for round_ in range(warmup_rounds):
        for name, sample in list(alive.items()):
            before = clock()
            sample()
            took = clock() - before
            if round_ == 0 and took > share:
                outcome.skipped[name] = f"one sample takes {took:.2g} s of the {seconds:.2g} s for all of them"
                del alive[name]
        if clock() - start > seconds / 2:
            break
    samples: dict[str, list[float]] = {name: [] for name in alive}
    while alive and outcome.rounds < max_rounds and (outcome.rounds == 0 or clock() - start < seconds):
        for name, sample in alive.items():
            samples[name].append(sample())
        outcome.rounds += 1
    outcome.stats = {name: Stats.of(values) for name, values in samples.items()}
    return outcome


# --------------------------------------------------------------------------------------------------- samplers


def copies_for(
    weight_bytes: int, device: torch.device, held_bytes: int = 0, most: Mapping[str, int] | None = None
) -> int:
    """Copies of a weight that make a rotation cold: more than `ROTATE_OVER` times the cache, at least 4.

    `held_bytes`: what a copy takes in memory, where a call does not touch all of it. `most`: instead of
    `MAX_ROTATION_BYTES`.
    """
    wanted = ROTATE_OVER * cache_bytes(device) // max(1, weight_bytes) + 1
    fitting = (most or MAX_ROTATION_BYTES)[device.type] // max(1, weight_bytes, held_bytes)
    return int(max(4, min(wanted, fitting, MAX_COPIES)))


def sampler(calls: Sequence[CALL], device: torch.device, *, weight_bytes: int = 0) -> Sampler:
    """Times `calls`, one after the other and round again; one call of each is one operation.

    Args:
        calls: one (warm) or as many as there are weight copies (cold).
        device: where they run.
        weight_bytes: of one copy, for the record.
    """
    rotated = weight_bytes * len(calls) if len(calls) > 1 else 0
    if device.type == "cuda":
        return Sampler(*_graph_sampler(calls), rotated)
    return Sampler(_loop_sampler(calls), "perf_counter", rotated)


def _loop_sampler(calls: Sequence[CALL]) -> Callable[[], float]:
    once = float("inf")
    for call in calls[:3]:
        start = time.perf_counter()
        call()
        # The quickest of three: the first one also pays for what a library prepares on first use.
        once = min(once, time.perf_counter() - start)
    repeat = max(1, int(_LEAST_SAMPLE_S["cpu"] / max(once, 1e-7)))
    position = 0

    def sample() -> float:
        # The walk goes on where the last sample stopped; a restart would find the first copies in the cache.
        nonlocal position
        chosen = [calls[(position + i) % len(calls)] for i in range(repeat)]
        position = (position + repeat) % len(calls)
        start = time.perf_counter()
        for call in chosen:
            call()
        return (time.perf_counter() - start) / repeat

    return sample


def _graph_sampler(calls: Sequence[CALL]) -> tuple[Callable[[], float], str]:
    """A CUDA graph of whole rotations; plain events when the calls cannot be captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.stream(side):
        for call in calls[:3]:
            call()
        side.synchronize()
        before.record(side)
        calls[0]()
        after.record(side)
        side.synchronize()
    torch.cuda.current_stream().wait_stream(side)
    once = max(before.elapsed_time(after) * 1e-3, 1e-6)
    rotations = max(1, int(_LEAST_SAMPLE_S["cuda"] / (once * len(calls))))
    launches = rotations * len(calls)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(rotations):
                for call in calls:
                    call()
        run, timer = graph.replay, "cuda graph replay, events"
    except RuntimeError:
        torch.cuda.synchronize()

        def run() -> None:
            for _ in range(rotations):
                for call in calls:
                    call()

        timer = "cuda events (cannot be captured in a graph)"

    # `kept`: a graph replays addresses. What only the calls hold (an input cast for one candidate) must live as long;
    # freed, it was unmapped by the next capture, and the replay faulted on a GPU.
    def sample(kept: Sequence[CALL] = calls) -> float:
        before.record()
        run()
        after.record()
        after.synchronize()
        return before.elapsed_time(after) * 1e-3 / launches

    return sample, timer


class EagerSampler:
    """`count` calls back to back, outside a graph, with an idle GPU before them.

    Attributes:
        whole: seconds of a call with the device waited for behind the last one, a figure per sample.
    """

    def __init__(self, call: CALL, device: torch.device, count: int = EAGER_CALLS):
        self.call, self.device, self.count, self.whole = call, device, count, []

    def sample(self) -> float:
        """Host seconds of a call: the device is not waited for."""
        torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        for _ in range(self.count):
            self.call()
        took = time.perf_counter() - start
        torch.cuda.synchronize(self.device)
        self.whole.append((time.perf_counter() - start) / self.count)
        return took / self.count


def outside_graphs(
    calls: Mapping[str, CALL], device: torch.device, seconds: float, alone: Collection[str] = ()
) -> dict[str, dict[str, float]]:
    """What a row holds of a call by name, its first calls thrown away: the median `host_us` of the caller's thread, and
    `eager_us` of both with its spread.

    Empty on a CPU, where every call is eager and the host is the device. `alone`: calls that are so many launches that
    ten could fill the queue; each is timed by itself.
    """
    if device.type != "cuda":
        return {}
    samplers = {name: EagerSampler(call, device, 1 if name in alone else EAGER_CALLS) for name, call in calls.items()}
    timed = interleave({name: one.sample for name, one in samplers.items()}, seconds=seconds, max_rounds=_EAGER_ROUNDS)
    found = {}
    for name, stats in timed.stats.items():
        eager = Stats.of(samplers[name].whole[-stats.n :])  # what warmed up stands before
        found[name] = {"host_us": _short(stats.median * 1e6), "eager_us": _short(eager.median * 1e6)}
        found[name] |= {f"eager_{key}_us": _short(getattr(eager, key) * 1e6) for key in ("p20", "p80")}
        found[name]["eager_samples"] = eager.n
    return found


def wall_sampler(call: CALL, device: torch.device) -> Sampler:
    """Wall clock of one call, the device waited for: what a user of `generate` sees."""

    def sample() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    return Sampler(sample, "perf_counter, device synchronized" if device.type == "cuda" else "perf_counter")


# ------------------------------------------------------------------------------------------ machine


@functools.cache
def cache_bytes(device: torch.device) -> int:
    """The cache a weight could stay in: L2 on a GPU, the last level of the CPU (32 MiB where nobody says)."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        found = re.fullmatch(r"(\d+)([KM])", path.read_text().strip())
        if found:
            sizes.append(int(found.group(1)) << {"K": 10, "M": 20}[found.group(2)])
    return max(sizes, default=32 << 20)


def pick_device(device: str | torch.device | None) -> torch.device:
    """`device`, or the GPU if there is one."""
    if device is not None:
        return torch.device(device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def state(device: torch.device) -> dict:
    """Load of the machine; clocks, power and throttling of the GPU, as they are now; nulls where nobody says."""
    words = record.nvidia_smi("clocks.sm,clocks.mem,power.draw,power.limit") if device.type == "cuda" else None
    fields = (words or "").split(",")
    names = ("sm_clock_mhz", "memory_clock_mhz", "power_watts", "power_limit_watts")
    return {
        # Over one minute and per core: above a few percent before a run, somebody else is working here.
        "load_fraction": round(os.getloadavg()[0] / (os.cpu_count() or 1), 3) if hasattr(os, "getloadavg") else None,
        **{name: _number(fields[i]) if i < len(fields) else None for i, name in enumerate(names)},
        "throttle_reasons": throttle_reasons() if device.type == "cuda" else None,
    }


def throttle_reasons() -> list[str] | None:
    """Why NVML says that the GPU's clocks are where they are, by its own names; None where it does not say.

    A reason that this list does not know is kept as its bit.
    """
    # Drivers from 535 on ask for the first; older ones know the second alone, and refuse a query whole.
    for name in ("clocks_event_reasons.active", "clocks_throttle_reasons.active"):
        try:
            mask = int(record.nvidia_smi(name) or "", 16)
        except ValueError:  # nobody answered, or `[Not Supported]`
            continue
        return [THROTTLE_REASONS.get(bit, hex(bit)) for bit in (1 << i for i in range(64)) if mask & bit]
    return None


def describe(
    device: torch.device, seconds: float, max_rounds: int, before: dict, most: Mapping[str, int] | None = None
) -> dict:
    """The protocol as it stands in a record; `before` is what `state` said at the start, `most` as in `copies_for`."""
    gpu = device.type == "cuda"
    rotation = f"{ROTATE_OVER}x the cache, at most {(most or MAX_ROTATION_BYTES)[device.type] >> 20} MiB"
    return {
        "timer": "cuda graph replays between events" if gpu else "perf_counter",
        "statistic": "median, p10, p20, p80, p90, mean of per-operation times",
        "interleaved": True,
        "warmup_rounds": _WARMUP_ROUNDS,
        "max_rounds": max_rounds,
        "budget_s": float(seconds),
        "data": "normal, seeded, never zeros",
        "cache_bytes": cache_bytes(device),
        "cold": f"weight copies in rotation: {rotation}",
        "warm": "one copy of the weights, over and over",
        "host": f"{EAGER_CALLS} calls in a row (of eager 1), the GPU idle before and not waited for" if gpu else None,
        "eager": "those calls, no graph, one copy of the weights, the GPU waited for behind the last" if gpu else None,
        "before": before,
        "after": state(device),
    }


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _short(value: float) -> float:
    """Five significant digits: more would be noise, and records are read by people."""
    return float(f"{value:.5g}")
