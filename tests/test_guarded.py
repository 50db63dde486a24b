"""guarded.py: the pages do what the checks that rely on them need. A fault ends a child process, not this one."""

import json
import mmap
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton_checks_guard
from guarded import guarded_tensor
from test_kernels_triton import subprocess_env

FAULT = -signal.SIGSEGV


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.bool], ids=str)
def test_values_shape_and_address(dtype):
    x = torch.arange(35).reshape(5, 7).to(dtype)
    page = mmap.PAGESIZE
    for at_end in (True, False):
        there = guarded_tensor(x.T, at_end)
        assert torch.equal(there, x.T) and there.is_contiguous() and there.dtype == dtype
        touching = there.data_ptr() + (there.numel() * there.element_size() if at_end else 0)
        assert touching % page == 0
    assert guarded_tensor(x[:0], True).shape == (0, 7)


def test_a_missing_mask_faults():
    """Only at the wall that it runs into: nothing lies after the last element, much lies after the first."""
    pytest.importorskip("triton", reason="triton is not installed")
    program = Path(triton_checks_guard.__file__)
    done = subprocess.run(
        [sys.executable, program, "--trip"],
        env=subprocess_env(TRITON_INTERPRET="1"), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 8
    for name, code in found.items():
        whole = name.startswith("load True, store True")
        assert code == (0 if whole or name.endswith("at end False") else FAULT), (name, code)
