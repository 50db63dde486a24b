"""Plants each defect in a copy of the tree and demands that its tests go red.

    python tests/mutants/run.py [--quick] [NAME ...]

The copy stands in a temporary folder, so nothing here is ever touched. First the unchanged copy must be green: a
test that fails anyway kills every mutant and proves nothing. Exit code 1 if a mutant survives.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LISTS = sorted(Path(__file__).parent.glob("*.toml"))
TIMEOUT_S = 600
NO_PROGRAM = "the program on the simulator does not compile"  # tests/sim/conftest.py


@dataclass(frozen=True)
class Mutant:
    """One planted defect: `old`, which occurs once in `file`, becomes `new`, and `tests` must fail."""

    name: str
    why: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    quick: bool = False


def load() -> list[Mutant]:
    """Every mutant of the lists in this folder."""
    entries = [entry for path in LISTS for entry in tomllib.loads(path.read_text())["mutant"]]
    mutants = [Mutant(**{**entry, "tests": tuple(entry["tests"])}) for entry in entries]
    names = [mutant.name for mutant in mutants]
    if len(set(names)) != len(names):
        raise ValueError(f"two mutants have one name: {sorted({n for n in names if names.count(n) > 1})}")
    return mutants


def copy_tree(folder: Path) -> None:
    """The package, the kernels, the tests, records and settings; the compiled core comes with the package where it is
    built: a defect in csrc/ shows only in tests that compile it themselves (tests/sim)."""
    ignored = shutil.ignore_patterns("__pycache__", "mutants", "test_mutants.py")
    for name in ("dqkernels", "csrc", "tests", "benchmarks/results"):  # records: what pictures are tested on
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("pyproject.toml", "CMakeLists.txt"):
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, folder / name)


def plant(folder: Path, mutant: Mutant) -> None:
    """Raises ValueError if `old` does not occur exactly once: the code moved on without its mutant."""
    path = folder / mutant.file
    text = path.read_text()
    if text.count(mutant.old) != 1:
        raise ValueError(f"{mutant.name}: `old` occurs {text.count(mutant.old)} times in {mutant.file}, wanted once")
    path.write_text(text.replace(mutant.old, mutant.new))


def run_tests(folder: Path, tests: tuple[str, ...]) -> subprocess.CompletedProcess:
    """pytest on the copy, which is made sure to be what is imported."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("DQKERNELS_BACKEND", None)
    environment.setdefault("DQKERNELS_SIM_OPTIMIZE", "-O0")  # tests/sim/harness.py: building is most of the time
    program = (
        "import sys, pathlib, dqkernels, pytest\n"
        f"assert pathlib.Path(dqkernels.__file__).is_relative_to({str(folder)!r}), dqkernels.__file__\n"
        "sys.exit(pytest.main(sys.argv[1:]))"
    )
    options = ["-x", "-q", "--no-header", "--tb=line", "-p", "no:cacheprovider"]
    return subprocess.run(
        [sys.executable, "-c", program, *options, *tests],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
    )  # fmt: skip


def green(tests: tuple[str, ...]) -> str | None:
    """None if the unchanged copy passes `tests`, else what pytest said."""
    with tempfile.TemporaryDirectory() as folder:
        copy_tree(Path(folder))
        done = run_tests(Path(folder), tests)
        return None if done.returncode == 0 else done.stdout[-2000:] + done.stderr[-2000:]


def survives(mutant: Mutant) -> str | None:
    """None if the tests notice, else what pytest said. Only exit code 1, failed tests, is a verdict, and not
    where the defect does not even compile."""
    with tempfile.TemporaryDirectory() as folder:
        copy_tree(Path(folder))
        plant(Path(folder), mutant)
        done = run_tests(Path(folder), mutant.tests)
        if done.returncode == 1 and NO_PROGRAM not in done.stdout:
            return None
        return f"exit code {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="mutants to run; default: all")
    parser.add_argument("--quick", action="store_true", help="only those marked quick")
    arguments = parser.parse_args()
    mutants = [m for m in load() if not arguments.names or m.name in arguments.names]
    unknown = set(arguments.names) - {m.name for m in mutants}
    if unknown:
        parser.error(f"unknown mutants {sorted(unknown)}")
    if arguments.quick:
        mutants = [m for m in mutants if m.quick]
    for tests in sorted({m.tests for m in mutants}):
        said = green(tests)
        if said is not None:
            print(f"the unchanged tree fails {' '.join(tests)}:\n{said}")
            return 1
    survivors = []
    for mutant in mutants:
        start = time.monotonic()
        said = survives(mutant)
        verdict = "killed" if said is None else "SURVIVED"
        print(f"{verdict:9}{time.monotonic() - start:6.1f} s  {mutant.name}: {mutant.why}")
        if said is not None:
            survivors.append(mutant.name)
            print(said)
        sys.stdout.flush()
    print(f"{len(mutants) - len(survivors)} of {len(mutants)} killed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
