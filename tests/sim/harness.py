"""Builds a program on the host simulator with sanitizers and calls it: `Program`, `Case`, `run_cases`.

A program is C++ that ends in `dqk::sim::serve(run)` (protocol.h) with the kernels' own sources beside it. It is built
once per content of its sources, and stays up between calls; a report of the simulator or of a sanitizer ends it, and
comes back as `Report`.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import select
import shutil
import signal
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
#: Two schedules and their mirror images (csrc/sim/sim.h).
SEEDS = (0, 1, 2, 3)
CALL_S = 120
#: Programs and objects that stay in the temporary folder, and compilers side by side.
KEPT, KEPT_OBJECTS, COMPILERS = 24, 64, 2
INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*"([^"]+)"', re.M)
SANITIZE = "-fsanitize=address,undefined"
#: DQKERNELS_SIM_OPTIMIZE=-O0 builds in a third of the time and runs twice as long: right for a run that stops at the
#: first failure. -fno-strict-aliasing: nvcc allows kernels to read one type through another. -ffp-contract=off: P1.
FLAGS = (
    "-std=c++17", "-DDQK_SIM", os.environ.get("DQKERNELS_SIM_OPTIMIZE", "-O1"), "-g1", "-Wall", "-Wextra",
    "-Wno-unknown-pragmas", "-ffp-contract=off", "-fno-strict-aliasing",
    "-fno-omit-frame-pointer", SANITIZE, "-fno-sanitize-recover=all",
)  # fmt: skip

GIVEN, WANTED, NULL = 1, 2, 4


class Report(Exception):
    """The program ended instead of answering: what the simulator or a sanitizer said."""


class BuildError(Exception):
    """The compiler's own words."""


# ---------------------------------------------------------------------------------------------- building


def missing() -> str | None:
    """Why nothing can be simulated here, or None."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return f"the simulator runs on x86-64 Linux, this is {platform.system()} on {platform.machine()}"
    return None if shutil.which("g++") else "the simulator needs g++, and there is none on the PATH"


def _cache() -> Path:
    """A folder of this user's in the temporary folder; binaries are found again by the hash of their sources."""
    folder = Path(tempfile.gettempdir()) / f"dqkernels-sim-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise BuildError(f"{folder} belongs to somebody else: programs in it are not to be trusted")
    return folder


def _includes(source: Path, roots: Sequence[Path]) -> list[Path]:
    """`source` and all of ours that it includes, by the words in quotes, wherever a preprocessor would take them."""
    found, todo = {source: None}, [source]
    while todo:
        path = todo.pop()
        for name in INCLUDE.findall(path.read_text()):
            for root in (path.parent, *roots):
                if (root / name).is_file():
                    header = (root / name).resolve()
                    if header not in found:
                        found[header] = None
                        todo.append(header)
                    break
    return list(found)


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.splitlines()
        first = next((i for i, line in enumerate(lines) if "error:" in line), 0)
        raise BuildError(f"{' '.join(command)}\n" + "\n".join(lines[max(0, first - 2) : first + 20]))


def _once(target: Path, command: Sequence[str]) -> Path:
    """`target`, made by `command` unless it is there; it appears under its name when it is whole."""
    if target.exists():
        target.touch()
        return target
    with tempfile.TemporaryDirectory(dir=_cache()) as folder:
        _run([*command, "-o", f"{folder}/made"])
        os.replace(f"{folder}/made", target)
    return target


def build(sources: Sequence[Path], flags: Sequence[str] = ()) -> Path:
    """The program made of `sources`. An object is compiled unless its source and headers were seen before, two at a
    time: a change in one kernel's header costs that kernel's objects alone.

    Raises:
        BuildError: the compiler refused, with its first errors.
    """
    version = subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout
    roots = [CSRC / "include", CSRC, HERE]
    compiler = ["g++", *FLAGS, *(f"-I{root}" for root in roots), *flags]

    def compiled(source: Path) -> Path:
        digest = hashlib.sha256("\0".join([version, *FLAGS, *flags, source.name]).encode())
        for path in _includes(source, roots):
            digest.update(b"\0" + path.name.encode() + b"\0" + path.read_bytes())
        target = _cache() / f"{source.stem}-{digest.hexdigest()[:16]}.o"
        return _once(target, [*compiler, "-x", "c++", "-c", str(source)])

    with ThreadPoolExecutor(max_workers=COMPILERS) as pool:
        objects = list(pool.map(compiled, sources))
    digest = hashlib.sha256("\0".join(path.name for path in objects).encode()).hexdigest()[:16]
    binary = _once(_cache() / f"{sources[0].stem}-{digest}", ["g++", SANITIZE, *map(str, objects)])
    for suffix, kept in ((".o", KEPT_OBJECTS), ("", KEPT)):
        files = [path for path in _cache().iterdir() if path.is_file() and path.suffix == suffix]
        for old in sorted(files, key=lambda path: path.stat().st_mtime)[:-kept]:
            old.unlink(missing_ok=True)
    return binary


# ----------------------------------------------------------------------------------------------- calling


@dataclass(frozen=True)
class Buffer:
    """One argument in memory: exactly this array's bytes, `offset` bytes behind a multiple of 256."""

    array: np.ndarray
    flags: int
    offset: int = 0


def given(array: np.ndarray, offset: int = 0) -> Buffer:
    """An input."""
    return Buffer(np.ascontiguousarray(array), GIVEN, offset)


def wanted(shape, dtype, offset: int = 0) -> Buffer:
    """An output; it starts as 0xA5 bytes."""
    return Buffer(np.empty(shape, dtype), WANTED, offset)


def changed(array: np.ndarray, offset: int = 0) -> Buffer:
    """An input that is written and comes back (a workspace, a counter)."""
    return Buffer(np.ascontiguousarray(array), GIVEN | WANTED, offset)


#: A null pointer.
ABSENT = Buffer(np.empty(0, np.uint8), NULL)


class Program:
    """A running program; see the module's docstring."""

    def __init__(self, binary: Path, environment: dict[str, str] | None = None):
        self.binary = binary
        self.environment = environment or {}
        self.source_folder = HERE
        self._process: subprocess.Popen | None = None
        self._errors = None

    def _start(self) -> subprocess.Popen:
        if self._process is None:
            self._errors = tempfile.TemporaryFile()
            environment = {
                **os.environ,
                **self.environment,
                "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:handle_abort=0:allocator_may_return_null=0",
                "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
            }
            self._process = subprocess.Popen(
                [str(self.binary)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, env=environment
            )
        return self._process

    def call(
        self, function: str, scalars: Sequence[int | float], buffers: Sequence[Buffer], seed: int
    ) -> tuple[int, list[np.ndarray]]:
        """The Status and the outputs. Floats among the scalars arrive as doubles.

        Raises:
            Report: the program ended.
        """
        name = function.encode()
        parts = [struct.pack("<QI", seed, len(name)), name, struct.pack("<I", len(scalars))]
        parts += [struct.pack("<d" if isinstance(value, float) else "<q", value) for value in scalars]
        parts.append(struct.pack("<I", len(buffers)))
        for buffer in buffers:
            parts.append(struct.pack("<QII", buffer.array.nbytes, buffer.offset, buffer.flags))
            parts.append(buffer.array.tobytes() if buffer.flags & GIVEN else b"")
        process = self._start()
        try:
            process.stdin.write(b"".join(parts))
            process.stdin.flush()
            (status,) = struct.unpack("<i", self._read(4))
            outputs = [
                np.frombuffer(self._read(buffer.array.nbytes), buffer.array.dtype).reshape(buffer.array.shape)
                for buffer in buffers
                if buffer.flags & WANTED
            ]
        except (BrokenPipeError, EOFError):
            raise Report(self.close()) from None
        return status, outputs

    def _read(self, count: int) -> bytes:
        data, end = bytearray(), time.monotonic() + CALL_S
        while len(data) < count:
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                self._process.kill()
                raise EOFError
            piece = os.read(self._process.stdout.fileno(), count - len(data))
            if not piece:
                raise EOFError
            data += piece
        return bytes(data)

    def close(self) -> str:
        """Ends the program; what it had to say. The next call starts it again."""
        if self._process is None:
            return ""
        try:
            self._process.stdin.close()
        except BrokenPipeError:
            pass
        code = self._process.wait()
        self._process.stdout.close()
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace")
        self._errors.close()
        self._process = None
        return f"{said}\nexit code {code}" + (f" (no answer in {CALL_S} s)" if code == -signal.SIGKILL else "")


# ------------------------------------------------------------------------------------------------- cases


@dataclass(frozen=True)
class Case:
    """One call and all that it must give.

    Attributes:
        name: names the case in a failure.
        function: which of the program's functions (protocol.h, Request.function).
        scalars: ints (int64) and floats (double), in the order in which the program reads them.
        buffers: `given`, `wanted`, `changed` or `ABSENT`.
        expected: one array per `wanted` or `changed` buffer, compared bit by bit (a NaN equals a NaN); None: any bits,
            but the same under every seed.
        status: the Status that the call must return.
    """

    name: str
    function: str
    scalars: Sequence[int | float]
    buffers: Sequence[Buffer]
    expected: Sequence[np.ndarray | None]
    status: int = 0


#: Cases that passed, and the fewest schedules that any of them ran under. conftest.py prints them.
PASSED: list[int] = []


def difference(got: np.ndarray, expected: np.ndarray) -> str | None:
    """None if the same bits, NaNs taken together; else the first differing element."""
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return f"{got.dtype} {list(got.shape)}, expected {expected.dtype} {list(expected.shape)}"
    bits = np.dtype(f"u{got.dtype.itemsize}")
    wrong = np.ascontiguousarray(got).view(bits) != np.ascontiguousarray(expected).view(bits)
    if got.dtype.kind == "f":
        wrong &= ~(np.isnan(got) & np.isnan(expected))
    count = int(wrong.sum())
    if count == 0:
        return None
    at = tuple(int(i) for i in np.argwhere(wrong)[0])
    return f"{count} of {got.size} elements differ, first at {at}: {got[at]!r}, expected {expected[at]!r}"


def run_cases(program: Program, cases: Iterable[Case], seeds: Sequence[int] = SEEDS) -> int:
    """Runs every case under every seed; the number of cases.

    Raises:
        AssertionError: another status, another bit than expected or than under the first seed, or a Report; names
            case, seed and element.
    """
    count = 0
    for case in cases:
        first: list[np.ndarray] = []
        for seed in seeds:
            where = f"{case.name}, seed {seed}"
            try:
                status, outputs = program.call(case.function, case.scalars, case.buffers, seed)
            except Report as report:
                raise AssertionError(f"{where}:\n{report}") from None
            assert status == case.status, f"{where}: Status {status}, expected {case.status}"
            first = first or outputs
            assert len(outputs) == len(case.expected), f"{where}: {len(outputs)} outputs, {len(case.expected)} expected"
            for index, (got, want) in enumerate(zip(outputs, case.expected, strict=True)):
                said = difference(got, first[index] if want is None else want)
                assert said is None, f"{where}, output {index}: {said}"
        PASSED.append(len(seeds))
        count += 1
    return count


def summary() -> str:
    return f"sim: {len(PASSED)} cases x {min(PASSED, default=0)} schedules"


def statuses() -> list[str]:
    """The names of dqk::Status, in order: a case's `status` is an index into them."""
    body = (CSRC / "include" / "dqk" / "status.h").read_text().split("enum class Status : int32_t {")[1].split("}")[0]
    return [line.split("=")[0].strip(" ,") for line in body.splitlines() if line.strip()]
