"""Every Triton op with its operands, its results and what its launcher allocates between two unreadable pages.

A masked lane that is touched all the same ends the process. Of no use on a GPU, where compute-sanitizer looks at the
same calls (benchmarks/gpu_lane.py). Run like triton_checks.py; `python tests/triton_checks_guard.py --trip` shows that
a missing mask does fault.
"""

import contextlib
import itertools
import json
import os
import sys
import unittest.mock

import numpy as np
import op_grid
import torch
import triton_checks
from guarded import guarded_tensor
from triton_checks import assert_same
from triton_checks_gemm import memory_from

CHECKS = {}
SHAPE, DTYPE = (5, 17, 129), torch.float16


def check(function):
    CHECKS[function.__name__] = function
    return function


@contextlib.contextmanager
def launchers_between_pages(place):
    zeros = torch.zeros
    with memory_from(place), unittest.mock.patch.object(torch, "zeros", lambda *s, **facts: place(zeros(*s, **facts))):
        yield


@check
def guard_pages_every_op(device):
    """No fault, and the bits of the same call on ordinary memory."""
    if device != "cpu":
        return
    for sample in op_grid.samples(*SHAPE, dtype=DTYPE):
        want = sample.run("triton")
        for at_end in (True, False):

            def place(tensor, at_end=at_end):
                return guarded_tensor(tensor, at_end)

            there = sample.placed(place)
            with launchers_between_pages(place):
                got = there.run("triton")
            for i, (mine, plain) in enumerate(zip(got, want, strict=True)):
                assert_same(mine, plain, f"{sample.name}, at_end {at_end}, result {i}")


def trip():
    """{"masked": 0, ...}: the signal that ended a copy of 100 elements in blocks of 128 with a mask left out."""
    from triton_twins import copy_kernel

    def copy(at_end, mask_load, mask_store):
        x, y = (guarded_tensor(torch.ones(100, dtype=torch.int8), at_end) for _ in range(2))
        copy_kernel[(1,)](x, y, 100, BLOCK=128, MASK_LOAD=mask_load, MASK_STORE=mask_store)
        os._exit(0 if y.all() else 1)

    outcome = {}
    for mask_load, mask_store, at_end in itertools.product((True, False), (True, False), (True, False)):
        child = os.fork()
        if not child:
            with np.errstate(all="ignore"):
                copy(at_end, mask_load, mask_store)
        name = f"load {mask_load}, store {mask_store}, at end {at_end}"
        outcome[name] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps(outcome))


if __name__ == "__main__":
    if sys.argv[1:] == ["--trip"]:
        trip()
    else:
        triton_checks.main(CHECKS)
