"""The native core against oracles written here in numpy, with the instruction set that DQKERNELS_CPU names.

`python tests/native_checks.py <path of _C>` runs all checks, without torch. test_native.py starts it as a
program: the instruction set is chosen once per process, and a read past an operand ends in a fault that must
not take pytest along.
"""

import importlib.util
import itertools
import json
import sys

import numpy as np
from guarded import guarded

PER_TOKEN, PER_TENSOR, STATIC = 0, 1, 2
FP32, FP16, BF16 = 0, 1, 2
BITS = (2, 4, 8)
# K around the vector widths 8, 16 and 32, the packing block 128, and one model width.
WIDTHS = (1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 127, 128, 129, 200, 768)
POISON = 0xA5  # outputs start as this, so that an element left unwritten shows

# ------------------------------------------------------------------------------------------------ the oracles


def pack_oracle(codes, bits):
    """Byte by byte from the sentence in docs/design.md section 4."""
    n, k = codes.shape
    planes = 8 // bits
    run = 128 // planes
    packed = np.zeros((-(-n // 16) * 16, -(-k // 128) * run), np.uint8)
    for column in range(k):
        block, inside = divmod(column, 128)
        plane, byte = divmod(inside, run)
        field = (codes[:, column].astype(np.int64) % 2**bits) << (bits * plane)
        packed[:n, block * run + byte] |= field.astype(np.uint8)
    return packed


def widen(raw, dtype):
    """Storage (float32, or the bits of a 16-bit float) -> the same numbers as float32."""
    if dtype == FP32:
        return raw
    return raw.view(np.float16).astype(np.float32) if dtype == FP16 else (raw.astype(np.uint32) << 16).view(np.float32)


def narrow(values, dtype):
    """float32 -> storage, by truncation for bfloat16: any representable input will do."""
    if dtype == FP32:
        return values.astype(np.float32)
    with np.errstate(over="ignore"):
        half = values.astype(np.float16).view(np.uint16)
    return half if dtype == FP16 else (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def quantize_oracle(x, mode, clip, act_scale):
    """docs/design.md section 3 in float64, each product or quotient then rounded once to float32: exact."""
    with np.errstate(invalid="ignore"):  # signalling NaNs among the 16-bit patterns
        rows = x.astype(np.float64)
    finite = np.isfinite(rows).all(axis=1)
    if mode == PER_TENSOR:
        finite[:] = finite.all()
    rows[~finite] = 0.0
    if clip:
        rows = np.clip(rows, -clip, clip)
    if mode == STATIC:
        scale = np.full(len(rows), np.float32(act_scale), np.float32)
        inv = (1.0 / scale.astype(np.float64)).astype(np.float32)
    else:
        amax = np.abs(rows).max(axis=1) if len(rows) else np.zeros(0)
        if mode == PER_TENSOR and len(rows):
            amax[:] = amax.max()
        tiny = amax < 2.0**-100
        amax[tiny] = 1.0
        inv = np.where(tiny, 0.0, 127.0 / amax).astype(np.float32)
        scale = np.where(tiny, 1.0, amax / 127.0).astype(np.float32)
    with np.errstate(over="ignore"):
        scaled = (rows * inv.astype(np.float64)[:, None]).astype(np.float32)
    q = np.rint(np.clip(scaled, -127, 127)).astype(np.int64)
    return q, np.where(finite, scale, np.float32(np.nan)), q.sum(axis=1)


# ---------------------------------------------------------------------------------------- calling the core


def call_quantize(core, raw, dtype, mode, clip=0.0, act_scale=0.0, want_sum=True):
    """raw: [rows, k] storage whose last stride is one element."""
    rows, k = raw.shape
    q = np.full((rows, k), POISON - 256, np.int8)
    scale, row_sum = np.full(rows, -7.0, np.float32), np.full(rows, -7, np.int32)
    stride = raw.strides[0] // raw.itemsize
    outputs = q.ctypes.data, scale.ctypes.data, row_sum.ctypes.data if want_sum else 0
    core.quantize_rows(raw.ctypes.data, dtype, rows, k, stride, mode, clip, act_scale, *outputs)
    return q, scale, row_sum


def assert_quantized(core, raw, dtype, mode, clip=0.0, act_scale=0.0):
    q, scale, row_sum = call_quantize(core, raw, dtype, mode, clip, act_scale)
    want_q, want_scale, want_sum = quantize_oracle(widen(raw, dtype), mode, clip, act_scale)
    where = f"dtype={dtype} mode={mode} clip={clip} shape={raw.shape}"
    np.testing.assert_array_equal(q, want_q, where)
    np.testing.assert_array_equal(scale, want_scale, where)
    np.testing.assert_array_equal(row_sum, want_sum, where)
    return q, scale


def hard_rows(rng, k):
    """Rows that have each broken a quantizer somewhere, as float32 [n, k]."""
    ramp = np.linspace(-3, 3, k, dtype=np.float32)
    outlier = rng.standard_normal(k) * 1e-3
    outlier[k // 2] = 6e4
    ties = np.arange(k) % 254 - 126.5  # with amax 127, inv is 1 and every code is a tie
    ties[-1] = 127
    named = [
        *(np.zeros(k), np.full(k, -0.0), np.full(k, 1e-45), np.full(k, 1e-38), ramp, -ramp, outlier, ties),
        *(np.full(k, 2.0**-101), np.full(k, 2.0**-100), np.full(k, -3.4e38), np.full(k, 65504.0)),
        *(ramp * np.float32(1e-30), ramp * np.float32(1e30), np.full(k, 6e-8), np.full(k, 2.5)),
    ]
    return np.stack([*named, *rng.standard_normal((5, k)) * 2]).astype(np.float32)


def check_quantizer(core):
    rng = np.random.default_rng(0)
    checked = nonzero = 0
    for dtype, k in itertools.product((FP32, FP16, BF16), WIDTHS):
        raw = narrow(hard_rows(rng, k), dtype)
        raw = raw[np.isfinite(widen(raw, dtype)).all(axis=1)]  # float16 turns 1e30 into Inf: other test
        for mode, clip in itertools.product((PER_TOKEN, PER_TENSOR, STATIC), (0.0, 2.5, 1e-3, 2.0**-110)):
            q, _ = assert_quantized(core, raw, dtype, mode, clip, 0.0173)
            checked, nonzero = checked + 1, nonzero + int(np.any(q))
        for row in raw:
            assert_quantized(core, row[None], dtype, PER_TENSOR)
        strided = np.full((len(raw), k + 5), POISON, raw.dtype)
        strided[:, 2 : k + 2] = raw
        assert_quantized(core, strided[:, 2 : k + 2], dtype, PER_TOKEN, 2.5)
        assert_quantized(core, np.broadcast_to(raw[-1], (3, k)), dtype, PER_TOKEN)
        q, scale, untouched = call_quantize(core, raw, dtype, PER_TOKEN, want_sum=False)
        assert (untouched == -7).all()
        call_quantize(core, raw[:0], dtype, PER_TENSOR)  # no rows: nothing to do, nothing to refuse
    assert nonzero > checked / 2, "the inputs must not all quantize to zero"
    for act_scale in (2.0**-126, 1e-30, 1.0, 1e30, 2.0**126):
        assert_quantized(core, hard_rows(rng, 33), FP32, STATIC, 0.0, act_scale)
    return checked


def check_every_half(core):
    """All 65,536 patterns of both 16-bit types, each as a row: widening, the zero and non-finite rules."""
    for dtype in (FP16, BF16):
        patterns = np.arange(65536, dtype=np.uint16)
        for mode, clip in ((PER_TOKEN, 0.0), (STATIC, 0.0), (STATIC, 2.5)):
            assert_quantized(core, patterns[:, None], dtype, mode, clip, 0.01)
        # The same through the vector path: the pattern, and 1.0 or its negation beside it.
        one = 0x3C00 if dtype == FP16 else 0x3F80
        wide = np.full((65536, 17), one, np.uint16)
        wide[:, 3] = wide[:, 16] = patterns
        assert_quantized(core, wide, dtype, PER_TOKEN)
    return 2 * 65536


def check_non_finite(core):
    """NaN and Inf at every position: that row is codes 0 and scale NaN, its neighbours are what they were."""
    rng = np.random.default_rng(1)
    checked = 0
    for dtype, k in itertools.product((FP32, FP16, BF16), (1, 9, 16, 33, 40)):
        clean = narrow(rng.standard_normal((3, k)).astype(np.float32), dtype)
        for bad, position in itertools.product((np.nan, -np.nan, np.inf, -np.inf), range(k)):
            raw = clean.copy()
            raw[1, position] = narrow(np.array([bad], np.float32), dtype)[0]
            for mode in (PER_TOKEN, STATIC):
                want, want_scale = assert_quantized(core, clean, dtype, mode, 2.5, 0.02)
                q, scale = assert_quantized(core, raw, dtype, mode, 2.5, 0.02)
                assert not q[1].any() and np.isnan(scale[1])
                assert (q[::2] == want[::2]).all() and (scale[::2] == want_scale[::2]).all()
            q, scale = assert_quantized(core, raw, dtype, PER_TENSOR)
            assert not q.any() and np.isnan(scale).all()
            checked += 1
    return checked


def check_packing(core):
    rng = np.random.default_rng(2)
    checked = 0
    shapes = [(1, k) for k in WIDTHS] + [(3, 127), (15, 129), (16, 128), (17, 257), (33, 300), (0, 5)]
    for bits, (n, k) in itertools.product(BITS, shapes):
        low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
        # Every code, at every position of a block in turn, then random ones.
        offsets = range(high - low + 1) if bits < 8 else (0, 1, 77, 128, 255)
        ordered = [(np.arange(n * k).reshape(n, k) + o) % (high - low + 1) + low for o in offsets]
        for codes in [*ordered, rng.integers(low, high + 1, (n, k))]:
            codes = codes.astype(np.int8)
            want = pack_oracle(codes, bits)
            packed = np.full(want.shape, POISON, np.uint8)
            core.pack(codes.ctypes.data, n, k, bits, packed.ctypes.data)
            np.testing.assert_array_equal(packed, want, f"pack bits={bits} shape={codes.shape}")
            back = np.full((n, k), POISON - 256, np.int8)
            core.unpack(packed.ctypes.data, n, k, bits, back.ctypes.data)
            np.testing.assert_array_equal(back, codes, f"unpack bits={bits} shape={codes.shape}")
            checked += 1
    return checked


# ---------------------------------------------------------------------------------------------- guard pages


def check_guard_pages(core):
    rng = np.random.default_rng(3)
    checked = 0
    for at_end, (n, k) in itertools.product((True, False), [(1, 1), (3, 17), (5, 31), (16, 128), (2, 129), (1, 255)]):
        for bits in BITS:
            codes = rng.integers(-1, 2, (n, k)).astype(np.int8)
            want = pack_oracle(codes, bits)
            source, packed = guarded(codes, at_end), guarded(np.zeros_like(want), at_end)
            core.pack(source.ctypes.data, n, k, bits, packed.ctypes.data)
            np.testing.assert_array_equal(packed, want)
            back = guarded(np.zeros_like(codes), at_end)
            core.unpack(packed.ctypes.data, n, k, bits, back.ctypes.data)
            np.testing.assert_array_equal(back, codes)
            checked += 2
        for dtype, mode in itertools.product((FP32, FP16, BF16), (PER_TOKEN, PER_TENSOR, STATIC)):
            x = guarded(narrow(rng.standard_normal((n, k)).astype(np.float32), dtype), at_end)
            want_q, want_scale, want_sum = quantize_oracle(widen(x.copy(), dtype), mode, 0.0, 0.02)
            q, scale, row_sum = (
                guarded(np.zeros(shape, t), at_end) for shape, t in (((n, k), "i1"), (n, "f4"), (n, "i4"))
            )
            outputs = q.ctypes.data, scale.ctypes.data, row_sum.ctypes.data
            core.quantize_rows(x.ctypes.data, dtype, n, k, k, mode, 0.0, 0.02, *outputs)
            np.testing.assert_array_equal(q, want_q)
            np.testing.assert_array_equal(scale, want_scale)
            np.testing.assert_array_equal(row_sum, want_sum)
            checked += 1
    return checked


def check_reader(core):
    """A loop that only reads, over shares of 8 bytes and what is left: all of it, and no byte more."""
    rng, checked = np.random.default_rng(4), 0
    sizes = (1, 7, 8, 9, 255, 256, 257, 4099, (64 << 10) - 1, (128 << 10) + 13, (5 << 16) + 9)
    for at_end, count, threads in itertools.product((True, False), sizes, (1, 3)):
        data = guarded(rng.integers(0, 256, count).astype(np.uint8), at_end)
        words = data[: count // 8 * 8].copy().view(np.uint64)
        want = (sum(map(int, words)) + sum(map(int, data[count // 8 * 8 :]))) % 2**64
        assert core.read_bytes([data.ctypes.data] * 2, count, threads) == 2 * want % 2**64, (count, threads)
        checked += 1
    return checked


def trip_the_guard(core):
    """The positive control: one element too many must fault."""
    x, q = guarded(np.ones((1, 17), np.float32), True), np.zeros(64, np.int8)
    core.quantize_rows(x.ctypes.data, FP32, 1, 18, 18, PER_TOKEN, 0.0, 0.0, q.ctypes.data, q.ctypes.data + 32, 0)


CHECKS = (check_quantizer, check_every_half, check_non_finite, check_packing, check_guard_pages, check_reader)


def load(path):
    spec = importlib.util.spec_from_file_location("dqkernels._C", path)
    core = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(core)
    return core


if __name__ == "__main__":
    the_core = load(sys.argv[1])
    if sys.argv[2:] == ["--trip"]:
        trip_the_guard(the_core)
    else:
        counts = {check.__name__: check(the_core) for check in CHECKS}
        print(json.dumps({"isa": the_core.cpu_isa(), **counts}))
    sys.exit(0)
