"""The two backward GEMMs of a quantized linear in Triton, straight through the quantizers (paper.md section 1.5).

`grad_x = g . W^` and `grad_w = g^T . x^`, on the tensor cores of g's dtype with fp32 sums. W^ and x^ are dequantized
on the fly, from the packed codes and from the int8 activations of the forward pass, each value rounded once to g's
dtype. No split of the reduction: the order of the sums depends on shapes alone, so runs repeat bit for bit.

Importing this file imports Triton; nothing imports it when the package is imported.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import Launcher
from .quantize import device_of
from .rounding import _round_to


@triton.jit
def _add_product(a, b, acc, USE_ASM: tl.constexpr):
    """acc + a . b with b rounded once to a's dtype; in fp32 in the interpreter, whose dot misreads bf16."""
    b = _round_to(b, a.dtype, USE_ASM)
    if USE_ASM:
        return tl.dot(a, b, acc, input_precision="ieee")
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")


@triton.jit(do_not_specialize=["m"])
def _grad_input_kernel(
    g_ptr,  # float [M, N] contiguous
    w_ptr,  # uint8 [ceil16(N), row_bytes]
    weight_scale_ptr,  # fp32 [N], or [1] with TENSOR_SCALE
    mult_ptr,  # uint8 [N, groups], or None
    passed_ptr,  # uint8 [M, ceil(K / 8)]: bit k % 8 of byte k // 8 is 1 where the gradient passes; or None
    out_ptr,  # float [M, K] contiguous
    m,
    n,
    k,
    row_bytes,
    groups,
    BITS: tl.constexpr,
    FOUR_LEVEL: tl.constexpr,
    TENSOR_SCALE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    USE_ASM: tl.constexpr,  # False in the interpreter
):
    """out[M, K] = g . dequantized(W): each program takes one plane of BLOCK_K bytes, so its codes are one field."""
    PLANES: tl.constexpr = 8 // BITS
    RUN: tl.constexpr = 128 // PLANES  # bytes of a 128-block
    grid_m = tl.cdiv(m, BLOCK_M)
    rows_m = tl.program_id(0) % grid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    rest = tl.program_id(0) // grid_m
    plane = rest % PLANES
    at = rest // PLANES * BLOCK_K + tl.arange(0, BLOCK_K)
    columns = at // RUN * 128 + plane * RUN + at % RUN
    if mult_ptr is not None:
        SPAN: tl.constexpr = 32 if GROUP_SIZE == 32 else RUN  # bytes of a plane that share a multiplier
        spans = rest // PLANES * BLOCK_K + tl.arange(0, BLOCK_K // SPAN) * SPAN
        spans = spans // RUN * 128 + plane * RUN + spans % RUN  # the first column of each
    in_row = at < row_bytes
    in_m = rows_m < m
    g_rows = g_ptr + rows_m.to(tl.int64)[:, None] * n

    acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for start in range(0, n, BLOCK_N):
        rows_n = start + tl.arange(0, BLOCK_N)
        in_n = rows_n < n
        g = tl.load(g_rows + rows_n[None, :], mask=in_m[:, None] & in_n[None, :], other=0.0)
        where = in_n[:, None] & in_row[None, :]
        packed = tl.load(w_ptr + rows_n.to(tl.int64)[:, None] * row_bytes + at[None, :], mask=where, other=0)
        # The field to the top of 32 bits, and back down with its sign.
        level = (packed.to(tl.int32) << (32 - BITS - BITS * plane)) >> (32 - BITS)
        if FOUR_LEVEL:
            level = 2 * level + 1
        if mult_ptr is not None:
            # One multiplier for each SPAN codes: loaded once and spread, not once for every code.
            where = in_n[:, None] & (spans < k)[None, :]
            mults = mult_ptr + rows_n.to(tl.int64)[:, None] * groups + (spans // GROUP_SIZE)[None, :]
            mult = tl.load(mults, mask=where, other=0).to(tl.int32)
            level = tl.reshape(level, [BLOCK_N, BLOCK_K // SPAN, SPAN]) * mult[:, :, None]
            level = tl.reshape(level, [BLOCK_N, BLOCK_K])
        if TENSOR_SCALE:
            w = level.to(tl.float32) * tl.load(weight_scale_ptr)
        else:
            w = level.to(tl.float32) * tl.load(weight_scale_ptr + rows_n, mask=in_n, other=0.0)[:, None]
        acc = _add_product(g, w, acc, USE_ASM)

    in_k = columns < k
    if passed_ptr is not None:
        row_of_bits = passed_ptr + rows_m.to(tl.int64)[:, None] * tl.cdiv(k, 8)
        inside = in_m[:, None] & in_k[None, :]
        bits = tl.load(row_of_bits + (columns // 8)[None, :], mask=inside, other=0).to(tl.int32)
        acc = tl.where((bits >> (columns % 8)[None, :]) & 1 != 0, acc, 0.0)
    out = out_ptr + rows_m.to(tl.int64)[:, None] * k + columns[None, :]
    tl.store(out, _round_to(acc, out_ptr.dtype.element_ty, USE_ASM), mask=in_m[:, None] & in_k[None, :])


@triton.jit(do_not_specialize=["m"])
def _grad_weight_kernel(
    g_ptr,  # float [M, N] contiguous
    q_ptr,  # int8 [M, K] contiguous
    act_scale_ptr,  # fp32 [M]
    out_ptr,  # float [N, K] contiguous
    m,
    n,
    k,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    USE_ASM: tl.constexpr,  # False in the interpreter
):
    """out[N, K] = g^T . (q * act_scale)."""
    grid_n = tl.cdiv(n, BLOCK_N)
    rows_n = tl.program_id(0) % grid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.program_id(0) // grid_n * BLOCK_K + tl.arange(0, BLOCK_K)
    in_n, in_k = rows_n < n, columns < k
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for start in range(0, m, BLOCK_M):
        rows_m = start + tl.arange(0, BLOCK_M)
        in_m = rows_m < m
        rows = rows_m.to(tl.int64)
        g = tl.load(g_ptr + rows[None, :] * n + rows_n[:, None], mask=in_m[None, :] & in_n[:, None], other=0.0)
        q = tl.load(q_ptr + rows[:, None] * k + columns[None, :], mask=in_m[:, None] & in_k[None, :], other=0)
        x = q.to(tl.float32) * tl.load(act_scale_ptr + rows_m, mask=in_m, other=0.0)[:, None]
        acc = _add_product(g, x, acc, USE_ASM)
    out = out_ptr + rows_n.to(tl.int64)[:, None] * k + columns[None, :]
    tl.store(out, _round_to(acc, out_ptr.dtype.element_ty, USE_ASM), mask=in_n[:, None] & in_k[None, :])


_grad_input = Launcher(_grad_input_kernel)
_grad_weight = Launcher(_grad_weight_kernel)

# BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages. fp32 has no tensor core without rounding its operands first, so its
# tiles are small. tests/test_triton_compile.py compiles both for every architecture.
INPUT_TILE = {4: (32, 32, 64, 4, 2), 2: (128, 64, 128, 8, 3)}
WEIGHT_TILE = {4: (32, 32, 64, 4, 2), 2: (64, 128, 128, 8, 3)}


def blocks(tile: tuple[int, ...]) -> dict:
    """A tile as the keywords of a launch."""
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
    return {**dict(zip(names, tile, strict=True)), "USE_ASM": not _grad_input.interpreted}


def grad_input(
    g: torch.Tensor,
    qweight: torch.Tensor,
    weight_scale: torch.Tensor,
    group_mult: torch.Tensor | None,
    passed: torch.Tensor | None,
    *,
    bits: int,
    four_level: bool,
    group_size: int,
    in_features: int,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """grad_x [M, K] in `out_dtype`.

    Args:
        g: gradient of the pre-activation, fp32, fp16 or bf16 [M, N].
        qweight: uint8 [ceil16(N), ceil128(K) * bits / 8]. weight_scale: fp32 [N] or [1].
        group_mult: uint8 [N, G], or None.
        passed: uint8 [M, ceil(K / 8)], bit k % 8 of byte k // 8 set where x was inside the clip; None for no clip.
    """
    m, n = g.shape
    out = torch.empty(m, in_features, dtype=out_dtype, device=g.device)
    if m == 0 or in_features == 0:
        return out
    tile = blocks(INPUT_TILE[g.element_size()])
    row_bytes = qweight.shape[1]
    programs = triton.cdiv(m, tile["BLOCK_M"]) * triton.cdiv(row_bytes, tile["BLOCK_K"]) * (8 // bits)
    with device_of(g):
        _grad_input(
            (programs,),
            g.contiguous(),
            qweight.contiguous(),
            weight_scale.contiguous(),
            None if group_mult is None else group_mult.contiguous(),
            None if passed is None else passed.contiguous(),
            out,
            m,
            n,
            in_features,
            row_bytes,
            0 if group_mult is None else group_mult.shape[1],
            BITS=bits,
            FOUR_LEVEL=four_level,
            TENSOR_SCALE=weight_scale.numel() == 1,
            GROUP_SIZE=group_size,
            **tile,
        )
    return out


def grad_weight(g: torch.Tensor, q: torch.Tensor, act_scale: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """grad_w [N, K] in `out_dtype`, of g float [M, N] and the forward's int8 q [M, K] with act_scale fp32 [M]."""
    (m, n), k = g.shape, q.shape[1]
    out = torch.empty(n, k, dtype=out_dtype, device=g.device)
    if n == 0 or k == 0:
        return out
    tile = blocks(WEIGHT_TILE[g.element_size()])
    programs = triton.cdiv(n, tile["BLOCK_N"]) * triton.cdiv(k, tile["BLOCK_K"])
    with device_of(g):
        _grad_weight((programs,), g.contiguous(), q.contiguous(), act_scale.contiguous(), out, m, n, k, **tile)
    return out
