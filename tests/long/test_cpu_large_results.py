"""Whole results of the CPU kernels past 2^31 elements, up to their last row.

Operands are sparse mappings of zeros, as in test_cpu_large.py. Results are computed in full, so that the mapping that
takes them lays the same memory under all that nobody looks at: only its two ends are pages of their own.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the shared checks
import native_calls  # noqa: E402
from compare import assert_equal  # noqa: E402
from test_cpu_large import random, sparse  # noqa: E402

from dqkernels.kernels import cpu_norm, native  # noqa: E402

pytestmark = [
    pytest.mark.skipif(native.native() is None, reason=native.why_absent() or "present"),
    pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="memory is laid under a mapping by Linux's calls"),
]

MOST = 2**31
END = 64 << 20  # bytes of either end, and of the memory between them
MAP_FIXED = 0x10


def folded(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Memory [count] of which the first and the last END bytes hold what is written there."""
    whole = sparse(count, dtype)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64)
    file = os.memfd_create("folded")
    try:
        os.ftruncate(file, END)
        first, last = whole.data_ptr() + END, whole.data_ptr() + whole.nbytes - 2 * END
        for at in range(first, last, END):
            found = libc.mmap(at, END, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | MAP_FIXED, file, 0)
            assert found == at, os.strerror(ctypes.get_errno())
    finally:
        os.close(file)
    return whole


def rows_of(k: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros [rows, k] of more than 2^31 elements, but for the first row and the last two."""
    x = sparse((MOST // k + 2) * k, dtype).view(-1, k)
    x[0], x[-2:] = random(k, seed=1, dtype=dtype), random(2, k, seed=2, dtype=dtype)
    return x


def ends(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x[:1], x[-2:]])


def room(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For the codes of x, their scales and sums."""
    count = x.shape[0]
    return folded(x.numel(), torch.int8).view(x.shape), torch.empty(count), torch.empty(count, dtype=torch.int32)


def test_a_norm_and_its_codes():
    x = rows_of(4096, torch.bfloat16)
    count, k = x.shape
    y, codes, weight = folded(x.numel(), x.dtype).view(x.shape), room(x), torch.ones(k)
    native.native().norm_quantize(
        (x.data_ptr(), 2, k), None, (weight.data_ptr(), 0, 0), None, 1e-5, y.data_ptr(), count, k,
        (native.MODES["per_token"], 0.0, 0.0, *(t.data_ptr() for t in codes)), torch.get_num_threads(),
    )  # fmt: skip
    want = cpu_norm.layernorm_quantize(ends(x), None, weight, None, 1e-5, "per_token", None, None, True)
    for name, mine, theirs in zip(("y", "q", "scale", "row_sum"), (y, *codes), want, strict=True):
        assert_equal(ends(mine), theirs, name)


def test_the_codes_of_gelu():
    x = rows_of(4096, torch.bfloat16)
    codes = room(x)
    native.native().gelu_quantize(
        (x.data_ptr(), 2, x.shape[1]), *x.shape,
        (native.MODES["per_token"], 0.0, 0.0, *(t.data_ptr() for t in codes)), torch.get_num_threads(),
    )  # fmt: skip
    want = cpu_norm.gelu_quantize(ends(x), "per_token", None, None, True)
    for name, mine, theirs in zip(("q", "scale", "row_sum"), codes, want, strict=True):
        assert_equal(ends(mine), theirs, name)


def test_positions_of_many_rows():
    k = 1024
    x, table = folded((MOST // k + 2) * k, torch.bfloat16).view(-1, k), random(4, k, seed=3, dtype=torch.bfloat16)
    x[-2:] = random(2, k, seed=2, dtype=torch.bfloat16)
    want, positions = x[-2:] + table[2:], torch.zeros(x.shape[0], dtype=torch.int32)
    positions[-2:] = torch.tensor([1, 2])
    native.native().add_position(
        x=x.data_ptr(), dtype=2, rows=x.shape[0], k=k, factor=1.0, table=table.data_ptr(), table_rows=4,
        position=positions.data_ptr(), offset=1,
    )  # fmt: skip
    assert_equal(x[-2:], want, "the last rows")
    assert_equal(x[:1], table[1:2], "the first row")


def test_logits_that_become_fp32():
    """And get a bias: their sum is written elsewhere."""
    x = rows_of(2**20, torch.bfloat16)
    count, n = x.shape
    y, best, bias = folded(x.numel(), torch.float32).view(x.shape), torch.zeros(count, dtype=torch.int64), random(n)
    native.native().finish_logits(
        x=x.data_ptr(), dtype=2, rows=count, n=n, bias=bias.data_ptr(), bias_dtype=0, rounded=False, y=y.data_ptr(),
        best=best.data_ptr(), threads=torch.get_num_threads(),
    )  # fmt: skip
    want = ends(x).float() + bias
    assert_equal(ends(y), want, "sums")
    assert torch.equal(best[[0, -2, -1]], want.argmax(-1))


def test_an_encoder_layer():
    """Four tokens a sequence: the last sequences are those of a call that has no others."""
    tokens, width = 4, 64
    layer = native_calls.encoder_layer(width, 16, torch.bfloat16)
    batch = MOST // (tokens * width) + 2
    x = sparse(batch * tokens * width, torch.bfloat16).view(batch, tokens, width)
    y = folded(x.numel(), x.dtype).view(x.shape)
    for where, seed in ((slice(0, 2), 1), (slice(-2, None), 2)):
        x[where] = random(2, tokens, width, seed=seed, dtype=x.dtype)
    layer._core.run(x.data_ptr(), y.data_ptr(), batch, tokens, None, None, torch.get_num_threads())
    for where in (slice(0, 2), slice(-2, None)):
        assert_equal(y[where], layer(x[where], None), f"sequences {where}")
