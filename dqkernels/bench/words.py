"""Words about a record's machine, for titles and remarks. Plain Python: `dqkernels plot` needs no torch."""

from __future__ import annotations

#: Load per core before a run above which its times are not to be quoted.
BUSY = 0.25
#: What NVML's clock reasons are of, other than an idle card and settings that somebody chose.
SLOWED = ("sw_power_cap", "hw_slowdown", "sw_thermal_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown")


def machine_words(environment: dict) -> str:
    """For titles: the processor that ran, `NVIDIA H200` or `Intel(R) ..., 2 threads`."""
    return environment["gpu"] or f"{environment['cpu_model']}, {thread_words(environment['threads'])}"


def thread_words(threads: int) -> str:
    """`1 thread`, `2 threads`."""
    return f"{threads} thread" + "s" * (threads != 1)


def slowed_by(described: dict) -> list[str]:
    """Why the GPU was clocked down before or after the run, as far as NVML said; empty too where it said nothing."""
    found: list[str] = []
    for when in ("before", "after"):
        state = described.get(when)
        reasons = state.get("throttle_reasons") if isinstance(state, dict) else None
        found += [one for one in SLOWED if isinstance(reasons, list) and one in reasons and one not in found]
    return found


def busy_words(described: dict) -> str | None:
    """A warning for tables when the machine was not idle before the run, or its GPU was throttled; else None."""
    load, reasons = described["before"]["load_fraction"], slowed_by(described)
    found = []
    if load is not None and load >= BUSY:
        found.append(f"The machine was busy before the run (load {load:.2f} per core)")
    if reasons:
        found.append(f"{'the' if found else 'The'} GPU was throttled ({', '.join(reasons)})")
    return f"{', and '.join(found)}: do not quote these times." if found else None
