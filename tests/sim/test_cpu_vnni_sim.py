"""What csrc/cpu has for AVX-VNNI and AVX512-VNNI besides the GEMM (test_cpu_gemm_sim.py): attention over keys and over
caches, the writer of the caches and the quantizer of rows. Their sources run over modelled instructions
(avx512_model.h) under ASan and UBSan, bit by bit against the plain loops, which test_cpu_attention.py holds to the
oracle; and the model itself against plain loops, AVX2, and AVX-512 where there is one.
"""

import itertools
import subprocess
import zlib

import harness
import numpy as np
import oracle
import pytest
import test_quantize
import torch
from cpu_attention_checks import SHAPES
from harness import ABSENT, Case, changed, given, run_cases, wanted

from dqkernels import qmath

#: The sets that run on the model. amx_int8 has the attention and the quantizer of avx512_vnni.
SETS = ("avx_vnni", "avx512_vnni")
TYPES = {"fp32": 0, "fp16": 1, "bf16": 2}
NAN, INF = np.float32("nan"), np.float32("inf")
#: Threads less one.
SEEDS = (0, 2)


@pytest.fixture(scope="module")
def programs(sim_program):
    """{instruction set: the program that has chosen it}; needs AVX2."""
    reason = harness.missing()
    if reason is None and " avx2 " not in open("/proc/cpuinfo").read():
        reason = "this processor has no AVX2, which the model is made of"
    if reason is not None:
        pytest.skip(reason)
    sources = ("cpu_attention_host.cpp", "isa_model.cpp", "attention_x86_model.cpp", "quantize_x86_model.cpp")
    others = ("attention", "attention_decode", "attention_scalar", "cache_write", "quantize", "threads")
    others += ("norm", "norm_scalar", "norm_x86")
    sources += tuple(f"csrc/cpu/{name}.cpp" for name in others)
    return {isa: sim_program(*sources, DQKERNELS_CPU=isa) for isa in ("scalar", *SETS)}


# ------------------------------------------------------------------------------------------- the model itself


def self_test(source):
    reason = harness.missing()
    if reason is not None:
        pytest.skip(reason)
    done = subprocess.run([str(harness.build([source]))], capture_output=True, text=True, timeout=300, check=False)
    return done.returncode, done.stdout + done.stderr


def test_every_modelled_instruction_is_what_it_models():
    code, said = self_test(harness.HERE / "avx512_self_test.cpp")
    assert code == 0, said
    assert said.count("ok ") >= 27 and said.endswith("\n0 failures\n"), said


#: The nearest mistakes: a dot product with both bytes signed, the other of two zeros, a NaN that stays signalling, the
#: wrong byte of a word.
MISTAKES = {
    "dpbusd_epi32": ("sum += ((x >> bit) & 0xFFu) * (", "sum += ((((x >> bit) & 0xFFu) ^ 0x80u) - 0x80u) * ("),
    "min_ps": ("const auto less = x < y;", "const auto less = x <= y;"),
    "cvtph_ps": ("(fraction != 0 ? 0x00400000u : 0u)", "0u"),
    "masks": ("[i] = v.bytes[4 * i];", "[i] = v.bytes[4 * i + 1];"),
}


def test_the_self_test_fails_where_the_model_does(tmp_path):
    text = (harness.HERE / "avx512_model.h").read_text()
    for right, wrong in MISTAKES.values():
        assert text.count(right) == 1
        text = text.replace(right, wrong)
    (tmp_path / "avx512_model.h").write_text(text)
    source = tmp_path / "avx512_self_test.cpp"
    source.write_text((harness.HERE / "avx512_self_test.cpp").read_text())
    code, said = self_test(source)
    assert code == 1 and all(f"FAILED {name} against " in said for name in MISTAKES), said
    assert said.count("FAILED") <= len(MISTAKES) + 1, said  # the dot product of 256 bits is the same template


# --------------------------------------------------------------------------------------------------- attention


def storage(values, kind):
    """float32 -> what lies in memory; 1e30 is an infinite half."""
    if kind == "fp32":
        return values.astype(np.float32)
    with np.errstate(over="ignore"):
        return values.astype(np.float16) if kind == "fp16" else oracle.bfloat16_bits(values)


def as_scalar(programs, isa, cases):
    """Every case on `isa` gives the bits that the plain loops give, which are not all zeros."""

    def expected():
        for case in cases:
            status, outputs = programs["scalar"].call(case.function, case.scalars, case.buffers, 0)
            assert status == 0, case.name
            yield Case(f"{isa} {case.name}", case.function, case.scalars, case.buffers, outputs)

    name = programs[isa].call("name", [], [wanted(16, np.uint8)], 0)[1][0].tobytes().rstrip(b"\0").decode()
    assert name == isa
    return run_cases(programs[isa], expected(), SEEDS)


def prefill_cases():
    """The shapes of cpu_attention_checks.py; masks, biases, causal, types, granularity and clip dealt around."""
    rest = list(itertools.product((None, "keys", "full"), (False, True), (False, True), (0, 1), (0.0, 1.5), TYPES))
    for i, (batch, heads, queries, keys, head_dim) in enumerate(SHAPES):
        for turn in range(2):
            options = rest[(i * 31 + turn * 71) % len(rest)]
            mask_of, biased, causal, mode, clip, kind = options
            rng = np.random.default_rng(i)
            q = rng.standard_normal((batch, heads, queries, head_dim), np.float32)
            k, v = (rng.standard_normal((batch, heads, keys, head_dim), np.float32) for _ in "kv")
            v *= np.exp(rng.standard_normal((batch, heads, keys, 1), np.float32))
            if turn == 1 and queries > 2:
                q[0, 0, 1, 0], k[0, 0, keys // 2, 0], v[0, 0, keys - 1] = NAN, 1e30, 0.0
            mask, pairs = None, (batch, heads, queries, keys)
            if mask_of is not None:
                shape = (batch, 1, 1, keys) if mask_of == "keys" else pairs
                mask = np.broadcast_to(rng.random(shape) < 0.7, pairs).astype(np.uint8)
            bias = rng.standard_normal(pairs, np.float32) if biased else None
            scalars = [TYPES[kind], batch, heads, queries, keys, head_dim, int(causal), head_dim**-0.5, mode, clip]
            buffers = [*(given(storage(x, kind)) for x in (q, k, v)), *(ABSENT if x is None else given(x)
                       for x in (mask, bias)), wanted(q.shape, storage(q[:0], kind).dtype)]  # fmt: skip
            yield Case(f"{q.shape} on {keys} keys, {options}", "prefill", scalars, buffers, [])


@pytest.mark.parametrize("isa", SETS)
def test_attention_over_keys(programs, isa):
    assert as_scalar(programs, isa, prefill_cases()) == 2 * len(SHAPES)


#: Rows, heads, queries, keys, head_dim: as in cpu_attention_checks_decode.py.
STEPS = (
    (1, 1, 1, 1, 64), (3, 2, 1, 70, 40), (2, 1, 3, 64, 128), (2, 3, 2, 65, 32), (1, 2, 17, 20, 80), (2, 1, 1, 300, 33),
    (1, 1, 2, 40, 1040), (2, 2, 4, 29, 7), (1, 1, 1, 2000, 24),
)  # fmt: skip


def decode_cases():
    """Caches of any bytes, -128 among them, rubbish behind the last key; own caches, shared ones, a source per key."""
    for i, ((rows, heads, queries, keys, head_dim), kind) in enumerate(itertools.product(STEPS, TYPES)):
        rng = np.random.default_rng(i)
        capacity, causal, turn = keys + 9, i % 2 == 0, i % 3
        q = rng.standard_normal((rows, heads, queries, head_dim), np.float32) * 3
        codes = [rng.integers(-128, 128, (rows, heads, capacity, head_dim)).astype(np.int8) for _ in "kv"]
        scales = [rng.random((rows, heads, capacity), np.float32) * 0.02 + 1e-3 for _ in "kv"]
        lengths = np.array([keys, *rng.integers(0, keys + 1, rows - 1)], np.int32)
        for scale in scales:
            scale[..., keys:] = NAN
        if i % 4 == 1:
            scales[1][0, 0, 0] = INF
        source = {0: None, 1: rng.integers(0, rows, rows), 2: rng.integers(0, rows, (rows, capacity))}[turn]
        source = None if source is None else source.astype(np.int32)
        bias = rng.standard_normal((rows, heads, queries, capacity), np.float32) if i % 2 else None
        scalars = [TYPES[kind], rows, heads, queries, capacity, head_dim, int(causal), head_dim**-0.5, 0,
                   2.5 if i % 5 == 0 else 0.0, rows, int(turn == 2)]  # fmt: skip
        buffers = [given(storage(q, kind)), given(codes[0]), given(scales[0]), given(codes[1]), given(scales[1]),
                   given(lengths), *(ABSENT if x is None else given(x) for x in (source, bias)),
                   wanted(q.shape, storage(q[:0], kind).dtype)]  # fmt: skip
        yield Case(f"{q.shape}, lengths {lengths}, {kind}", "decode", scalars, buffers, [])


@pytest.mark.parametrize("isa", SETS)
def test_attention_over_caches(programs, isa):
    assert as_scalar(programs, isa, decode_cases()) == len(STEPS) * len(TYPES)


def write_cases():
    for i, (head_dim, kind) in enumerate(itertools.product((1, 7, 16, 33, 64, 80), TYPES)):
        rng = np.random.default_rng(i)
        rows, heads, tokens, capacity = 2, 2, 1 + i % 3, 6
        fresh = [rng.standard_normal((rows, heads, tokens, head_dim), np.float32) for _ in "kv"]
        fresh[i % 2][0, 0, 0, -1] = (NAN, INF, 0.0)[i % 3]
        cache = [np.full((rows, heads, capacity, head_dim), 99, np.int8) for _ in "kv"]
        scales = [np.full((rows, heads, capacity), 9, np.float32) for _ in "kv"]
        buffers = [*(given(storage(x, kind)) for x in fresh), given(np.array([0, 3], np.int32)), changed(cache[0]),
                   changed(scales[0]), changed(cache[1]), changed(scales[1])]  # fmt: skip
        scalars = [TYPES[kind], rows, heads, tokens, capacity, head_dim, 2.5 if i % 4 == 0 else 0.0]
        yield Case(f"{head_dim} {kind}", "write", scalars, buffers, [])


@pytest.mark.parametrize("isa", SETS)
def test_the_writer_of_caches(programs, isa):
    assert as_scalar(programs, isa, write_cases()) == 18


@pytest.mark.parametrize("isa", SETS)
def test_the_quantizer_of_rows(programs, isa):
    """The grid of test_quantize.py against qmath, and rows of every length up to two vectors and beyond."""
    assert run_cases(programs[isa], map(test_quantize.quantize_case, test_quantize.GRID), (0,)) >= 60
    rng = np.random.default_rng(zlib.crc32(isa.encode()))

    def rows():
        for k, (kind, code) in itertools.product((*range(1, 34), 47, 48, 49, 769), TYPES.items()):
            raw = storage(rng.standard_normal((2, k)).astype(np.float32) * 4, kind)
            dtype = test_quantize.DTYPES[kind][1]
            want = qmath.quantize_activation(torch_of(raw, dtype), "per_token", 2.5, None, True)
            yield Case(f"{kind} {k}", "quantize", [2, k, k, code, 0, 2.5, 0.0],
                       [given(raw), wanted((2, k), np.int8), wanted(2, np.float32), wanted(2, np.int32), ABSENT],
                       [x.numpy() for x in want])  # fmt: skip

    assert run_cases(programs[isa], rows(), (0,)) == 37 * 3


def torch_of(raw, dtype):
    return torch.from_numpy(raw.view({2: np.int16, 4: np.int32}[raw.itemsize])).view(dtype)
