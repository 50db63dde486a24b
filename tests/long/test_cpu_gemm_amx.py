"""The GEMM on AMX tiles, on a processor that has them: until this ran somewhere, nobody takes it unasked (isa.cpp)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dqkernels.kernels import native

TESTS = Path(__file__).resolve().parents[1]
HAS = native.native() is not None and "amx_int8" in native.native().cpu_isas()


@pytest.mark.skipif(not HAS, reason="no compiled core, or no AMX that this kernel grants")
def test_the_checks_of_the_gemm():
    """tests/native_gemm_checks.py as a program: guard pages, the oracle's bits, threads, a forked child."""
    env = {**os.environ, "DQKERNELS_CPU": "amx_int8", "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    command = [sys.executable, str(TESTS / "native_gemm_checks.py"), native.native().__file__]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["kernel"] == "amx_int8"
