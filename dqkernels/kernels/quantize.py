"""Row quantizer in Triton: fp32/fp16/bf16 rows to int8 codes, one fp32 scale per row, and the sum of the codes.

Importing this file imports Triton; nothing imports it when the package is imported.
"""

from __future__ import annotations

import contextlib
import functools
import math

import torch
import triton
import triton.language as tl

from .launch import Bound, Launcher

# The bit pattern of +inf. Non-negative floats order like their bits, so one integer max finds amax, and a maximum
# at or above this one says that the row holds an Inf or a NaN (a float max would drop the NaN).
_INF_BITS = tl.constexpr(0x7F800000)
# The bit pattern of 2^-100. A row below it counts as zero, so 127 / amax never overflows.
_TINY_BITS = tl.constexpr(27 << 23)
# 1.5 * 2^23: adding it rounds |x| < 2^22 to an integer, half to even, and leaves it in the low mantissa bits.
_MAGIC = tl.constexpr(12582912.0)
_MAGIC_BITS = tl.constexpr(0x4B400000)

_MODES = {"per_token": 0, "per_tensor": 1, "static": 2}
_ONE_BLOCK = 8192  # the longest row kept in registers between the two passes (32 values per thread)
_MANY_BLOCKS = 4096


@triton.jit
def _load_row(x_row, offset, k, BLOCK: tl.constexpr):
    cols = offset + tl.arange(0, BLOCK)
    return tl.load(x_row + cols, mask=cols < k, other=0.0).to(tl.float32)


@triton.jit
def _abs_bits(x):
    """|x| as an integer that orders like it, NaN above Inf above the rest."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _row_scale(bits, act_scale_ptr, clip, MODE: tl.constexpr):
    """Of a row whose largest |x| has these bits: the scale to store, the factor `inv`, and whether it has codes."""
    finite = bits < _INF_BITS  # judged on the raw input, before the clip
    if MODE == 2:
        scale = tl.load(act_scale_ptr)
        inv = tl.div_rn(1.0, scale)
        usable = finite
    else:
        # The clip is symmetric, so max|clip(x)| = min(max|x|, clip).
        amax = tl.minimum(bits.to(tl.float32, bitcast=True), clip)
        usable = finite & (amax.to(tl.int32, bitcast=True) >= _TINY_BITS)
        amax = tl.where(usable, amax, 127.0)  # a zero row has scale 1
        scale = tl.div_rn(amax, 127.0)
        inv = tl.div_rn(127.0, amax)
    return tl.where(finite, scale, float("nan")), inv, usable


@triton.jit
def _codes(x, inv, clip, usable, LIMIT: tl.constexpr = 127.0):
    """round_half_even(clamp(clip(x) * inv, -LIMIT, LIMIT)) as int32, or 0 where not usable."""
    x = tl.minimum(tl.maximum(x, -clip), clip)
    scaled = tl.minimum(tl.maximum(x * inv, -LIMIT), LIMIT)
    # Reading the integer off the bits of the sum replaces the subtraction, so no compiler can fold the pair away.
    rounded = (scaled + _MAGIC).to(tl.int32, bitcast=True) - _MAGIC_BITS
    return tl.where(usable, rounded, 0)


@triton.jit
def _store_codes(q_row, codes, offset, k, BLOCK: tl.constexpr):
    cols = offset + tl.arange(0, BLOCK)
    tl.store(q_row + cols, codes.to(tl.int8), mask=cols < k)


@triton.jit(do_not_specialize=["m"])
def _tensor_amax_kernel(
    x_ptr,  # [M, K], row stride stride_x
    amax_bits_ptr,  # int32 [1], zero before the launch
    m,
    k,
    stride_x,
    BLOCK: tl.constexpr,
):
    """amax_bits = max of the bits of |x| over the tensor; an integer max has no order, so runs agree."""
    best = tl.zeros([BLOCK], tl.int32)
    x_row = x_ptr + tl.program_id(0).to(tl.int64) * stride_x
    for _ in range(tl.program_id(0), m, tl.num_programs(0)):
        for offset in range(0, k, BLOCK):
            best = tl.maximum(best, _abs_bits(_load_row(x_row, offset, k, BLOCK)))
        x_row += tl.num_programs(0).to(tl.int64) * stride_x
    tl.atomic_max(amax_bits_ptr, tl.max(best, 0), sem="relaxed")


@triton.jit
def _quantize_kernel(
    x_ptr,  # [M, K], row stride stride_x
    q_ptr,  # int8 [M, K] contiguous
    scale_ptr,  # fp32 [M]
    row_sum_ptr,  # int32 [M], or None
    act_scale_ptr,  # fp32 [1] for static, else None
    amax_bits_ptr,  # int32 [1] for per_tensor, else None
    clip,  # fp32, +inf for none
    k,
    stride_x,
    MODE: tl.constexpr,
    BLOCK: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
):
    """q = round_half_even(clamp(x * inv, -127, 127)), inv = 127 / amax, scale = amax / 127; a row per program."""
    row = tl.program_id(0).to(tl.int64)
    x_row = x_ptr + row * stride_x
    q_row = q_ptr + row * k

    if ONE_BLOCK:
        x = _load_row(x_row, 0, k, BLOCK)
    if MODE == 1:
        bits = tl.load(amax_bits_ptr)
    elif ONE_BLOCK:
        bits = tl.max(_abs_bits(x), 0)
    else:
        best = tl.zeros([BLOCK], tl.int32)
        for offset in range(0, k, BLOCK):
            best = tl.maximum(best, _abs_bits(_load_row(x_row, offset, k, BLOCK)))
        bits = tl.max(best, 0)

    scale, inv, usable = _row_scale(bits, act_scale_ptr, clip, MODE)
    tl.store(scale_ptr + row, scale)

    if ONE_BLOCK:
        codes = _codes(x, inv, clip, usable)
        _store_codes(q_row, codes, 0, k, BLOCK)
        if row_sum_ptr is not None:
            tl.store(row_sum_ptr + row, tl.sum(codes, 0))
    else:
        total = tl.zeros([BLOCK], tl.int32)
        for offset in range(0, k, BLOCK):
            codes = _codes(_load_row(x_row, offset, k, BLOCK), inv, clip, usable)
            _store_codes(q_row, codes, offset, k, BLOCK)
            total += codes
        if row_sum_ptr is not None:
            tl.store(row_sum_ptr + row, tl.sum(total, 0))


_tensor_amax = Launcher(_tensor_amax_kernel)
_quantize = Launcher(_quantize_kernel)


@functools.lru_cache(maxsize=4096)
def _plan(m, k, stride_x, dtype, device, mode, want_sum) -> Bound:
    """The launch of `_quantize` for these facts."""
    return _quantize.bind((m,), MODE=_MODES[mode], **launch_shape(k))


def launch_shape(k: int) -> dict:
    """BLOCK, ONE_BLOCK and num_warps for rows of k elements."""
    one_block = k <= _ONE_BLOCK
    block = max(triton.next_power_of_2(k), 128) if one_block else _MANY_BLOCKS
    return {"BLOCK": block, "ONE_BLOCK": one_block, "num_warps": 4 if block <= 2048 else 8}


_HERE = contextlib.nullcontext()


def device_of(x: torch.Tensor):
    """Triton launches on the current device; this makes the tensor's device the current one."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(x.device)


def quantize_activation(
    x: torch.Tensor,
    mode: str,
    clip: float | None = None,
    act_scale: torch.Tensor | None = None,
    want_sum: bool = False,
    amax_bits: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantizes rows along the last dimension.

    Args:
        x: fp32, fp16 or bf16 [..., K], any strides; left unchanged.
        mode: "per_token", "per_tensor" (the whole tensor is one row) or "static".
        clip: inputs are clipped to [-clip, clip] before the maximum is taken; None for no clip.
        act_scale: fp32, one element, for "static" only.
        want_sum: also return the int32 sum of each row's codes.
        amax_bits: int32 [1], the largest bit pattern of |x|, for "per_tensor" where the producer of x took it.

    Returns:
        int8 codes [..., K], fp32 scale [...], int32 row sums [...] (or [0] without `want_sum`).
    """
    lead, k = x.shape[:-1], x.shape[-1]
    rows = x if x.dim() == 2 else x.reshape(math.prod(lead), k)
    q, scale, row_sum = quantize_rows(rows, mode, clip, act_scale, want_sum, amax_bits)
    if row_sum is None:
        row_sum = torch.empty(0, dtype=torch.int32, device=x.device)
    elif x.dim() != 2:
        row_sum = row_sum.reshape(lead)
    return (q, scale, row_sum) if x.dim() == 2 else (q.reshape(x.shape), scale.reshape(lead), row_sum)


def quantize_rows(
    rows: torch.Tensor,
    mode: str,
    clip: float | None = None,
    act_scale: torch.Tensor | None = None,
    want_sum: bool = False,
    amax_bits: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """`quantize_activation` of a matrix [M, K], with None for sums that are not wanted."""
    m, k = rows.shape
    device = rows.device
    q = torch.empty(m, k, dtype=torch.int8, device=device)
    scale = torch.empty(m, dtype=torch.float32, device=device)
    row_sum = torch.empty(m, dtype=torch.int32, device=device) if want_sum else None
    if m == 0:
        return q, scale, row_sum
    if k > 1 and rows.stride(1) != 1:
        rows = rows.contiguous()
    stride = rows.stride(0) if m > 1 else k  # of a single row torch may say anything
    with device_of(rows):
        if mode == "per_tensor" and amax_bits is None:
            amax_bits, shape = torch.zeros(1, dtype=torch.int32, device=device), launch_shape(k)
            _tensor_amax(
                (min(m, 512),),
                rows,
                amax_bits,
                m,
                k,
                stride,
                BLOCK=min(shape["BLOCK"], _MANY_BLOCKS),
                num_warps=shape["num_warps"],
            )
        _plan(m, k, stride, rows.dtype, device, mode, want_sum)(
            rows,
            q,
            scale,
            row_sum,
            act_scale if mode == "static" else None,
            amax_bits,
            math.inf if clip is None else float(clip),
            k,
            stride,
        )
    return q, scale, row_sum
