"""What csrc/cpu has for Arm besides the GEMM (test_cpu_gemm_sim.py): attention over keys and over caches, the writer of
the caches, the quantizer of rows, LayerNorm and GELU. Their sources run over modelled instructions (neon_model.h) under
ASan and UBSan, bit by bit against the plain loops; tests/long/test_cpu_step_arm.py runs the same cases as Arm code.
"""

import itertools

import numpy as np
import pytest
import test_cpu_vnni_sim as cases
from harness import ABSENT, Case, given, wanted
from test_cpu_vnni_sim import INF, NAN, TYPES, as_scalar, storage

ISA = "dotprod"
#: The sources that the host program needs, and those of the set.
SHARED = ("attention", "attention_decode", "attention_scalar", "cache_write", "norm", "norm_scalar", "quantize",
          "threads")  # fmt: skip
NEON = ("attention_neon", "norm_neon", "quantize_neon")
X86 = ("attention_x86", "norm_x86", "quantize_x86")


@pytest.fixture(scope="module")
def programs(sim_program):
    """{"scalar": ..., "dotprod": ...}: one program, which chooses its set when it starts."""
    sources = tuple(f"csrc/cpu/{name}.cpp" for name in (*SHARED, *NEON, *X86))
    sources = ("cpu_attention_host.cpp", "isa_model.cpp", *sources)
    return {isa: sim_program(*sources, flags=("-DDQK_NEON_MODEL=",), DQKERNELS_CPU=isa) for isa in ("scalar", ISA)}


def loops_of(program):
    """Which of attention, quantizer and norms run loops other than the plain ones."""
    return program.call("loops", [], [wanted(3, np.uint8)], 0)[1][0].tolist()


def test_which_loops_run(programs):
    """The bits of both are the same: only this says that the set has loops of its own."""
    assert (loops_of(programs[ISA]), loops_of(programs["scalar"])) == ([1, 1, 1], [0, 0, 0])


@pytest.mark.parametrize(("make", "count"), [("prefill_cases", 34), ("decode_cases", 27), ("write_cases", 18)])
def test_attention(programs, make, count):
    assert as_scalar(programs, ISA, getattr(cases, make)()) == count


def test_the_quantizer_of_rows(programs):
    cases.test_the_quantizer_of_rows(programs, ISA)


#: Shares of one query that fill 16 bits to the brim: keys whose scores are all the same have the share 127.
BRIM = ((1, 16), (2, 16), (3, 64), (5, 80), (300, 33))


def brim_cases():
    """Every product as large as it can be, of either sign: what is kept in 16 bits must be widened in time. The caches
    are full, so nothing may be read behind their last row."""
    for (keys, head_dim), code in itertools.product(BRIM, (-128, 127)):
        codes = [np.full((1, 1, keys, head_dim), code, np.int8) for _ in "kv"]
        codes[1][..., ::3] = -128
        scales = [np.full((1, 1, keys), 2.0**-7, np.float32) for _ in "kv"]
        q = np.ones((1, 1, 1, head_dim), np.float32)
        scalars = [TYPES["fp32"], 1, 1, 1, keys, head_dim, 0, 1.0, 0, 0.0, 1, 0]
        buffers = [given(q), given(codes[0]), given(scales[0]), given(codes[1]), given(scales[1]),
                   given(np.array([keys], np.int32)), ABSENT, ABSENT, wanted(q.shape, np.float32)]  # fmt: skip
        yield Case(f"{keys} keys of {code}, {head_dim}", "decode", scalars, buffers, [])


def test_the_largest_sums_over_values(programs):
    assert as_scalar(programs, ISA, brim_cases()) == 2 * len(BRIM)


#: Whole vectors, what they leave over, and more than one lane of each sum.
WIDTHS = (1, 3, 7, 8, 9, 15, 16, 17, 40, 64, 769)
MODES = (0, 1, 2)  # per_token, per_tensor, static


def rows_of(rng, k, kind):
    """An ordinary row; one far from 0; one whose sum, in double too, depends on the order of its terms, which is that
    of the lanes; one of a single value, one with a NaN, one with an infinity."""
    x = rng.standard_normal((6, k)).astype(np.float32) * 3
    x[1] += 100
    if kind != "fp16":  # which holds no such number
        x[2, ::3], x[2, 1::3] = 1e30, -1e30
    x[3] = 1.5
    x[4, k // 2], x[5, k - 1] = NAN, INF
    return storage(x, kind)


def norm_cases():
    options = itertools.cycle(itertools.product(MODES, (None, *TYPES), TYPES, (None, *TYPES), (0.0, 2.5)))
    for i, (k, kind) in enumerate(itertools.product(WIDTHS, TYPES)):
        for _ in range(1 + i % 7):  # not in step with the options
            mode, residual, weight, bias, clip = next(options)
        rng = np.random.default_rng(i)
        x = rows_of(rng, k, kind)
        if mode == 1:
            x = x[:4]  # a NaN in a tensor leaves no code
        other = None if residual is None else storage(rng.standard_normal(x.shape).astype(np.float32), residual)
        parameters = [rng.standard_normal(k).astype(np.float32) for _ in "wb"]
        scalars = [TYPES[kind], len(x), k, mode, clip, 0.02, TYPES[residual or "fp32"], TYPES[weight],
                   TYPES[bias or "fp32"], 1e-5]  # fmt: skip
        buffers = [given(x), ABSENT if other is None else given(other), given(storage(parameters[0], weight)),
                   ABSENT if bias is None else given(storage(parameters[1], bias)), wanted(x.shape, x.dtype),
                   wanted(x.shape, np.int8), wanted(len(x), np.float32), wanted(len(x), np.int32)]  # fmt: skip
        yield Case(f"{k} {kind}, mode {mode}, {residual} {weight} {bias}", "norm", scalars, buffers, [])


def test_layer_norm(programs):
    assert as_scalar(programs, ISA, norm_cases()) == len(WIDTHS) * len(TYPES)


def gelu_cases():
    for i, (k, kind, mode) in enumerate(itertools.product(WIDTHS, TYPES, MODES)):
        x = rows_of(np.random.default_rng(i), k, kind)
        x = x[:4] if mode == 1 else x
        buffers = [given(x), wanted(x.shape, np.int8), wanted(len(x), np.float32), wanted(len(x), np.int32)]
        yield Case(f"{k} {kind}, mode {mode}", "gelu", [TYPES[kind], len(x), k, mode, 0.0, 0.02], buffers, [])


def test_gelu(programs):
    assert as_scalar(programs, ISA, gelu_cases()) == len(WIDTHS) * len(TYPES) * len(MODES)
