"""What the benchmarks of single calls share: their arguments, the timing of their rows, the words of their tables."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch

from dqkernels import backends as registry
from dqkernels.bench import floors, protocol, record
from dqkernels.checks import FLOAT_DTYPES

CACHES = ("cold", "warm")


# ------------------------------------------------------------------------------------------- arguments


def dtypes(dtype, default: list[torch.dtype]) -> list[torch.dtype]:
    """One or several float dtypes, as names or as torch's own.

    Raises:
        ValueError: for another dtype.
    """
    if dtype is None:
        return default
    kinds = []
    for one in [dtype] if isinstance(dtype, str | torch.dtype) else dtype:
        kind = getattr(torch, one, None) if isinstance(one, str) else one
        if kind not in FLOAT_DTYPES:
            raise ValueError(f"dtype must be float32, float16 or bfloat16, got {one!r}")
        kinds.append(kind)
    return kinds


def backends(asked: Sequence[str] | None, device: torch.device) -> tuple[list[str], dict[str, str]]:
    """Backends that are there, of those asked for or of the device's own order, and the reasons of the others.

    Raises:
        ValueError: for an unknown name.
    """
    unknown = sorted(set(asked or ()) - set(registry.NAMES))
    if unknown:
        raise ValueError(f"backends must be of {list(registry.NAMES)}, got {unknown}")
    usable, absent = [], {}
    for name in registry.ORDER.get(device.type, ("eager",)) if asked is None else asked:
        there, reason = registry.available(name, device.type)
        if there:
            usable.append(name)
        else:
            absent[f"dqkernels {name}"] = reason
    return usable, absent


def on(device: torch.device):
    """The context in which `device` is the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def peak(device: torch.device, probe: bool) -> floors.Device | None:
    """What the device can do at best: of a GPU by its name, of a CPU the measured copy bandwidth or nothing."""
    if device.type == "cuda":
        return floors.device_of(torch.cuda.get_device_name(device))
    return floors.probe_cpu() if probe else None


def floor_words(best: floors.Device | None, rule: str) -> dict:
    """The floor as it stands in a record's protocol."""
    if best is None:
        return {"device": None, "source": "none: this device is not in the table"}
    return {
        "device": best.name,
        "source": best.source,
        "bandwidth_gb_per_s": round(best.gb_per_s, 1),
        "int8_tops": best.int8_tops,
        "half_tops": best.half_tops,
        "rule": rule,
    }


def progress(name: str, groups: Sequence, label: Callable[[object], str]) -> Iterator:
    """The groups one after the other, with a bar on stderr that names the one at work; silent where no terminal is."""
    from tqdm import tqdm

    with tqdm(total=len(groups), desc=name, unit="group", disable=None, leave=False, dynamic_ncols=True) as bar:
        for group in groups:
            bar.set_postfix_str(label(group), refresh=True)
            yield group
            bar.update()


# ------------------------------------------------------------------------------------------------ rows


def judged(call: Callable[[], object], prove: Callable[[object], str | None]) -> tuple[object, str | None]:
    """What a candidate returns (None if it raises), and why it is refused, or None."""
    y = None
    try:
        y = call()
        return y, prove(y)
    except Exception as error:  # noqa: BLE001 - whatever a candidate raises is its refusal, not ours
        return y, raised(error)


def raised(error: Exception) -> str:
    """An exception as a reason: its type and its first line."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def floor_row(floor: floors.Floor | None) -> dict:
    """The fields of a row that say what the device can do at best."""
    return {
        "floor_us": None if floor is None else float(f"{floor.us:.4g}"),
        "floor_bound": None if floor is None else floor.bound,
    }


def verdict(reason: str | None, otherwise: str = "refused") -> dict:
    """The fields that every candidate's row has before it is timed; `otherwise` is its status if there is a reason."""
    return {
        "host_us": None,
        "eager_us": None,
        "status": "timed" if reason is None else otherwise,
        "reason": None if reason is None else record.scrub(reason),
    }


def fill(
    rows: Mapping[tuple[str, str], dict],
    samplers: Mapping[str, Mapping[str, protocol.Sampler]],
    calls: Mapping[str, protocol.CALL],
    base: str,
    device: torch.device,
    *,
    start: float,
    seconds: float,
    max_rounds: int,
) -> None:
    """Times the proven candidates and writes their figures into their rows.

    Args:
        rows: by candidate and cache; changed in place.
        samplers: by cache, then by candidate.
        calls: by candidate, for its time outside a graph.
        base: the candidate that `speedup_ratio` refers to.
        device: where they run.
        start: when the share began, by `perf_counter`.
        seconds: the share, building and proving included.
        max_rounds: of `interleave`.
    """

    def left() -> float:
        # What building took is gone; a third of the share is for timing all the same, or there would be no figure.
        return max(start + seconds - time.perf_counter(), seconds / 3)

    slow = {name for (name, _), row in rows.items() if row["backend"] in registry.SLOW}
    outside = protocol.outside_graphs(calls, device, left() / 6, alone=slow)
    for (name, cache), row in rows.items():
        found = outside.get(name, {})
        row["host_us"] = found.get("host_us")
        if cache == "warm":
            row.update(found)
    for caches_left, cache in zip((2, 1), CACHES, strict=True):
        chosen = samplers[cache]
        outcome = protocol.interleave(
            {name: s.sample for name, s in chosen.items()}, seconds=left() / caches_left, max_rounds=max_rounds
        )
        first = outcome.stats.get(base)
        for name, stats in outcome.stats.items():
            row = rows[name, cache]
            row.update(stats.row("us"))
            row["timer"], row["rotated_bytes"] = chosen[name].timer, chosen[name].rotated_bytes
            row["speedup_ratio"] = None if first is None else float(f"{first.median / stats.median:.4g}")
            if row["floor_us"] is not None:
                row["floor_fraction"] = float(f"{row['floor_us'] / row['median_us']:.3g}")
        for name, reason in outcome.skipped.items():
            rows[name, cache].update(status="too slow", reason=reason)


# ----------------------------------------------------------------------------------------------- tables


def grouped(lines: Iterable[dict], label: Callable[[dict], str]) -> dict[str, dict[str, dict[str, dict]]]:
    """Candidates' rows by group, candidate and cache, in their order."""
    groups: dict[str, dict[str, dict[str, dict]]] = {}
    for line in lines:
        if "cache" in line:
            groups.setdefault(label(line), {}).setdefault(line["candidate"], {})[line["cache"]] = line
    return groups


def notes(lines: Iterable[dict], label: Callable[[dict], str]) -> list[str]:
    """A sentence for each reason why something was not timed."""
    found: dict[tuple[str, str], list[str]] = {}
    for line in lines:
        if line["status"] == "too slow":
            found.setdefault((line["status"], ""), []).append(f"{label(line)} {line['candidate']} {line['cache']}")
        elif line["status"] != "timed":
            names = found.setdefault((line["status"], line["reason"]), [])
            names += [name for name in [line.get("candidate", label(line))] if name not in names]
    return [f"{what}: {', '.join(names)}" + (f": {why}" if why else "") for (what, why), names in found.items()]


#: Columns of what was timed outside a graph, the telling one first: head, key, and words below the table.
_OUTSIDE = (
    ("eager", "eager_us", "eager: microseconds a call without a graph, warm, the device waited for."),
    ("host", "host_us", "host: microseconds of the caller's thread, from the second call on."),
)


def outside_column(lines: Sequence[dict]) -> tuple[list[str], list[str], list[str]]:
    """Heads, keys and words of the column that a table needs of a GPU's rows: `eager`, of older records `host`."""
    for head, key, words in _OUTSIDE:
        if any(line.get(key) is not None for line in lines):
            return [head], [key], [words]
    return [], [], []


def cell(line: dict) -> str:
    """The median of a row, or why there is none, in at most 7 characters."""
    if line["status"] != "timed":
        return {"too slow": "slow"}.get(line["status"], line["status"])
    return microseconds(line["median_us"])


def microseconds(time_us: float | None) -> str:
    """`12.3`, `4,567`, `890 ms`, `12 s`."""
    if time_us is None:
        return ""
    if time_us >= 1e7:
        return f"{time_us / 1e6:,.0f} s"
    if time_us >= 1e5:
        return f"{time_us / 1e3:,.0f} ms"
    return f"{time_us:.1f}" if time_us < 1e3 else f"{time_us:,.0f}"


def ratio(line: dict) -> str:
    """`1.85`, or nothing."""
    return "" if line.get("speedup_ratio") is None else f"{line['speedup_ratio']:.2f}"


def percent(line: dict, key: str = "floor_fraction") -> str:
    """`41%`, or nothing."""
    return "" if line.get(key) is None else f"{100 * line[key]:.0f}%"
