"""Words about a record's machine, for titles and remarks. Plain Python: `dqkernels plot` needs no torch."""

from __future__ import annotations

#: Load per core before a run above which its times are not to be quoted.
BUSY = 0.25


def machine_words(environment: dict) -> str:
    """For titles: the processor that ran, `NVIDIA H200` or `Intel(R) ..., 2 threads`."""
    return environment["gpu"] or f"{environment['cpu_model']}, {thread_words(environment['threads'])}"


def thread_words(threads: int) -> str:
    """`1 thread`, `2 threads`."""
    return f"{threads} thread" + "s" * (threads != 1)


def busy_words(described: dict) -> str | None:
    """A warning for tables when the machine was not idle before the run, else None."""
    load = described["before"]["load_fraction"]
    if load is None or load < BUSY:
        return None
    return f"The machine was busy before the run (load {load:.2f} per core): do not quote these times."
