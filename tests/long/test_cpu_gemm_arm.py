"""The CPU GEMM built for Arm and run in an emulator: `dotprod` and `scalar` against the numpy oracle, bit by bit.

Needs ziglang (pip) for the compiler and qemu-aarch64-static (Debian: qemu-user-static) for the machine; skipped by name
without either. The build has every source of the GEMM, so it also says that all of them compile for Arm;
test_cpu_step_arm.py has the others.
"""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "sim"))

import test_cpu_gemm_sim as cases  # noqa: E402
from harness import Program, run_cases  # noqa: E402

SOURCES = ("gemm", "gemm_dotprod", "gemm_amx", "gemm_scalar", "gemm_avx2", "gemm_avx_vnni", "gemm_avx512_vnni",
           "embedding", "threads", "quantize", "quantize_neon", "quantize_x86", "isa")  # fmt: skip
#: In the order of kEntries (csrc/cpu/gemm.cpp) on Arm, from 1 on.
KERNELS = {"scalar": 1, "dotprod": 2}


def arm_program(folder: Path, host: str, sources) -> Program:
    """tests/sim/`host` with csrc/cpu's `sources`, built for Arm, in the emulator; skips without either."""
    if (shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")) is None:
        pytest.skip("no qemu-aarch64-static on the PATH")
    if importlib.util.find_spec("ziglang") is None:
        pytest.skip("ziglang is not installed")
    command = [sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-linux-musl", "-static", "-std=c++17", "-O2",
               "-DDQK_SIM", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror",
               *(f"-I{ROOT / name}" for name in ("csrc/include", "csrc", "tests/sim")),
               str(ROOT / "tests/sim" / host), *(str(ROOT / f"csrc/cpu/{name}.cpp") for name in sources),
               "-o", str(folder / "program")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return emulated(folder, "max")


def emulated(folder: Path, cpu: str) -> Program:
    """The program of `arm_program` in `folder`, on an emulated `cpu`."""
    wrapper = folder / f"on-{cpu}"
    emulator = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    wrapper.write_text(f'#!/bin/sh\nexec "{emulator}" -cpu {cpu} "{folder / "program"}"\n')
    wrapper.chmod(0o755)
    return Program(wrapper)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    running = arm_program(tmp_path_factory.mktemp("arm"), "gemm_host.cpp", SOURCES)
    yield running
    running.close()


@pytest.fixture(autouse=True)
def numbered(monkeypatch):
    monkeypatch.setattr(cases, "KERNELS", {name: (number, ()) for name, number in KERNELS.items()})


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("form", cases.FORMS)
def test_sums_and_epilogue(program, form, kernel):
    chosen = [{**options, "kernel": kernel} for options in cases.GRID if options["form"] == form]
    assert run_cases(program, map(cases.gemm_case, chosen), cases.SEEDS) >= 12


@pytest.mark.parametrize("kernel", KERNELS)
def test_other_grids(program, kernel):
    cases.test_every_number_of_rows(program, kernel)
    for k, lowest in cases.EXTREMES:
        cases.test_the_largest_sums(program, kernel, k, lowest)


def test_embedding_rows(program):
    chosen = [{**options, "kernel": "dotprod"} for options in cases.covering(cases.EMBEDDING_AXES)]
    assert run_cases(program, map(cases.embedding_case, chosen), cases.SEEDS) >= 10
