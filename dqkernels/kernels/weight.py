"""Weight quantizer in Triton: float master matrix to packed codes, scales and group multipliers, by the absmax rule.

It runs at every training step. Nothing but maxima is reduced, so the bits are those of `qmath.quantize_weight`.
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

_BLOCK = 2048  # codes of a row that a program holds at once
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


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
        best = tl.zeros([BLOCK], tl.int32)
        for offset in range(0, length, BLOCK):
            best = tl.maximum(best, _abs_bits(_load_row(w_row, offset, length, BLOCK)))
        bits = tl.max(best, 0)
    else:
        bits = tl.load(amax_bits_ptr)
    finite = bits < _INF_BITS  # judged on the raw weights, before the clip
    amax = tl.minimum(bits.to(tl.float32, bitcast=True), clip)
    usable = finite & (amax.to(tl.int32, bitcast=True) >= _TINY_BITS)
    amax = tl.where(usable, amax, 1.0)
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


_absmax = Launcher(_absmax_kernel)


def launch_shape(k: int) -> dict:
    """BLOCK and num_warps for rows of k weights."""
    block = min(max(triton.next_power_of_2(k), 128), _BLOCK)
    return {"BLOCK": block, "num_warps": 4 if block > 512 else 1}


def quantize_weight(weight: torch.Tensor, layer: LayerConfig) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Quantizes and packs a matrix by the absmax rule; one launch, two under `per_tensor`.

    Args:
        weight: float [N, K], any float dtype, any strides.
        layer: 4 or 8 bits, `absmax`; granularity, group_size and weight_clip are read.

    Returns:
        qweight uint8 [ceil16(N), ceil128(K) * bits / 8], scale fp32 [N] (or [1] under `per_tensor`), multipliers
        uint8 [N, ceil(K / group_size)] or None.

    Raises:
        ValueError: for another quantizer, and where `qmath.quantize_weight` does.
    """
    if layer.quantizer != "absmax":
        raise ValueError(f"quantizer must be 'absmax' in the Triton weight kernel, got {layer.quantizer!r}")
    n, k = qmath.weight_shape(weight)
    if weight.dtype not in _DTYPES:
        weight = weight.float()
    if k > 1 and weight.stride(1) != 1:
        weight = weight.contiguous()
    device, bits, per_tensor = weight.device, layer.bits, layer.granularity == "per_tensor"
    qweight = torch.empty(packing.packed_shape(n, k, bits), dtype=torch.uint8, device=device)
    scale = torch.empty(1 if per_tensor else n, dtype=torch.float32, device=device)
    groups, limit, group_mult = 0, 1, None
    if layer.group_size != -1:
        groups, limit = -(-k // layer.group_size), qmath.mult_max(bits, layer.quantizer, k)
        group_mult = torch.empty(n, groups, dtype=torch.uint8, device=device)
    if n == 0:
        return qweight, scale.zero_(), group_mult
    shape = launch_shape(k)
    with device_of(weight):
        amax_bits = None
        if per_tensor:
            amax_bits = torch.zeros(1, dtype=torch.int32, device=device)
            _tensor_amax((min(n, 512),), weight, amax_bits, n, k, weight.stride(0), **shape)
        _absmax(
            (qweight.shape[0],),
            weight,
            qweight,
            scale,
            group_mult,
            amax_bits,
            math.inf if layer.weight_clip is None else float(layer.weight_clip),
            float(limit),
            n,
            k,
            weight.stride(0),
            qweight.shape[1],
            groups,
            BITS=bits,
            GROUP=layer.group_size,
            **shape,
        )
    return qweight, scale, group_mult
