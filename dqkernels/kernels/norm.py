"""LayerNorm (+ residual) and GELU fused with the row quantizer, in Triton.

Inside in fp32; y is rounded to x's dtype first and then quantized, by the helpers of the plain quantizer: codes,
scales and sums are exactly those of `quantize_activation(y)`.

Importing this file imports Triton; nothing imports it when the package is imported.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl

from . import quantize
from .launch import Bound, Launcher
from .quantize import _abs_bits, _codes, _load_row, _row_scale, _store_codes, device_of, launch_shape
from .rounding import _add, _round_to


@triton.jit
def _load_sum(x_row, residual_ptr, residual_at, offset, k, BLOCK: tl.constexpr):
    """One block of x + residual in fp32, 0 past the row's end."""
    t = _load_row(x_row, offset, k, BLOCK)
    if residual_ptr is not None:
        t += _load_row(residual_ptr + residual_at, offset, k, BLOCK)
    return t


@triton.jit
def _deviation(t, mean, offset, k, BLOCK: tl.constexpr):
    """t - mean, 0 past the row's end."""
    return tl.where(offset + tl.arange(0, BLOCK) < k, t - mean, 0.0)


@triton.jit
def _normalize(d, rest, rstd, weight_ptr, bias_ptr, y_row, offset, k, BLOCK: tl.constexpr, USE_ASM: tl.constexpr):
    """y = (d - rest) * rstd * weight + bias, rounded to the dtype of y_row and 0 past the row's end."""
    y = (d - rest) * rstd * _load_row(weight_ptr, offset, k, BLOCK)
    if bias_ptr is not None:
        y = _add(y, _load_row(bias_ptr, offset, k, BLOCK), USE_ASM)
    y = tl.where(offset + tl.arange(0, BLOCK) < k, y, 0.0)
    return _round_to(y, y_row.dtype.element_ty, USE_ASM)


@triton.jit
def _layernorm_kernel(
    x_ptr,  # [M, K], row stride stride_x
    residual_ptr,  # [M, K], row stride stride_residual, or None
    weight_ptr,  # [K]
    bias_ptr,  # [K], or None
    y_ptr,  # [M, K] contiguous, in x's dtype
    q_ptr,  # int8 [M, K] contiguous; the rest up to amax_bits_ptr as in the quantizer
    scale_ptr,
    row_sum_ptr,
    act_scale_ptr,
    amax_bits_ptr,  # int32 [1], zero before the launch, under per_tensor; else None
    eps,  # fp32
    clip,  # fp32, +inf for none
    length,  # fp32(K)
    k,
    stride_x,
    stride_residual,
    MODE: tl.constexpr,
    BLOCK: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    """y = (t - mean) / sqrt(var + eps) * weight + bias with t = x + residual, and its codes; a row per program.

    Under per_tensor the codes need the maximum of every row: this launch only collects it.
    """
    row = tl.program_id(0).to(tl.int64)
    x_row = x_ptr + row * stride_x
    residual_at = row * stride_residual
    y_row = y_ptr + row * k
    cols = tl.arange(0, BLOCK)

    # A second pass over t - mean: E[t^2] - E[t]^2 cancels where |mean| is large. The same pass sums t - mean, which
    # tells what the rounding of `mean` left over.
    if ONE_BLOCK:
        t = _load_sum(x_row, residual_ptr, residual_at, 0, k, BLOCK)
        mean = tl.div_rn(tl.sum(t, 0), length)
        d = _deviation(t, mean, 0, k, BLOCK)
        rest = tl.sum(d, 0)
        var = tl.sum(d * d, 0)
    else:
        total = tl.zeros([BLOCK], tl.float32)
        for offset in range(0, k, BLOCK):
            total += _load_sum(x_row, residual_ptr, residual_at, offset, k, BLOCK)
        mean = tl.div_rn(tl.sum(total, 0), length)
        total = tl.zeros([BLOCK], tl.float32)
        squares = tl.zeros([BLOCK], tl.float32)
        for offset in range(0, k, BLOCK):
            d = _deviation(_load_sum(x_row, residual_ptr, residual_at, offset, k, BLOCK), mean, offset, k, BLOCK)
            total += d
            squares += d * d
        rest = tl.sum(total, 0)
        var = tl.sum(squares, 0)
    rest = tl.div_rn(rest, length)
    var = tl.div_rn(var, length) - rest * rest
    var = tl.where(var < 0.0, 0.0, var)  # keeps NaN, which tl.maximum drops
    rstd = tl.div_rn(1.0, tl.sqrt_rn(var + eps))

    if ONE_BLOCK:
        y = _normalize(d, rest, rstd, weight_ptr, bias_ptr, y_row, 0, k, BLOCK, USE_ASM)
        tl.store(y_row + cols, y, mask=cols < k)
        bits = tl.max(_abs_bits(y.to(tl.float32)), 0)
    else:
        best = tl.zeros([BLOCK], tl.int32)
        for offset in range(0, k, BLOCK):
            d = _load_sum(x_row, residual_ptr, residual_at, offset, k, BLOCK) - mean
            y = _normalize(d, rest, rstd, weight_ptr, bias_ptr, y_row, offset, k, BLOCK, USE_ASM)
            tl.store(y_row + offset + cols, y, mask=offset + cols < k)
            best = tl.maximum(best, _abs_bits(y.to(tl.float32)))
        bits = tl.max(best, 0)

    if MODE == 1:
        tl.atomic_max(amax_bits_ptr, bits, sem="relaxed")
    else:
        scale, inv, usable = _row_scale(bits, act_scale_ptr, clip, MODE)
        tl.store(scale_ptr + row, scale)
        if ONE_BLOCK:
            codes = _codes(y.to(tl.float32), inv, clip, usable)
            _store_codes(q_ptr + row * k, codes, 0, k, BLOCK)
            if row_sum_ptr is not None:
                tl.store(row_sum_ptr + row, tl.sum(codes, 0))
        else:
            total_codes = tl.zeros([BLOCK], tl.int32)
            for offset in range(0, k, BLOCK):
                # The same steps on the same numbers: the same y, without waiting for the stores above.
                d = _load_sum(x_row, residual_ptr, residual_at, offset, k, BLOCK) - mean
                y = _normalize(d, rest, rstd, weight_ptr, bias_ptr, y_row, offset, k, BLOCK, USE_ASM)
                codes = _codes(y.to(tl.float32), inv, clip, usable)
                _store_codes(q_ptr + row * k, codes, offset, k, BLOCK)
                total_codes += codes
            if row_sum_ptr is not None:
                tl.store(row_sum_ptr + row, tl.sum(total_codes, 0))


@triton.jit
def _gelu(x, dtype: tl.constexpr, USE_ASM: tl.constexpr):
    """x / 2 * (1 + erf(x / sqrt(2))) of fp32 x, rounded to `dtype`."""
    one = tl.full(x.shape, 1.0, tl.float32)
    y = 0.5 * x * _add(tl.math.erf(x * 0.7071067811865476), one, USE_ASM)
    return _round_to(y, dtype, USE_ASM)


@triton.jit
def _load_gelu(x_row, offset, k, BLOCK: tl.constexpr, USE_ASM: tl.constexpr):
    """GELU of one block, rounded to x's dtype and widened again; 0 past the row's end, as GELU(0) is."""
    return _gelu(_load_row(x_row, offset, k, BLOCK), x_row.dtype.element_ty, USE_ASM).to(tl.float32)


@triton.jit
def _gelu_kernel(
    x_ptr,  # [M, K], row stride stride_x
    q_ptr,  # int8 [M, K] contiguous; the rest up to amax_bits_ptr as in the quantizer
    scale_ptr,
    row_sum_ptr,
    act_scale_ptr,
    amax_bits_ptr,  # int32 [1] under per_tensor, else None
    clip,  # fp32, +inf for none
    k,
    stride_x,
    MODE: tl.constexpr,
    AMAX_ONLY: tl.constexpr,  # the first launch of per_tensor: only the maximum is taken
    BLOCK: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    """The codes of GELU(x); a row per program. What does not fit in registers is computed a second time."""
    row = tl.program_id(0).to(tl.int64)
    x_row = x_ptr + row * stride_x

    if ONE_BLOCK:
        y = _load_gelu(x_row, 0, k, BLOCK, USE_ASM)
    if MODE == 1:
        bits = tl.load(amax_bits_ptr)
    elif ONE_BLOCK:
        bits = tl.max(_abs_bits(y), 0)
    else:
        best = tl.zeros([BLOCK], tl.int32)
        for offset in range(0, k, BLOCK):
            best = tl.maximum(best, _abs_bits(_load_gelu(x_row, offset, k, BLOCK, USE_ASM)))
        bits = tl.max(best, 0)

    if AMAX_ONLY:
        tl.atomic_max(amax_bits_ptr, bits, sem="relaxed")
    else:
        scale, inv, usable = _row_scale(bits, act_scale_ptr, clip, MODE)
        tl.store(scale_ptr + row, scale)
        if ONE_BLOCK:
            codes = _codes(y, inv, clip, usable)
            _store_codes(q_ptr + row * k, codes, 0, k, BLOCK)
            if row_sum_ptr is not None:
                tl.store(row_sum_ptr + row, tl.sum(codes, 0))
        else:
            total = tl.zeros([BLOCK], tl.int32)
            for offset in range(0, k, BLOCK):
                codes = _codes(_load_gelu(x_row, offset, k, BLOCK, USE_ASM), inv, clip, usable)
                _store_codes(q_ptr + row * k, codes, offset, k, BLOCK)
                total += codes
            if row_sum_ptr is not None:
                tl.store(row_sum_ptr + row, tl.sum(total, 0))


_layernorm = Launcher(_layernorm_kernel)
_gelu_quantize = Launcher(_gelu_kernel)


@functools.lru_cache(maxsize=4096)
def _layernorm_plan(m, k, stride_x, stride_residual, dtype, residual, weight, bias, device, mode, want_sum) -> Bound:
    """The launch for these facts, dtypes (or None) among them."""
    return _layernorm.bind((m,), MODE=quantize._MODES[mode], USE_ASM=not _layernorm.interpreted, **launch_shape(k))


@functools.lru_cache(maxsize=4096)
def _gelu_plan(m, k, stride_x, dtype, device, mode, want_sum) -> Bound:
    """The launch for these facts; mode None: only the maximum is taken."""
    return _gelu_quantize.bind(
        (m,),
        MODE=0 if mode is None else quantize._MODES[mode],
        AMAX_ONLY=mode is None,
        USE_ASM=not _gelu_quantize.interpreted,
        **launch_shape(k),
    )


def _vector(values: torch.Tensor) -> torch.Tensor:
    """As `_alike`, of a weight or a bias [K]."""
    if values.shape[0] % 16 == 0 and values.stride(0) == 1 and values.data_ptr() % 16 == 0:
        return values
    return _alike(values.reshape(1, -1))


def _alike(rows: torch.Tensor) -> torch.Tensor:
    """`rows` [M, K], or a copy of it, whose alignment follows from K alone.

    The compiler picks a layout by what it knows of the alignment, and with it the order of a sum: a row that starts
    elsewhere in memory would get other last bits.
    """
    if rows.shape[1] % 16:
        return rows.contiguous()
    if rows.stride(1) == 1 and rows.stride(0) % 16 == 0 and rows.data_ptr() % 16 == 0:
        return rows
    return rows.clone(memory_format=torch.contiguous_format)


def _stride(rows: torch.Tensor) -> int:
    """Of a single row torch may say anything."""
    return rows.stride(0) if rows.shape[0] > 1 else rows.shape[1]


def _outputs(x: torch.Tensor, want_sum: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scale and row sums to be filled."""
    lead = x.shape[:-1]
    return (
        torch.empty(x.shape, dtype=torch.int8, device=x.device),
        torch.empty(lead, dtype=torch.float32, device=x.device),
        torch.empty(lead if want_sum else (0,), dtype=torch.int32, device=x.device),
    )


def layernorm_quantize(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    mode: str,
    clip: float | None = None,
    act_scale: torch.Tensor | None = None,
    want_sum: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """LayerNorm of `x (+ residual)` along the last dimension, and its int8 form.

    A row's bits depend on that row, `weight`, `bias` and K, not on the batch or the strides around it. One launch;
    two under `per_tensor`, whose scale needs every row.

    Args:
        x: fp32, fp16 or bf16 [..., K], any strides. residual: float [..., K] or None.
        weight: float [K]. bias: float [K] or None.
        mode, clip, act_scale, want_sum: as in `quantize_activation`.

    Returns:
        y [..., K] in x's dtype, then q, scale and row_sum of `quantize_activation(y)`.
    """
    k = x.shape[-1]
    m = math.prod(x.shape[:-1])
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    per_tensor = mode == "per_tensor"
    q, scale, row_sum = (None, None, None) if per_tensor and m else _outputs(x, want_sum)
    if m == 0:
        return y, q, scale, row_sum
    rows = _alike(x if x.dim() == 2 else x.reshape(m, k))
    added = None if residual is None else _alike(residual if residual.dim() == 2 else residual.reshape(m, k))
    strides = _stride(rows), 0 if added is None else _stride(added)
    amax_bits = torch.zeros(1, dtype=torch.int32, device=x.device) if per_tensor else None
    plan = _layernorm_plan(
        m,
        k,
        *strides,
        x.dtype,
        None if added is None else added.dtype,
        weight.dtype,
        None if bias is None else bias.dtype,
        x.device,
        mode,
        want_sum,
    )
    with device_of(x):
        plan(
            rows,
            added,
            _vector(weight),
            None if bias is None else _vector(bias),
            y,
            q,
            scale,
            row_sum if want_sum else None,
            act_scale if mode == "static" else None,
            amax_bits,
            float(eps),
            math.inf if clip is None else float(clip),
            float(k),
            k,
            *strides,
        )
    if per_tensor:
        q, scale, row_sum = quantize.quantize_activation(y, mode, clip, None, want_sum, amax_bits)
    return y, q, scale, row_sum


def gelu_quantize(
    x: torch.Tensor, mode: str, clip: float | None = None, act_scale: torch.Tensor | None = None, want_sum: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """GELU (erf form) of x [..., K], rounded to x's dtype, and then quantized.

    The arguments and results of `quantize_activation`. One launch; two under `per_tensor`.
    """
    k = x.shape[-1]
    m = math.prod(x.shape[:-1])
    q, scale, row_sum = _outputs(x, want_sum)
    if m == 0:
        return q, scale, row_sum
    rows = x if x.dim() == 2 else x.reshape(m, k)
    if k > 1 and rows.stride(1) != 1:
        rows = rows.contiguous()
    limit, stride = math.inf if clip is None else float(clip), _stride(rows)
    facts = (m, k, stride, x.dtype, x.device)
    with device_of(x):
        amax_bits = None
        if mode == "per_tensor":
            amax_bits = torch.zeros(1, dtype=torch.int32, device=x.device)
            _gelu_plan(*facts, None, False)(rows, None, None, None, None, amax_bits, limit, k, stride)
        _gelu_plan(*facts, mode, want_sum)(
            rows,
            q,
            scale,
            row_sum if want_sum else None,
            act_scale if mode == "static" else None,
            amax_bits,
            limit,
            k,
            stride,
        )
    return q, scale, row_sum
