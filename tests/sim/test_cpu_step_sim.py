"""The two ends of a decode step in csrc/cpu under ASan and UBSan, against numpy; a case's seeds are threads."""

import numpy as np
import oracle
import pytest
from harness import ABSENT, Case, changed, given, run_cases, statuses, wanted

TYPES = {"fp32": 0, "fp16": 1, "bf16": 2}
WIDTHS = (1, 15, 17, 1023, 1025, 2050)
STATUS = {name: i for i, name in enumerate(statuses())}


def storage(values: np.ndarray, kind: str) -> np.ndarray:
    """float32 -> what lies in memory."""
    if kind == "fp32":
        return values.astype(np.float32)
    return values.astype(np.float16) if kind == "fp16" else oracle.bfloat16_bits(values)


def rounded(values: np.ndarray, kind: str) -> np.ndarray:
    """float32 -> float32, through the type."""
    raw = storage(values, kind)
    return (raw.astype(np.uint32) << 16).view(np.float32) if kind == "bf16" else raw.astype(np.float32)


@pytest.fixture(scope="module")
def program(sim_program):
    sources = ("isa", "threads", "norm", "norm_scalar", "norm_x86", "quantize", "quantize_x86", "step_ends")
    sources += (
        "decoder_step",
        "embedding",
        "gemm",
        "gemm_scalar",
        "gemm_avx2",
        "gemm_avx_vnni",
        "gemm_avx512_vnni",
        "gemm_amx",
    )
    sources += ("attention", "attention_decode", "attention_scalar", "attention_x86", "cache_write")
    return sim_program("step_host.cpp", *(f"csrc/cpu/{name}.cpp" for name in sources))


@pytest.mark.parametrize("kind", TYPES)
def test_positions(program, kind):
    rng, cases = np.random.default_rng(0), []
    for k in WIDTHS:
        for factor in (1.0, 27.7):
            x, table = (rounded(rng.standard_normal((n, k)).astype(np.float32), kind) for n in (3, 5))
            at = np.array([2, 0, 3], np.int32)
            scaled = x if factor == 1.0 else rounded(x * np.float32(factor), kind)
            buffers = [changed(storage(x, kind)), given(storage(table, kind)), given(at)]
            want = storage(scaled + table[at + 1], kind)
            scalars = (3, k, TYPES[kind], factor, 5, 1)
            cases.append(Case(f"{k} {factor}", "position", scalars, buffers, [want]))
            late = [changed(storage(x, kind)), given(storage(table, kind)), given(at + 1)]
            refused = Case(f"{k} late", "position", scalars, late, [storage(x, kind)], STATUS["bad_id"])
            cases.append(refused)
    assert run_cases(program, cases, (0,)) == len(cases)


@pytest.mark.parametrize("kind", TYPES)
def test_logits(program, kind):
    rng, cases = np.random.default_rng(1), []
    for n in WIDTHS:
        x = rounded(rng.integers(-3, 4, (4, n)).astype(np.float32), kind)  # full of ties
        x[1, n // 2], x[1, n - 1], x[2, 0] = np.nan, np.nan, -np.inf
        for bias in (None, *TYPES):
            added = None if bias is None else rounded(rng.standard_normal(n).astype(np.float32), bias)
            y = x if added is None else x + added
            y = rounded(y, kind) if bias == kind else y
            best = np.argmax(y, axis=1).astype(np.int64)  # of numpy's: the first, and a NaN above all
            buffers = [given(storage(x, kind)), ABSENT if added is None else given(storage(added, bias))]
            buffers += [wanted((4, n), np.float32), wanted(4, np.int64)]
            scalars = (4, n, TYPES[kind], 0 if bias is None else TYPES[bias], int(bias == kind))
            cases.append(Case(f"{n} {bias}", "logits", scalars, buffers, [y, best]))
            cases.append(Case(f"{n} {bias} only", "logits", scalars, [*buffers[:3], ABSENT], [y]))
    assert run_cases(program, cases, (0, 1, 4)) == len(cases)


def test_where_tokens_stand(program):
    tokens, ancestors = np.array([7, 9, 8]), np.full((3, 5), 6, np.int32)
    at = ancestors.copy()
    at[:, 4] = [0, 1, 2]
    small = [wanted(3, np.int64), wanted(3, np.int32), wanted(3, np.int32)]
    want = [tokens, np.full(3, 4, np.int32), np.full(3, 5, np.int32)]
    buffers = [given(tokens), *small, changed(ancestors)]
    cases = [
        Case("last", "place", (3, 5, 4), buffers, [*want, at]),
        Case("no table", "place", (3, 5, 4), [*buffers[:4], ABSENT], want),
        Case("behind", "place", (3, 5, 5), buffers, [None, None, None, ancestors], STATUS["bad_keys"]),
        Case("before", "place", (3, 5, -1), buffers, [None, None, None, ancestors], STATUS["bad_keys"]),
    ]
    assert run_cases(program, cases, (0,)) == len(cases)
