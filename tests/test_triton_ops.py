"""The ops on Triton kernels as torch sees them: opcheck, torch.compile, report. Every op forced there, interpreted.

TRITON_INTERPRET must be set before Triton is imported, so the tests of test_ops and test_compile run again in a process
of their own, with DQKERNELS_BACKEND=triton: a backend that lacks an op, or a width of it, would be an error.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_kernels_triton import subprocess_env

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def _triton():
    pytest.importorskip("triton", reason="triton is not installed")


def on_triton(*command, **variables):
    environment = subprocess_env(TRITON_INTERPRET="1", DQKERNELS_BACKEND="triton", **variables)
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, cwd=HERE.parent)


@pytest.mark.parametrize(
    "file, names, least",
    [
        ("test_ops.py", "test_opcheck", 10),
        ("test_compile.py", "encoder_layer or gradients", 4),
        ("test_kv_cache.py", "opcheck or compiled or token_by_token", 3),
    ],
)
def test_torch_takes_them(file, names, least):
    variables = {"TEST_OPCHECK_SAMPLES": "2"}
    done = on_triton("-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / file), "-k", names, **variables)
    found = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0 and found, done.stdout[-6000:] + done.stderr[-2000:]
    assert int(found[1]) >= least and "failed" not in done.stdout


def test_report_and_info_name_them():
    program = (
        "import torch, dqkernels\n"
        "model = dqkernels.quantize_(torch.nn.Sequential(torch.nn.Linear(64, 32)), dqkernels.DQConfig(weight_bits=4))\n"
        "print(dqkernels.report(model))\n"
        "print(dqkernels.info())\n"
    )
    done = on_triton("-c", program)
    assert done.returncode == 0, done.stderr
    assert "Runs on triton (forced by DQKERNELS_BACKEND=triton): every packed linear" in done.stdout
    assert re.search(r"^triton on cpu +yes: Triton's interpreter", done.stdout, re.M)
    assert re.search(r"^triton tiles +by rule: only GPUs", done.stdout, re.M)
