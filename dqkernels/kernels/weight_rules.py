"""What the weight quantizers of weight.py are made of: sums of integers, candidate steps, codes, packing.

Every sum of a row is one of int64, so it has no order, and no float product is added to anything: the bits are those of
`qmath`, whatever the tile. Importing this file imports Triton; nothing imports it when the package is imported.
"""

from __future__ import annotations

import struct

import triton
import triton.language as tl

from dqkernels import qmath

from .quantize import _INF_BITS, _MAGIC, _MAGIC_BITS, _TINY_BITS, _abs_bits, _codes, _load_row


def _bits_of(value: float) -> tl.constexpr:
    return tl.constexpr(struct.unpack("<i", struct.pack("<f", value))[0])


_TERNARY, _FOUR_LEVEL, _MSE = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
RULES = {"ternary": _TERNARY.value, "four_level": _FOUR_LEVEL.value, "mse": _MSE.value}
_CANDIDATES = {"four_level": qmath.FOUR_LEVEL_CANDIDATES, "mse": qmath.MSE_CANDIDATES, "ternary": 0}
_WIDTH = tl.constexpr(64)  # candidates, to a power of two
_NEVER = tl.constexpr(2**63 - 1)  # more than any sum of squares
_LIVE_BITS = _bits_of(qmath.ZERO_AMAX / qmath.ACT_MAX)  # a step below it has codes 0
_STEP_MAX = tl.constexpr(qmath.ACT_SCALE_RANGE[1])


@triton.jit
def _store_packed(q_row, codes, offset, row_bytes, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK int32 codes, in order of k from `offset` on, into the planes of their 128-blocks."""
    PLANES: tl.constexpr = 8 // BITS
    RUN: tl.constexpr = 16 * BITS
    fields = tl.reshape(codes & ((1 << BITS) - 1), [BLOCK // 128, PLANES, RUN])
    fields = fields << (BITS * tl.arange(0, PLANES))[None, :, None]
    packed = tl.sum(fields, 1)  # the fields of a byte share no bit: their sum is their union
    byte = offset // 128 * RUN + tl.arange(0, BLOCK // 128)[:, None] * RUN + tl.arange(0, RUN)[None, :]
    tl.store(q_row + byte, packed.to(tl.uint8), mask=byte < row_bytes)


@triton.jit
def _row_amax_bits(w_row, length, BLOCK: tl.constexpr):
    best = tl.zeros([BLOCK], tl.int32)
    for offset in range(0, length, BLOCK):
        best = tl.maximum(best, _abs_bits(_load_row(w_row, offset, length, BLOCK)))
    return tl.max(best, 0)


@triton.jit
def _judge(bits, clip):
    """Of weights whose largest magnitude has these bits: amax after the clip (1 if unusable), finite, usable."""
    finite = bits < _INF_BITS  # judged on the raw weights, before the clip
    amax = tl.minimum(bits.to(tl.float32, bitcast=True), clip)
    usable = finite & (amax.to(tl.int32, bitcast=True) >= _TINY_BITS)
    return tl.where(usable, amax, 1.0), finite, usable


# -------------------------------------------------------------------------------------------- sums of integers


@triton.jit
def _unit(amax):
    """`qmath.fixed_unit`: the power of two that takes amax to 2^27..2^28."""
    return ((281 - (amax.to(tl.int32, bitcast=True) >> 23)) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _mean(total, count, unit):
    """One float64 quotient (the divisor is exact), rounded to fp32."""
    return (total.to(tl.float64) / (unit.to(tl.float64) * count.to(tl.float64))).to(tl.float32)


@triton.jit
def _magnitudes(w_row, offset, length, clip, BLOCK: tl.constexpr):
    return tl.minimum(tl.abs(_load_row(w_row, offset, length, BLOCK)), clip)


@triton.jit
def _row_total(w_row, length, unit, clip, BLOCK: tl.constexpr):
    """int64: the sum of a row's magnitudes, each cut to an integer of units."""
    total = tl.full((), 0, tl.int64)
    for offset in range(0, length, BLOCK):
        fixed = (_magnitudes(w_row, offset, length, clip, BLOCK) * unit).to(tl.int32)
        total += tl.sum(fixed.to(tl.int64), 0)
    return total


@triton.jit
def _row_kept(w_row, length, threshold, unit, clip, BLOCK: tl.constexpr):
    """int64 sum and int32 number of the magnitudes above the threshold."""
    total, count = tl.full((), 0, tl.int64), tl.full((), 0, tl.int32)
    for offset in range(0, length, BLOCK):
        magnitude = _magnitudes(w_row, offset, length, clip, BLOCK)
        kept = magnitude > threshold
        total += tl.sum(tl.where(kept, (magnitude * unit).to(tl.int32), 0).to(tl.int64), 0)
        count += tl.sum(kept.to(tl.int32), 0)
    return total, count


# ---------------------------------------------------------------------------------------------------- searching


@triton.jit
def _ratio(i, RULE: tl.constexpr):
    """Number i (int32) of the grid of candidates."""
    if RULE == _MSE:
        return tl.div_rn((50 - i).to(tl.float32), 50.0)
    else:
        return tl.div_rn((20 + i).to(tl.float32), 25.0)


@triton.jit
def _squares(scaled, fixed, candidate, LEVELS: tl.constexpr, RULE: tl.constexpr, SHIFT: tl.constexpr):
    """int64: squared distances from magnitudes (in units, and cut to int32) to the nearest level of a candidate."""
    if RULE == _MSE:
        step = tl.div_rn(candidate, LEVELS)
        code = tl.minimum(scaled * tl.div_rn(1.0, step), LEVELS)
        code = (code + _MAGIC).to(tl.int32, bitcast=True) - _MAGIC_BITS
        distance = fixed - code * step.to(tl.int32)
    else:
        half = (candidate * 0.5).to(tl.int32)
        distance = tl.minimum(tl.abs(fixed - half), tl.abs(fixed - 3 * half))
    distance = (distance >> SHIFT).to(tl.int64)
    return distance * distance


@triton.jit
def _row_errors(
    w_row,
    length,
    base,  # the candidates are ratios of it
    unit,
    clip,
    CANDIDATES: tl.constexpr,
    LEVELS: tl.constexpr,
    RULE: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """int64 [_WIDTH]: the sum of a row's squared distances for each candidate."""
    number = tl.arange(0, _WIDTH)
    errors = tl.zeros([_WIDTH], tl.int64)
    base = base * unit
    for offset in range(0, length, BLOCK):
        scaled = _magnitudes(w_row, offset, length, clip, BLOCK) * unit
        fixed = scaled.to(tl.int32)
        inside = offset + tl.arange(0, BLOCK) < length  # 0 has a distance too, where no level is 0
        for i in range(CANDIDATES):
            candidate = base * _ratio(tl.full((), i, tl.int32), RULE)
            squares = _squares(scaled, fixed, candidate, LEVELS, RULE, SHIFT)
            errors += tl.where(number == i, tl.sum(tl.where(inside, squares, 0), 0), 0)
    return errors


@triton.jit
def _best_step(errors, base, CANDIDATES: tl.constexpr, LEVELS: tl.constexpr, RULE: tl.constexpr):
    """The step of the candidate with the least error, the first of equals."""
    number = tl.arange(0, _WIDTH)
    errors = tl.where(number < CANDIDATES, errors, _NEVER)
    best = tl.min(tl.where(errors == tl.min(errors, 0), number, _WIDTH), 0)
    return _step_of(base * _ratio(best, RULE), LEVELS, RULE)


@triton.jit
def _step_of(candidate, LEVELS: tl.constexpr, RULE: tl.constexpr):
    if RULE == _MSE:
        return tl.div_rn(candidate, LEVELS)
    else:
        return tl.minimum(candidate, _STEP_MAX)


@triton.jit
def _group_step(
    w,  # fp32 [groups, GROUP], clipped and finite
    inside,
    count,  # int32 [groups]: weights of each
    amax,
    unit,
    CANDIDATES: tl.constexpr,
    LEVELS: tl.constexpr,
    RULE: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """fp32 [groups] step and ternary threshold (0 for other rules) of several groups at once."""
    magnitude = tl.abs(w)
    scaled = magnitude * unit[:, None]
    fixed = scaled.to(tl.int32)
    base = amax
    if RULE != _MSE:
        base = _mean(tl.sum(fixed.to(tl.int64), 1), count, unit)
    threshold = base * 0.0
    if RULE == _TERNARY:
        threshold = base * 0.7
        kept = magnitude > threshold[:, None]
        total = tl.sum(tl.where(kept, fixed, 0).to(tl.int64), 1)
        step = _mean(total, tl.maximum(tl.sum(kept.to(tl.int32), 1), 1), unit)
    else:
        least = tl.full(amax.shape, _NEVER, tl.int64)
        best = tl.zeros(amax.shape, tl.float32)
        for i in range(CANDIDATES):
            ratio = _ratio(tl.full((), i, tl.int32), RULE)
            squares = _squares(scaled, fixed, (base * unit * ratio)[:, None], LEVELS, RULE, SHIFT)
            error = tl.sum(tl.where(inside, squares, 0), 1)
            best = tl.where(error < least, ratio, best)
            least = tl.minimum(error, least)
        step = _step_of(base * best, LEVELS, RULE)
    return step, threshold


# -------------------------------------------------------------------------------------------------------- codes


@triton.jit
def _scale_of(step, finite, RULE: tl.constexpr):
    """What is stored of a step (0 where unusable): the factor of an integer level."""
    if RULE == _FOUR_LEVEL:
        step = step * 0.5
    return tl.where(finite, step, float("nan"))


@triton.jit
def _rule_codes(w, inv, threshold, clip, live, LEVELS: tl.constexpr, RULE: tl.constexpr):
    """int32 codes of fp32 weights, 0 where not live."""
    if RULE == _MSE:
        codes = _codes(w, inv, clip, live, LEVELS)
    else:
        w = tl.minimum(tl.maximum(w, -clip), clip)
        if RULE == _TERNARY:
            codes = tl.where(tl.abs(w) > threshold, tl.where(w > 0, 1, -1), 0)
        else:  # clamp(floor(w * inv), -2, 1)
            x = w * inv
            codes = (x >= -1.0).to(tl.int32) + (x >= 0.0).to(tl.int32) + (x >= 1.0).to(tl.int32) - 2
    return tl.where(live, codes, 0)


@triton.jit
def _write_row(
    w_row,
    q_row,
    step,
    threshold,
    clip,
    length,
    row_bytes,
    BITS: tl.constexpr,
    LEVELS: tl.constexpr,
    RULE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A packed row, its padding too, by one step."""
    live = step.to(tl.int32, bitcast=True) >= _LIVE_BITS
    inv = tl.div_rn(1.0, tl.where(live, step, 1.0))
    for offset in range(0, row_bytes * 8 // BITS, BLOCK):
        w = _load_row(w_row, offset, length, BLOCK)
        codes = _rule_codes(w, inv, threshold, clip, live, LEVELS, RULE)
        _store_packed(q_row, codes, offset, row_bytes, BITS, BLOCK)
