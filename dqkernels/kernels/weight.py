"""Weight quantizer in Triton: float master matrix to packed codes, scales and group multipliers, by every rule.

It runs at every training step. Only maxima and integers are reduced, so the bits are those of `qmath.quantize_weight`.
Launches: one for absmax and, with a scale per row, for the other rules; two with their groups (steps, then codes); two
to four under `per_tensor`, where sums are handed on in device memory. Nothing waits for the device.
Importing this file imports Triton; nothing imports it when the package is imported.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from dqkernels import packing, qmath
from dqkernels.config import LayerConfig

from .launch import Launcher
from .quantize import _INF_BITS, _MAGIC, _MAGIC_BITS, _TINY_BITS, _abs_bits, _codes, _load_row, _tensor_amax, device_of
from .weight_rules import (
    _CANDIDATES,
    _MSE,
    _TERNARY,
    _WIDTH,
    RULES,
    _best_step,
    _group_step,
    _judge,
    _mean,
    _row_amax_bits,
    _row_errors,
    _row_kept,
    _row_total,
    _rule_codes,
    _scale_of,
    _store_packed,
    _unit,
    _write_row,
)

_BLOCK = 2048  # codes of a row that a program holds at once
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_PROGRAMS = 1024  # of a launch that sums a whole matrix


@triton.jit
def _absmax_kernel(
    w_ptr,  # [N, K], row stride stride_w
    q_ptr,  # uint8 [ceil16(N), row_bytes]
    scale_ptr,  # fp32 [N], or [1] with amax_bits
    mult_ptr,  # uint8 [N, groups], or None
    amax_bits_ptr,  # int32 [1]: the maximum of the whole matrix (per_tensor), or None
    clip,  # fp32, +inf for none
    mult_limit,  # fp32, the largest multiplier
    n,
    k,
    stride_w,
    row_bytes,
    groups,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,  # -1: none
    BLOCK: tl.constexpr,
):
    """q = round(w * (L / amax)), scale = amax / L; with groups, amax / L = scale * multiplier, rounded up in places.

    A row per program, padding rows too. Zero rows have codes 0 and scale 0, non-finite ones codes 0 and scale NaN.
    """
    LEVELS: tl.constexpr = (1 << (BITS - 1)) - 1.0
    row = tl.program_id(0).to(tl.int64)
    w_row = w_ptr + row * stride_w
    q_row = q_ptr + row * row_bytes
    length = tl.where(row < n, k, 0)

    if amax_bits_ptr is None:
        bits = _row_amax_bits(w_row, length, BLOCK)
    else:
        bits = tl.load(amax_bits_ptr)
    amax, finite, usable = _judge(bits, clip)
    step = tl.div_rn(amax, LEVELS)
    if GROUP != -1:
        # The row's scale is its largest group step over the largest multiplier.
        step = tl.div_rn(step, mult_limit)
        usable = usable & (step.to(tl.int32, bitcast=True) >= _TINY_BITS)
        step = tl.where(usable, step, 1.0)
    scale = tl.where(finite, tl.where(usable, step, 0.0), float("nan"))
    if amax_bits_ptr is None:
        tl.store(scale_ptr + row, scale, mask=row < n)
    else:
        tl.store(scale_ptr, scale, mask=row == 0)

    inv = tl.div_rn(LEVELS, amax)
    for offset in range(0, row_bytes * 8 // BITS, BLOCK):
        if GROUP == -1:
            codes = _codes(_load_row(w_row, offset, length, BLOCK), inv, clip, usable, LEVELS)
        else:
            group = tl.arange(0, BLOCK // GROUP)
            at = offset + group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
            w = tl.load(w_row + at, mask=at < length, other=0.0).to(tl.float32)
            group_amax = tl.minimum(tl.max(_abs_bits(w), 1).to(tl.float32, bitcast=True), clip)
            is_zero = group_amax.to(tl.int32, bitcast=True) < _TINY_BITS
            ratio = tl.div_rn(tl.where(is_zero, 0.0, tl.div_rn(group_amax, LEVELS)), step)
            ratio = tl.where(usable, tl.minimum(tl.maximum(ratio, 1.0), mult_limit), 1.0)
            mult = (ratio + _MAGIC).to(tl.int32, bitcast=True) - _MAGIC_BITS
            group_at = offset // GROUP + group
            stored = group_at < tl.where(row < n, groups, 0)
            tl.store(mult_ptr + row * groups + group_at, mult.to(tl.uint8), mask=stored)
            group_inv = tl.div_rn(1.0, step * mult.to(tl.float32))
            codes = _codes(w, group_inv[:, None], clip, usable, LEVELS)
        _store_packed(q_row, codes, offset, row_bytes, BITS, BLOCK)


@triton.jit
def _row_kernel(
    w_ptr,  # [N, K], row stride stride_w
    q_ptr,  # uint8 [ceil16(N), row_bytes]
    scale_ptr,  # fp32 [N]
    clip,  # fp32, +inf for none
    n,
    k,
    stride_w,
    row_bytes,
    RULE: tl.constexpr,
    BITS: tl.constexpr,
    LEVELS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One step per row by the mse, ternary or four_level rule: maximum, sums, codes. A row per program, padding too."""
    row = tl.program_id(0).to(tl.int64)
    w_row = w_ptr + row * stride_w
    length = tl.where(row < n, k, 0)
    amax, finite, usable = _judge(_row_amax_bits(w_row, length, BLOCK), clip)
    unit = _unit(amax)
    used = tl.where(usable, length, 0)
    base = amax
    if RULE != _MSE:
        base = _mean(_row_total(w_row, used, unit, clip, BLOCK), tl.maximum(length, 1), unit)
    threshold = base * 0.7
    if RULE == _TERNARY:
        total, count = _row_kept(w_row, used, threshold, unit, clip, BLOCK)
        step = _mean(total, tl.maximum(count, 1), unit)
    else:
        errors = _row_errors(w_row, used, base, unit, clip, CANDIDATES, LEVELS, RULE, SHIFT, BLOCK)
        step = _best_step(errors, base, CANDIDATES, LEVELS, RULE)
    step = tl.where(usable, step, 0.0)
    tl.store(scale_ptr + row, _scale_of(step, finite, RULE), mask=row < n)
    _write_row(w_row, q_ptr + row * row_bytes, step, threshold, clip, length, row_bytes, BITS, LEVELS, RULE, BLOCK)


@triton.jit
def _group_step_kernel(
    w_ptr,  # [N, K], row stride stride_w
    step_ptr,  # fp32 [N, groups]
    threshold_ptr,  # fp32 [N, groups] for ternary, else None
    clip,  # fp32, +inf for none
    k,
    stride_w,
    groups,
    RULE: tl.constexpr,
    LEVELS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    SHIFT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each group's own step: 0 for zeros, NaN for what is not finite. BLOCK weights of a row per program."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
    at = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    w = tl.load(w_ptr + row * stride_w + at, mask=at < k, other=0.0).to(tl.float32)
    amax, finite, usable = _judge(tl.max(_abs_bits(w), 1), clip)
    w = tl.where(usable[:, None], tl.minimum(tl.maximum(w, -clip), clip), 0.0)
    count = tl.maximum(tl.minimum(k - group * GROUP, GROUP), 1)
    step, threshold = _group_step(w, at < k, count, amax, _unit(amax), CANDIDATES, LEVELS, RULE, SHIFT)
    step = tl.where(finite, tl.where(usable, step, 0.0), float("nan"))
    out = row * groups + group
    tl.store(step_ptr + out, step, mask=group < groups)
    if RULE == _TERNARY:
        tl.store(threshold_ptr + out, tl.where(usable, threshold, float("inf")), mask=group < groups)


@triton.jit
def _group_codes_kernel(
    w_ptr,  # [N, K], row stride stride_w
    step_ptr,  # fp32 [N, groups], from the kernel above
    threshold_ptr,  # fp32 [N, groups] for ternary, else None
    q_ptr,  # uint8 [ceil16(N), row_bytes]
    scale_ptr,  # fp32 [N]
    mult_ptr,  # uint8 [N, groups]
    clip,  # fp32, +inf for none
    mult_limit,  # fp32, the largest multiplier
    n,
    k,
    stride_w,
    row_bytes,
    groups,
    RULE: tl.constexpr,
    BITS: tl.constexpr,
    LEVELS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The row's scale is its largest step over the largest multiplier; steps become multiples of it, then codes."""
    GROUPS: tl.constexpr = BLOCK // GROUP
    row = tl.program_id(0).to(tl.int64)
    w_row = w_ptr + row * stride_w
    length = tl.where(row < n, k, 0)
    stored = tl.where(row < n, groups, 0)
    group = tl.arange(0, GROUPS)
    largest = tl.zeros([GROUPS], tl.int32)
    for first in range(0, stored, GROUPS):
        step = tl.load(step_ptr + row * groups + first + group, mask=first + group < stored, other=0.0)
        largest = tl.maximum(largest, _abs_bits(step))
    bits = tl.max(largest, 0)
    finite = bits < _INF_BITS
    row_step = tl.div_rn(tl.where(finite, bits.to(tl.float32, bitcast=True), 0.0), mult_limit)
    live = row_step.to(tl.int32, bitcast=True) >= _TINY_BITS
    tl.store(scale_ptr + row, _scale_of(tl.where(live, row_step, 0.0), finite, RULE), mask=row < n)
    row_step = tl.where(live, row_step, 1.0)
    for offset in range(0, row_bytes * 8 // BITS, BLOCK):
        number = offset // GROUP + group
        step = tl.load(step_ptr + row * groups + number, mask=number < stored, other=0.0)
        ratio = tl.minimum(tl.maximum(tl.div_rn(step, row_step), 1.0), mult_limit)
        mult = (tl.where(live, ratio, 1.0) + _MAGIC).to(tl.int32, bitcast=True) - _MAGIC_BITS
        tl.store(mult_ptr + row * groups + number, mult.to(tl.uint8), mask=number < stored)
        inv = tl.div_rn(1.0, row_step * mult.to(tl.float32))
        threshold = inv
        if RULE == _TERNARY:
            threshold = tl.load(threshold_ptr + row * groups + number, mask=number < stored, other=0.0)
        at = offset + group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        w = tl.load(w_row + at, mask=at < length, other=0.0).to(tl.float32)
        codes = _rule_codes(w, inv[:, None], threshold[:, None], clip, live, LEVELS, RULE)
        _store_packed(q_ptr + row * row_bytes, codes, offset, row_bytes, BITS, BLOCK)


# A whole matrix as one row: int64 sums at sums_ptr, zero before the first launch. [0]: the bits of amax, [1]: the sum
# of the magnitudes, [2:]: the squared errors of the candidates, or sum and number of the weights that ternary keeps.


@triton.jit(do_not_specialize=["n"])
def _tensor_total_kernel(w_ptr, sums_ptr, clip, n, k, stride_w, BLOCK: tl.constexpr):
    """sums[1] += the magnitudes of the rows of this program."""
    amax, finite, usable = _judge(tl.load(sums_ptr).to(tl.int32), clip)
    total = tl.full((), 0, tl.int64)
    w_row = w_ptr + tl.program_id(0).to(tl.int64) * stride_w
    for _ in range(tl.program_id(0), tl.where(usable, n, 0), tl.num_programs(0)):
        total += _row_total(w_row, k, _unit(amax), clip, BLOCK)
        w_row += tl.num_programs(0).to(tl.int64) * stride_w
    tl.atomic_add(sums_ptr + 1, total, sem="relaxed")


@triton.jit(do_not_specialize=["n"])
def _tensor_parts_kernel(
    w_ptr,
    sums_ptr,
    clip,
    n,
    k,
    stride_w,
    RULE: tl.constexpr,
    LEVELS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """sums[2:] += what the rows of this program have of the errors, or of the weights that ternary keeps."""
    amax, finite, usable = _judge(tl.load(sums_ptr).to(tl.int32), clip)
    unit = _unit(amax)
    base = amax
    if RULE != _MSE:
        base = _mean(tl.load(sums_ptr + 1), _elements(n, k), unit)
    number = tl.arange(0, _WIDTH)
    sums = tl.zeros([_WIDTH], tl.int64)
    w_row = w_ptr + tl.program_id(0).to(tl.int64) * stride_w
    for _ in range(tl.program_id(0), tl.where(usable, n, 0), tl.num_programs(0)):
        if RULE == _TERNARY:
            total, count = _row_kept(w_row, k, base * 0.7, unit, clip, BLOCK)
            sums += tl.where(number == 0, total, tl.where(number == 1, count.to(tl.int64), 0))
        else:
            sums += _row_errors(w_row, k, base, unit, clip, CANDIDATES, LEVELS, RULE, SHIFT, BLOCK)
        w_row += tl.num_programs(0).to(tl.int64) * stride_w
    WIDTH: tl.constexpr = 2 if RULE == _TERNARY else CANDIDATES
    tl.atomic_add(sums_ptr + 2 + number, sums, mask=number < WIDTH, sem="relaxed")


@triton.jit(do_not_specialize=["n"])
def _tensor_codes_kernel(
    w_ptr,
    sums_ptr,
    q_ptr,  # uint8 [ceil16(N), row_bytes]
    scale_ptr,  # fp32 [1]
    clip,
    n,
    k,
    stride_w,
    row_bytes,
    RULE: tl.constexpr,
    BITS: tl.constexpr,
    LEVELS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Every program finds the one step from the sums; a row per program, padding too."""
    row = tl.program_id(0).to(tl.int64)
    amax, finite, usable = _judge(tl.load(sums_ptr).to(tl.int32), clip)
    unit = _unit(amax)
    base = amax
    if RULE != _MSE:
        base = _mean(tl.load(sums_ptr + 1), _elements(n, k), unit)
    if RULE == _TERNARY:
        step = _mean(tl.load(sums_ptr + 2), tl.maximum(tl.load(sums_ptr + 3), 1), unit)
    else:
        number = tl.arange(0, _WIDTH)
        errors = tl.load(sums_ptr + 2 + number, mask=number < CANDIDATES, other=0)
        step = _best_step(errors, base, CANDIDATES, LEVELS, RULE)
    step = tl.where(usable, step, 0.0)
    tl.store(scale_ptr, _scale_of(step, finite, RULE), mask=row == 0)
    length = tl.where(row < n, k, 0)
    w_row, q_row = w_ptr + row * stride_w, q_ptr + row * row_bytes
    _write_row(w_row, q_row, step, base * 0.7, clip, length, row_bytes, BITS, LEVELS, RULE, BLOCK)


@triton.jit
def _elements(n, k):
    """n * k in int64."""
    return n.to(tl.int64) * k


_absmax = Launcher(_absmax_kernel)
_row = Launcher(_row_kernel)
_group_step_launch = Launcher(_group_step_kernel)
_group_codes = Launcher(_group_codes_kernel)
_tensor_total = Launcher(_tensor_total_kernel)
_tensor_parts = Launcher(_tensor_parts_kernel)
_tensor_codes = Launcher(_tensor_codes_kernel)


def launch_shape(k: int) -> dict:
    """BLOCK and num_warps for rows of k weights."""
    block = min(max(triton.next_power_of_2(k), 128), _BLOCK)
    return {"BLOCK": block, "num_warps": 4 if block > 512 else 1}


def quantize_weight(weight: torch.Tensor, layer: LayerConfig) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Quantizes and packs a matrix by the rule of `layer`.

    Args:
        weight: float [N, K], any float dtype, any strides.
        layer: the resolved choice; bits, quantizer, granularity, group_size and weight_clip are read.

    Returns:
        qweight uint8 [ceil16(N), ceil128(K) * bits / 8], scale fp32 [N] (or [1] under `per_tensor`), multipliers
        uint8 [N, ceil(K / group_size)] or None.

    Raises:
        ValueError: where `qmath.quantize_weight` does.
    """
    n, k = qmath.weight_shape(weight)
    if weight.dtype not in _DTYPES:
        weight = weight.float()
    if k > 1 and weight.stride(1) != 1:
        weight = weight.contiguous()
    device, per_tensor = weight.device, layer.granularity == "per_tensor"
    qweight = torch.empty(packing.packed_shape(n, k, layer.bits), dtype=torch.uint8, device=device)
    scale = torch.empty(1 if per_tensor else n, dtype=torch.float32, device=device)
    group_mult = None
    if layer.group_size != -1:
        group_mult = torch.empty(n, -(-k // layer.group_size), dtype=torch.uint8, device=device)
    if n == 0:
        return qweight, scale.zero_(), group_mult
    with device_of(weight):
        (_launch_absmax if layer.quantizer == "absmax" else _launch_rule)(weight, layer, qweight, scale, group_mult)
    return qweight, scale, group_mult


def _launch_absmax(weight, layer, qweight, scale, group_mult) -> None:
    (n, k), shape, amax_bits = weight.shape, launch_shape(weight.shape[1]), None
    if layer.granularity == "per_tensor":
        amax_bits = torch.zeros(1, dtype=torch.int32, device=weight.device)
        _tensor_amax((min(n, 512),), weight, amax_bits, n, k, weight.stride(0), **shape)
    _absmax(
        (qweight.shape[0],),
        weight,
        qweight,
        scale,
        group_mult,
        amax_bits,
        _clip(layer),
        float(1 if group_mult is None else qmath.mult_max(layer.bits, layer.quantizer, k)),
        n,
        k,
        weight.stride(0),
        qweight.shape[1],
        0 if group_mult is None else group_mult.shape[1],
        BITS=layer.bits,
        GROUP=layer.group_size,
        **shape,
    )


def _launch_rule(weight, layer, qweight, scale, group_mult) -> None:
    (n, k), clip, per_tensor = weight.shape, _clip(layer), layer.granularity == "per_tensor"
    shape, size = launch_shape(k), (n, k, weight.stride(0))
    rule = {"RULE": RULES[layer.quantizer], "LEVELS": float(qmath.quant_max(layer.bits, layer.quantizer))}
    search = {"CANDIDATES": _CANDIDATES[layer.quantizer]}
    bits = {"BITS": layer.bits}
    if group_mult is not None:
        groups, group = group_mult.shape[1], {"GROUP": layer.group_size}
        step = torch.empty(n, groups, dtype=torch.float32, device=weight.device)
        threshold = torch.empty_like(step) if layer.quantizer == "ternary" else None
        shift = {"SHIFT": qmath.error_shift(layer.group_size)}
        grid = n, triton.cdiv(groups, shape["BLOCK"] // layer.group_size)
        _group_step_launch(
            grid, weight, step, threshold, clip, *size[1:], groups, **rule, **search, **shift, **group, **shape
        )
        limit = float(qmath.mult_max(layer.bits, layer.quantizer, k))
        operands = weight, step, threshold, qweight, scale, group_mult, clip, limit
        _group_codes((len(qweight),), *operands, *size, qweight.shape[1], groups, **rule, **bits, **group, **shape)
        return
    shift = {"SHIFT": qmath.error_shift(n * k if per_tensor else k)}
    if not per_tensor:
        operands = weight, qweight, scale, clip
        _row((len(qweight),), *operands, *size, qweight.shape[1], **rule, **bits, **search, **shift, **shape)
        return
    sums = torch.zeros(2 + max(2, search["CANDIDATES"]), dtype=torch.int64, device=weight.device)
    grid = (min(n, _PROGRAMS),)
    _tensor_amax(grid, weight, sums.view(torch.int32)[:1], *size, **shape)
    if layer.quantizer != "mse":
        _tensor_total(grid, weight, sums, clip, *size, **shape)
    _tensor_parts(grid, weight, sums, clip, *size, **rule, **search, **shift, **shape)
    operands = weight, sums, qweight, scale, clip
    _tensor_codes((len(qweight),), *operands, *size, qweight.shape[1], **rule, **bits, **search, **shape)


def _clip(layer: LayerConfig) -> float:
    return math.inf if layer.weight_clip is None else float(layer.weight_clip)
