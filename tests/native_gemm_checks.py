"""The CPU GEMM and embedding of the built core against the numpy oracle, every operand between unreadable pages.

`python tests/native_gemm_checks.py <path of _C>` runs all checks, without torch: then the core's threads are its own.
test_cpu_gemm.py starts it as a program, once per instruction set.
"""

import itertools
import json
import os
import sys
import threading

import numpy as np
import oracle
from guarded import guarded
from native_checks import load

FORMS = ((8, False, 0), (4, False, 0), (2, False, 0), (2, True, 0), (4, False, 32), (4, False, 128), (2, True, 32))
FP32, INT8 = 0, 3


def linear(core, rng, form, m, n, k, at_end, threads=1):
    """One call on codes, between guard pages; returns y and what it must be."""
    bits, four_level, group = form
    low, high = -(1 << (bits - 1)), 1 << (bits - 1)
    weight = rng.integers(low + (bits == 8), high, (n, k))
    q = rng.integers(-127, 128, (m, k)).astype(np.int8)
    scale, act_scale = (rng.random(count).astype(np.float32) * 0.01 + 1e-3 for count in (n, m))
    bias, residual = rng.standard_normal(n).astype(np.float32), rng.standard_normal((m, n)).astype(np.float32)
    mult = None
    if group:
        mult = rng.integers(1, oracle.mult_max(bits, four_level, k) + 1, (n, -(-k // group))).astype(np.uint8)
    operands = [q, act_scale, oracle.pack_fast(weight, bits), scale, mult, bias, residual, np.zeros((m, n), np.float32)]
    held = [None if each is None else guarded(each, at_end) for each in operands]
    pointers = [0 if each is None else each.ctypes.data for each in held]
    plan = core.CpuPlan(
        k=k, x_dtype=INT8, mode=0, clip=0.0, bits=bits, four_level=four_level, group_size=group, activation=1,
        y_dtype=FP32, n=[n], tensor_scale=[False], bias_dtype=[FP32], residual_dtype=[FP32],
    )  # fmt: skip
    plan.run(m, k, pointers[0], pointers[1], 0.0, threads, [tuple(pointers[2:])])
    acc = oracle.accumulate(q.astype(np.int64), weight, mult, four_level, group)
    return held[-1], oracle.epilogue(acc, act_scale, scale, bias, residual, "relu")


def check_guard_pages(core):
    rng, checked = np.random.default_rng(0), 0
    shapes = [
        (1, 1, 1),
        (1, 5, 33),
        (2, 3, 31),
        (3, 17, 129),
        (5, 33, 64),
        (17, 4, 300),
        (33, 5, 300),
        (1, 40, 257),
        (4, 7, 4097),
    ]
    for form, (m, n, k), at_end in itertools.product(FORMS, shapes, (True, False)):
        y, want = linear(core, rng, form, m, n, k, at_end)
        np.testing.assert_array_equal(y, want, f"{form} {m}x{n}x{k}")
        checked += 1
    return checked


def check_embedding_guard_pages(core):
    rng, checked = np.random.default_rng(1), 0
    for form, (rows, k), at_end in itertools.product(FORMS, [(1, 1), (3, 31), (17, 129), (5, 300)], (True, False)):
        bits, four_level, group = form
        codes = rng.integers(-(1 << (bits - 1)) + (bits == 8), 1 << (bits - 1), (rows, k))
        scale, ids = rng.random(rows).astype(np.float32), rng.permutation(rows).astype(np.int64)
        mult = rng.integers(1, 128, (rows, -(-k // group))).astype(np.uint8) if group else None
        position = rng.standard_normal((rows, k)).astype(np.float32)
        operands = [ids, oracle.pack_fast(codes, bits), scale, mult, position, np.zeros((rows, k), np.float32)]
        held = [None if each is None else guarded(each, at_end) for each in operands]
        ids_, packed_, scale_, mult_, position_, y_ = (0 if each is None else each.ctypes.data for each in held)
        core.cpu_embedding(
            ids=ids_, ids32=False, count=rows, qweight=packed_, weight_scale=scale_, tensor_scale=False,
            group_mult=mult_, rows=rows, k=k, bits=bits, four_level=four_level, group_size=group, embed_scale=1.5,
            position=position_, position_dtype=FP32, position_stride=k, y=y_, y_dtype=FP32, threads=1,
        )  # fmt: skip
        want = oracle.qembedding(
            ids, codes, scale, mult, four_level=four_level, group_size=group or -1, embed_scale=1.5, position=position,
            dtype="float32",
        )  # fmt: skip
        np.testing.assert_array_equal(held[-1], want, f"{form} {rows}x{k}")
        checked += 1
    return checked


#: Large enough to be shared among threads.
LARGE = (40, 700, 300)


def check_threads(core):
    """The core's own pool: any number of threads, and eight callers at once, of whom it serves one at a time."""
    assert core.cpu_threads() == "own pool"
    for form, threads in itertools.product(FORMS, (2, 3, 8)):
        y, want = linear(core, np.random.default_rng(2), form, *LARGE, True, threads)
        np.testing.assert_array_equal(y, want, f"{form} {threads} threads")
    barrier, wrong = threading.Barrier(8), []

    def work(seed):
        barrier.wait()
        for _ in range(5):
            y, want = linear(core, np.random.default_rng(seed), FORMS[seed % len(FORMS)], *LARGE, True, 4)
            if not np.array_equal(y, want):
                wrong.append(seed)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong, wrong
    return len(workers)


def check_fork(core):
    """A child has none of its parent's threads; it gets new ones."""
    linear(core, np.random.default_rng(3), FORMS[0], *LARGE, True, 3)
    child = os.fork()
    if child == 0:
        y, want = linear(core, np.random.default_rng(3), FORMS[0], *LARGE, True, 3)
        os._exit(0 if np.array_equal(y, want) else 1)
    assert os.waitpid(child, 0)[1] == 0
    return 1


def check_multiply_loop(core):
    """The loop of bench cpu, on registers full of ones: its sum is the number of products, of whole blocks."""
    if core.multiply_instruction() is None:
        return 1  # scalar, AMX and Arm have none
    block = core.multiply_bytes(1, 1)
    assert block in (32 * 1024 * 12, 64 * 1024 * 12)
    for products, threads in itertools.product((block, 3 * block - 1, 3 * block), (1, 2, 3)):
        assert core.multiply_bytes(products, threads) == -(-products // block) * block
    return 9


CHECKS = (check_guard_pages, check_embedding_guard_pages, check_threads, check_fork, check_multiply_loop)

if __name__ == "__main__":
    the_core = load(sys.argv[1])
    counts = {check.__name__: check(the_core) for check in CHECKS}
    print(json.dumps({"isa": the_core.cpu_isa(), "kernel": the_core.cpu_gemm_kernel(), **counts}))
