"""`bench compare` on real runs: silent on a rerun, exit 1 where a kernel was really delayed.

tests/test_bench_compare.py has samples made up. Here `dqkernels bench linear` runs three times, each in a process of
its own: two runs are equal, and in the third every call of ours at 4 bits waits behind its work, without any other
change. The wait is half of the call's time, and on a machine whose noise would hide that as much more as it takes: how
much a run can see is what `compare` says of the rerun. Half a minute on an idle machine.

Two runs are equal only where the machine is: with neighbours that come and go (the records say `busy`), a rerun that is
not silent is repeated, twice at most. On an idle machine it is not.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dqkernels.bench import words
from dqkernels.kernels import native

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(native.native() is None, reason=native.why_absent() or "present")
ARGUMENTS = "--shapes 1x256x256 --bits 8,4 --dtype float32 --backends cpu --device cpu --seconds 12".split()
OURS = "dqkernels W4 cpu"
#: A call of the named candidate computes what it does, and then waits; nothing else is touched.
RUN = """
import sys, time
from dqkernels.bench import candidates
from dqkernels.cli import main

name, seconds = sys.argv[1], float(sys.argv[2])
add = candidates.Contest._add

def delayed(self, one):
    if not one.name.startswith(("dqkernels", "torch fp32")):
        return  # peers are whatever is installed here
    if one.name == name and seconds:
        bind = one.bind
        def late(module, x):
            call = bind(module, x)
            def wait():
                y, until = call(), time.perf_counter() + seconds
                while time.perf_counter() < until:
                    pass
                return y
            return wait
        one.bind = late
    add(self, one)

candidates.Contest._add = delayed
sys.exit(main(["bench", "linear", *sys.argv[3:]]))
"""


def run(path: Path, seconds: float = 0.0) -> dict:
    """A run of the verb in a fresh process, on one thread; its record."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", RUN, OURS, repr(seconds), *ARGUMENTS, "--out", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text(encoding="utf-8"))


def compared(*paths: Path) -> tuple[int, dict]:
    """Exit code and result of `dqkernels bench compare`, as a user calls it."""
    command = [sys.executable, "-m", "dqkernels", "bench", "compare", *map(str, paths), "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=120)
    return done.returncode, json.loads(done.stdout)


def times(found: dict, candidate: str) -> list[dict]:
    """The rows of a comparison that are about a candidate's time, cold and warm."""
    rows = [row for row in found["rows"] if row["what"] == "time" and row["label"].endswith(f", {candidate}")]
    assert len(rows) == 2, found["rows"]
    return rows


def test_a_rerun_is_silent_and_a_real_delay_is_not(tmp_path):
    first, second, slow = (tmp_path / f"{name}.json" for name in ("first", "second", "slow"))
    made = [run(first), run(second)]
    for _ in range(2):
        if compared(first, second)[0] == 0 or not any(words.busy_words(one["protocol"]) for one in made):
            break
        first.unlink()
        second.rename(first)
        made = [made[1], run(second)]
    code, found = compared(first, second)
    assert code == 0 and found["losses"] == 0, found["rows"]
    assert {row["verdict"] for row in found["rows"] if row["what"] == "time"} == {"same"}, "nothing is named"
    noise = max(row["noise_ratio"] for row in times(found, OURS))
    wait_us = max(row["before"] for row in times(found, OURS)) * max(0.5, 4 * noise)
    run(slow, seconds=1e-6 * wait_us)
    code, found = compared(first, slow)
    assert code == 1 and found["losses"] >= 1, (noise, found["rows"])
    named = {row["label"].partition(", ")[2] for row in found["rows"] if row["is_loss"]}
    assert named == {OURS}, "the one that waits, and no other"
    assert all(row["verdict"] == "slower" for row in times(found, OURS))
    code, found = compared(slow, second)
    assert code == 0 and all(row["verdict"] == "faster" for row in times(found, OURS)), "the other way round, a gain"
