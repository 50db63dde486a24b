"""Weight quantizer with learned steps (LSQ) in Triton: float master matrix and steps to packed codes and scales.

The bits are those of `qmath.quantize_by_step`. One launch, or two with one step for the whole matrix.
Importing this file imports Triton; nothing imports it when the package is imported.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from dqkernels import packing, qmath

from .launch import Launcher
from .quantize import _INF_BITS, _abs_bits, _tensor_amax, device_of
from .weight import _DTYPES, launch_shape
from .weight_rules import _LIVE_BITS, RULES, _row_amax_bits, _scale_of, _write_row


@triton.jit
def _by_step_kernel(
    w_ptr,  # [N, K], row stride stride_w
    step_ptr,  # fp32 [N], or [1] under PER_TENSOR; NaN where nothing is to be quantized
    q_ptr,  # uint8 [ceil16(N), row_bytes]
    scale_ptr,  # fp32 as step_ptr
    clip,  # fp32, +inf for none
    n,
    k,
    stride_w,
    row_bytes,
    amax_bits_ptr,  # int32 [1]: the maximum of the whole matrix under PER_TENSOR, or None
    RULE: tl.constexpr,
    BITS: tl.constexpr,
    LEVELS: tl.constexpr,
    PER_TENSOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Codes by a step that is given. A row per program, padding too."""
    row = tl.program_id(0).to(tl.int64)
    w_row = w_ptr + row * stride_w
    length = tl.where(row < n, k, 0)
    if PER_TENSOR:
        bits = tl.load(amax_bits_ptr)
        step = tl.load(step_ptr)
    else:
        bits = _row_amax_bits(w_row, length, BLOCK)
        step = tl.load(step_ptr + row, mask=row < n, other=0.0)
    finite = (bits < _INF_BITS) & (_abs_bits(step) < _INF_BITS)
    step = tl.where(finite & (step.to(tl.int32, bitcast=True) >= _LIVE_BITS), step, 0.0)
    scale = _scale_of(step, finite, RULE)
    if PER_TENSOR:
        tl.store(scale_ptr, scale, mask=row == 0)
    else:
        tl.store(scale_ptr + row, scale, mask=row < n)
    used = tl.where(finite, length, 0)
    _write_row(w_row, q_ptr + row * row_bytes, step, step * 0.5, clip, used, row_bytes, BITS, LEVELS, RULE, BLOCK)


_by_step = Launcher(_by_step_kernel)


def quantize_by_step(
    weight: torch.Tensor, step: torch.Tensor, bits: int, quantizer: str, clip: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Packs a matrix by learned steps, as `qmath.quantize_by_step`.

    Args:
        weight: float [N, K], any float dtype, any strides.
        step: fp32 [N] or [1].

    Returns:
        qweight uint8 [ceil16(N), ceil128(K) * bits / 8], scale fp32 of step's shape.

    Raises:
        ValueError: where `qmath.quantize_by_step` does.
    """
    n, k = qmath.weight_shape(weight)
    if weight.dtype not in _DTYPES:
        weight = weight.float()
    if k > 1 and weight.stride(1) != 1:
        weight = weight.contiguous()
    per_tensor = step.numel() == 1
    qweight = torch.empty(packing.packed_shape(n, k, bits), dtype=torch.uint8, device=weight.device)
    scale = torch.empty_like(step, dtype=torch.float32)
    if n == 0:
        return qweight, scale.zero_()
    rule = "mse" if quantizer == "absmax" else quantizer
    shape, clip, amax_bits = launch_shape(k), math.inf if clip is None else float(clip), None
    with device_of(weight):
        if per_tensor:
            amax_bits = torch.zeros(1, dtype=torch.int32, device=weight.device)
            _tensor_amax((min(n, 512),), weight, amax_bits, n, k, weight.stride(0), **shape)
        operands = weight, step.contiguous(), qweight, scale, clip, n, k, weight.stride(0), qweight.shape[1]
        levels = float(qmath.quant_max(bits, rule))
        facts = {"RULE": RULES[rule], "BITS": bits, "LEVELS": levels, "PER_TENSOR": per_tensor}
        _by_step((len(qweight),), *operands, amax_bits, **facts, **shape)
    return qweight, scale
