"""The numerical contract a second time, in numpy and plain Python, written from docs/design.md alone.

This file must never import dqkernels: two copies of one mistake agree. Floats are numpy float32 throughout,
so every operation is one IEEE rounding; sums of products are int64. A bfloat16 is its 16 bits: numpy has none.
"""

from __future__ import annotations

import math

import numpy as np

F32 = np.float32
ZERO_AMAX = F32(2.0**-100)

# ------------------------------------------------------------------------------------------------ packed format


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Byte by byte from the formula: byte j of block b, plane p = code of k = 128 * b + p * L + j, L = 128 / P."""
    planes = 8 // bits
    run = 128 // planes
    n, k = codes.shape
    rows, columns = math.ceil(n / 16) * 16, math.ceil(k / 128) * 128
    out = np.zeros((rows, columns // planes), np.uint8)
    for row in range(n):
        line = [int(code) for code in codes[row]] + [0] * (columns - k)
        for byte in range(columns // planes):
            block, j = divmod(byte, run)
            value = 0
            for plane in range(planes):
                field = line[128 * block + plane * run + j] % (1 << bits)  # two's complement
                value += field * (1 << (bits * plane))
            out[row, byte] = value
    return out


def pack_fast(codes: np.ndarray, bits: int) -> np.ndarray:
    """The same formula on whole index arrays; test_packing holds it equal to `pack`."""
    planes, (n, k) = 8 // bits, codes.shape
    run = 128 // planes
    padded = np.zeros((math.ceil(n / 16) * 16, math.ceil(k / 128) * 128), np.int64)
    padded[:n, :k] = codes
    byte = np.arange(padded.shape[1] // planes)
    source = 128 * (byte // run) + byte % run
    out = np.zeros((padded.shape[0], byte.size), np.int64)
    for plane in range(planes):
        out += (padded[:, source + plane * run] % (1 << bits)) << (bits * plane)
    return out.astype(np.uint8)


def code_at(packed_row: np.ndarray, k: int, bits: int) -> int:
    """The code of input feature k, read by the kernels' way: into the top bits, then an arithmetic shift down."""
    planes = 8 // bits
    run = 128 // planes
    block, inside = divmod(k, 128)
    plane, j = divmod(inside, run)
    top = (int(packed_row[block * run + j]) << (8 - bits - bits * plane)) & 0xFF
    top &= {8: 0xFF, 4: 0xF0, 2: 0xC0}[bits]
    signed = top - 256 if top >= 128 else top
    return signed // (1 << (8 - bits))


# ------------------------------------------------------------------------------------------------- activations


def quantize_activation(
    x: np.ndarray, mode: str, clip: float | None = None, act_scale: float | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """float32 [M, K] -> codes int64 [M, K], scale float32 [M], row_sum int64 [M]; a loop over the rows."""
    assert x.dtype == F32 and x.ndim == 2
    rows = x.shape[0]
    codes, scales = np.zeros(x.shape, np.int64), np.ones(rows, F32)
    finite = [bool(np.isfinite(row).all()) for row in x]
    if mode == "per_tensor":
        finite = [all(finite)] * rows
    limited = x if clip is None else np.minimum(np.maximum(x, -F32(clip)), F32(clip))
    tensor_amax = F32(np.abs(limited).max()) if rows else F32(0)
    for m in range(rows):
        if not finite[m]:
            scales[m] = np.nan
            continue
        if mode == "static":
            scale = F32(act_scale)
            inv = F32(1) / scale
        else:
            amax = tensor_amax if mode == "per_tensor" else F32(np.abs(limited[m]).max())
            if amax < ZERO_AMAX:
                continue  # codes 0, scale 1
            inv, scale = F32(127) / amax, amax / F32(127)
        with np.errstate(over="ignore"):  # a static scale may be far too small: the clamp takes the infinity
            product = limited[m] * inv
        codes[m] = np.rint(np.clip(product, F32(-127), F32(127)))  # rint: half to even
        scales[m] = scale
    return codes, scales, codes.sum(axis=1)


# --------------------------------------------------------------------------------------------------------- GEMM


def accumulate(
    q: np.ndarray, codes: np.ndarray, mult: np.ndarray | None, four_level: bool, group_size: int
) -> np.ndarray:
    """int64 [M, N]: the sum over groups of mult * (sum of q * level); a level is the code, or 2 * code + 1."""
    level = codes.astype(np.int64)
    if four_level:
        level = 2 * level + 1
    if mult is not None:
        group_of_k = np.arange(codes.shape[1]) // group_size
        level = level * mult.astype(np.int64)[:, group_of_k]
    acc = q.astype(np.int64) @ level.T
    assert np.abs(acc).max(initial=0) < 2**31, "the case itself overflows int32"
    return acc


def epilogue(
    acc: np.ndarray,
    act_scale: np.ndarray,
    weight_scale: np.ndarray,
    bias: np.ndarray | None = None,
    residual: np.ndarray | None = None,
    activation: str = "none",
) -> np.ndarray:
    """float32 [M, N] before the last rounding; numpy rounds each step on its own."""
    t = acc.astype(F32)
    t = t * act_scale.astype(F32)[:, None]
    t = t * weight_scale.astype(F32).reshape(1, -1)
    if bias is not None:
        t = t + bias.astype(F32)
    if activation == "relu":
        t = np.where(t < 0, F32(0), t)
    elif activation != "none":
        raise ValueError(f"{activation} has no exact oracle")
    if residual is not None:
        t = t + residual.astype(F32)
    assert t.dtype == F32
    return t


def gelu64(x: np.ndarray) -> np.ndarray:
    """The erf form of GELU in float64."""
    return np.array([0.5 * v * (1.0 + math.erf(v / math.sqrt(2.0))) for v in x.astype(np.float64).ravel()]).reshape(
        x.shape
    )


def bfloat16_bits(t: np.ndarray) -> np.ndarray:
    """Nearest-even rounding of float32 to bfloat16 by bit arithmetic, as uint16."""
    bits = t.astype(F32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(t), 0x7FC0, rounded).astype(np.uint16)


def round_to(t: np.ndarray, dtype: str) -> np.ndarray:
    """float32 rounded once to `float32`, `float16` or `bfloat16`, and widened again (exact) for comparing."""
    if dtype == "float32":
        return t
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return t.astype(np.float16).astype(F32)
    return (bfloat16_bits(t).astype(np.uint32) << 16).view(F32)


def qlinear(
    x: np.ndarray,
    codes: np.ndarray,
    weight_scale: np.ndarray,
    mult: np.ndarray | None,
    *,
    four_level: bool,
    group_size: int,
    mode: str,
    clip: float | None,
    act_scale: float | None,
    bias: np.ndarray | None,
    residual: np.ndarray | None,
    activation: str,
    dtype: str,
) -> np.ndarray:
    """The whole op on float32 [M, K], its result widened to float32."""
    q, scale, _ = quantize_activation(x, mode, clip, act_scale)
    acc = accumulate(q, codes, mult, four_level, group_size)
    return round_to(epilogue(acc, scale, weight_scale, bias, residual, activation), dtype)


# ------------------------------------------------------------------------------------------------------ weights


def mult_max(bits: int, four_level: bool, k: int) -> int:
    """min(127, floor((2^31 - 1) / (127 * L * K))): L is 8 at 4 bits, 1 ternary, 3 four_level."""
    largest = 8 if bits == 4 else 3 if four_level else 1
    return min(127, (2**31 - 1) // (127 * largest * k))


def _mean(values: np.ndarray) -> float:
    return math.fsum(float(v) for v in values) / len(values)  # fsum: exact, so in no particular order


def absmax(w: np.ndarray, bits: int, per_tensor: bool) -> tuple[np.ndarray, np.ndarray]:
    """codes int64 [N, K] and scale float32 [N] or [1]: q = round(w * (L / amax)), scale = amax / L."""
    largest = F32({8: 127, 4: 7}[bits])
    rows = w.reshape(1, -1) if per_tensor else w
    codes, scales = np.zeros(rows.shape, np.int64), np.zeros(len(rows), F32)
    for i, row in enumerate(rows):
        amax = F32(np.abs(row).max())
        if amax < ZERO_AMAX:
            continue
        scales[i] = amax / largest
        codes[i] = np.rint(np.clip(row * (largest / amax), -largest, largest))
    return codes.reshape(w.shape), scales


def ternary(w: np.ndarray, per_tensor: bool) -> tuple[np.ndarray, np.ndarray]:
    """TWN: D = 0.7 * mean|w|, codes sign(w) where |w| > D (strictly), scale = mean|w| over those."""
    return quantize_weight(w, 2, "ternary", "per_tensor" if per_tensor else "per_channel")[:2]


def four_level_codes(row: np.ndarray, step: F32) -> np.ndarray:
    """Codes of the levels -3/2, -1/2, 1/2, 3/2 steps: clamp(floor(w / step), -2, 1), by an fp32 reciprocal."""
    return np.clip(np.floor(row * (F32(1) / F32(step))), -2, 1).astype(np.int64)


def squared_error(row: np.ndarray, level: np.ndarray, step: float) -> float:
    """Sum of squared errors of `level * step`, in float64."""
    return float(((row.astype(np.float64) - level.astype(np.float64) * float(step)) ** 2).sum())


def _fixed(values: np.ndarray, exponent: int) -> np.ndarray:
    """Magnitudes times 2^exponent, cut to integers: by Python's ldexp and int, which round nothing and cut to zero."""
    return np.array([int(math.ldexp(abs(float(v)), exponent)) for v in values], np.int64)


def _fixed_mean(fixed: np.ndarray, exponent: int) -> np.float32:
    total = sum(int(v) for v in fixed)  # Python's integers have no width
    assert total < 2**63
    return F32(total / (len(fixed) * 2.0**exponent))  # one float64 quotient, then one rounding


def error_shift(count: int) -> int:
    """The least shift, and at least 6, for which `count` squares of (1.2 * 2^28 / 2^shift) stay below 2^63, by powers
    of two: 2 * (28.27 - shift) + bit_length(count) < 63."""
    return max(6, math.ceil((count.bit_length() - 6) / 2))


def _search_errors(row: np.ndarray, base: F32, ratios: list[float], exponent: int, bits: int) -> list[int]:
    """Of each candidate ratio * base: the squared distances to its nearest levels, in units of 2^-exponent."""
    fixed, unit, shift = _fixed(row, exponent), F32(2.0**exponent), error_shift(len(row))
    errors = []
    for ratio in ratios:
        candidate = F32(base * unit) * F32(ratio)
        if bits == 2:
            half = int(candidate * F32(0.5))
            distance = np.minimum(np.abs(fixed - half), np.abs(fixed - 3 * half))
        else:
            largest = F32({4: 7, 8: 127}[bits])
            step = candidate / largest
            code = np.rint(np.minimum(np.abs(row) * unit * (F32(1) / step), largest))
            distance = fixed - code.astype(np.int64) * int(step)
        errors.append(sum(int(d) ** 2 for d in distance >> shift))
    assert max(errors) < 2**63
    return errors


def weight_step(row: np.ndarray, bits: int, quantizer: str) -> tuple[np.float32, np.float32]:
    """Distance of two levels for one row, group or matrix of float32, and the magnitude that ternary must exceed."""
    if not np.isfinite(row).all():
        return F32(np.nan), F32(np.inf)
    amax = np.abs(row).max()
    if amax < ZERO_AMAX:
        return F32(0), F32(np.inf)
    exponent = 28 - math.frexp(float(amax))[1]  # amax * 2^exponent is in [2^27, 2^28)
    largest = F32({2: 1, 4: 7, 8: 127}[bits])
    if quantizer == "absmax":
        return amax / largest, F32(np.inf)
    if quantizer == "mse":
        ratios = [1.0 - 0.02 * i for i in range(36)]
        errors = _search_errors(row, amax, ratios, exponent, bits)
        return amax * F32(ratios[errors.index(min(errors))]) / largest, F32(np.inf)
    fixed = _fixed(row, exponent)
    mean = _fixed_mean(fixed, exponent)
    if quantizer == "ternary":
        threshold = mean * F32(0.7)
        return _fixed_mean(fixed[np.abs(row) > threshold], exponent), threshold
    ratios = [0.80 + 0.04 * i for i in range(41)]
    errors = _search_errors(row, mean, ratios, exponent, bits)
    with np.errstate(over="ignore"):
        return min(mean * F32(ratios[errors.index(min(errors))]), F32(2.0**126)), F32(np.inf)


def weight_codes(w: np.ndarray, step: F32, threshold: F32, bits: int, quantizer: str, amax: F32 | None) -> np.ndarray:
    """int64 codes of one row or group; `amax` where absmax divides by it rather than by the step."""
    if not step >= F32(2.0**-100 / 127):
        return np.zeros(w.shape, np.int64)
    if quantizer == "ternary":
        return np.where(np.abs(w) > threshold, np.sign(w), 0).astype(np.int64)
    if quantizer == "four_level":
        return four_level_codes(w, step)
    largest = F32({4: 7, 8: 127}[bits])
    inv = F32(1) / step if amax is None else largest / amax
    return np.rint(np.clip(w * inv, -largest, largest)).astype(np.int64)


def quantize_weight(
    w: np.ndarray, bits: int, quantizer: str, granularity: str = "per_channel", group_size: int = -1, clip=None
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """codes int64 [N, K], scale float32 [N] or [1], multipliers uint8 [N, groups] or None, by any rule."""
    assert w.dtype == F32
    n, k = w.shape
    if clip is not None:
        w = np.where(np.isfinite(w), np.clip(w, -F32(clip), F32(clip)), w)
    half = F32(0.5 if quantizer == "four_level" else 1)
    if group_size == -1:
        rows = w.reshape(1, -1) if granularity == "per_tensor" else w
        codes, scale = np.zeros(rows.shape, np.int64), np.zeros(len(rows), F32)
        for i, row in enumerate(rows):
            step, threshold = weight_step(row, bits, quantizer)
            amax = np.abs(row).max() if quantizer == "absmax" else None
            codes[i] = weight_codes(row, step, threshold, bits, quantizer, amax)
            scale[i] = step * half
        return codes.reshape(n, k), scale, None
    limit = F32(mult_max(bits, quantizer == "four_level", k))
    groups = [slice(start, min(start + group_size, k)) for start in range(0, k, group_size)]
    codes, scale, mult = np.zeros((n, k), np.int64), np.zeros(n, F32), np.ones((n, len(groups)), np.uint8)
    for i, row in enumerate(w):
        steps = [weight_step(row[group], bits, quantizer) for group in groups]
        row_step = np.max([step for step, _ in steps]) / limit  # numpy's maximum keeps a NaN
        scale[i] = np.nan if np.isnan(row_step) else row_step * half if row_step >= ZERO_AMAX else 0
        if not row_step >= ZERO_AMAX:
            continue
        for j, (group, (step, threshold)) in enumerate(zip(groups, steps, strict=True)):
            mult[i, j] = np.clip(np.rint(step / row_step), 1, limit)
            codes[i, group] = weight_codes(row[group], row_step * F32(mult[i, j]), threshold, bits, quantizer, None)
    return codes, scale, mult


def quantize_by_step(
    w: np.ndarray, step: np.ndarray, bits: int, quantizer: str, clip: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """codes int64 [N, K] and scale float32 as step ([N] or [1]): levels at a distance that is given (LSQ)."""
    assert w.dtype == step.dtype == F32
    codes, scale = np.zeros(w.shape, np.int64), np.zeros(step.shape, F32)
    finite = [bool(np.isfinite(row).all()) for row in w]
    if len(step) == 1:
        finite = [all(finite)] * len(w)
    limited = w if clip is None else np.clip(w, -F32(clip), F32(clip))
    for i in range(len(w)):
        at = i if len(step) > 1 else 0
        if not (finite[i] and np.isfinite(step[at])):
            scale[at] = np.nan
        elif step[at] >= F32(2.0**-100 / 127):
            half = step[at] * F32(0.5)
            scale[at] = half if quantizer == "four_level" else step[at]
            codes[i] = weight_codes(limited[i], step[at], half, bits, quantizer, None)
    return codes, scale


def dequantize(
    codes: np.ndarray, scale: np.ndarray, mult: np.ndarray | None, four_level: bool, group_size: int
) -> np.ndarray:
    """float32 [N, K]: the integer level (times its multiplier: still an integer) * scale, one rounding."""
    level = codes.astype(np.int64)
    if four_level:
        level = 2 * level + 1
    if mult is not None:
        level = level * mult.astype(np.int64)[:, np.arange(codes.shape[1]) // group_size]
    return level.astype(F32) * scale.astype(F32).reshape(-1, 1)


def qembedding(
    ids: np.ndarray,
    codes: np.ndarray,
    scale: np.ndarray,
    mult: np.ndarray | None,
    *,
    four_level: bool,
    group_size: int,
    embed_scale: float,
    position: np.ndarray | None,
    dtype: str,
) -> np.ndarray:
    """float32(level) * weight_scale, * embed_scale, + position, one rounding at the end."""
    table = dequantize(codes, scale, mult, four_level, group_size)
    rows = table[ids] * F32(embed_scale)
    if position is not None:
        rows = rows + position.astype(F32)
    return round_to(rows, dtype)
