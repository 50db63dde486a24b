"""Every check program of the compiled core with every instruction set of this CPU, several at a time.

    python tests/cpu_checks.py [--jobs 2] [--seconds 600] [INSTRUCTION_SET ...]

For a processor that nobody ran before: guard pages, oracles, threads, and the same bits from every set. Prints a line
per run and what failed; the last line is a summary, in JSON. Exit code 1 unless all of it ran and passed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
#: The longest first. True: it takes the core's path, and imports no torch.
PROGRAMS = {
    "cpu_attention_checks_decode.py": False,
    "cpu_grid_checks.py": False,
    "native_gemm_checks.py": True,
    "native_thread_checks.py": True,
    "cpu_norm_checks.py": False,
    "cpu_token_checks.py": False,
    "cpu_beam_checks.py": False,
    "native_checks.py": True,
}


def run(core: str, program: str, isa: str, seconds: float) -> dict:
    """One program; what it counted, or the end of what it said."""
    env = os.environ | {"DQKERNELS_CPU": isa, "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE), *sys.path])}
    command = [sys.executable, str(HERE / program), *([core] if PROGRAMS[program] else [])]
    start = time.monotonic()
    try:
        done = subprocess.run(
            command, env=env, cwd=HERE.parent, capture_output=True, text=True, timeout=max(1, seconds)
        )
        code, out, said = done.returncode, done.stdout, done.stderr[-3000:]
    except subprocess.TimeoutExpired:
        code, out, said = None, "", "no time left"
    row = {"program": program, "isa": isa, "took_s": round(time.monotonic() - start, 1), "digest": None, "error": None}
    row["finished"] = code is not None
    if code is None:
        row["error"] = said
        return row
    if code != 0:
        row["error"] = f"exit code {code}: {said.strip() or out[-3000:].strip()}"
        return row
    report = json.loads(out.splitlines()[-1])
    row["digest"] = report.get("digest")
    if report["isa"] != isa:
        row["error"] = f"it ran with {report['isa']}"
    return row


def disagreements(rows: list[dict]) -> list[str]:
    """Programs whose results differ between instruction sets."""
    wrong = []
    for program in PROGRAMS:
        found = {row["isa"]: row["digest"] for row in rows if row["program"] == program and row["digest"]}
        if len(set(found.values())) > 1:
            wrong.append(f"{program}: {found}")
    return wrong


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("isas", nargs="*", metavar="INSTRUCTION_SET")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=600)
    given = parser.parse_args(argv)
    from dqkernels.kernels import native

    core = native.native()
    if core is None:
        print(f"no compiled core: {native.why_absent()}")
        return 1
    end = time.monotonic() + given.seconds
    isas = given.isas or core.cpu_isas()
    # A set's programs before those of the next, the best set first: what time does not reach is what is known best.
    pairs = [(program, isa) for isa in reversed(isas) for program in PROGRAMS]
    rows = []
    with ThreadPoolExecutor(max(1, given.jobs)) as pool:
        for row in pool.map(lambda pair: run(core.__file__, *pair, end - time.monotonic()), pairs):
            rows.append(row)
            print(f"{'ok' if row['error'] is None else 'FAILED'} {row['isa']} {row['program']} {row['took_s']} s")
            if row["error"] is not None:
                print(row["error"])
            sys.stdout.flush()
    wrong = disagreements(rows)
    for line in wrong:
        print(f"other bits: {line}")
    bad = [row for row in rows if row["error"] is not None]
    failed, unfinished = (
        [f"{row['isa']} {row['program']}" for row in bad if row["finished"] is finished] for finished in (True, False)
    )
    summary = {
        "cpu_isas": isas,
        "runs": len(rows),
        "failed": failed,
        "unfinished": unfinished,
        "other_bits": len(wrong),
    }
    print(json.dumps(summary))
    return 1 if failed or unfinished or wrong or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
