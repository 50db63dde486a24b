"""W2/W4/W8 x A8 GEMM in Triton with its epilogue: Y[M, N] = epilogue(Xq[M, K] . Wq[N, K]^T).

Weights stay packed (planar format v1) until they are in registers, where one shift and one mask per four codes put
each plane into the top bits of its bytes: code * 2^(8 - bits). The power of two comes off the exact int32 sum.
The weight tile is the left operand of the dot, so the accumulator is a tile of Y^T: sm_90 then feeds wgmma from
registers, with no trip of the unpacked weights through shared memory.

Importing this file imports Triton; nothing imports it when the package is imported.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .quantize import device_of

_ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2}
_MAX_K = 131_071  # int32 holds K * 127 * 128 up to here


@triton.jit
def _top_bits(packed, PLANE: tl.constexpr, BITS: tl.constexpr, USE_ASM: tl.constexpr):
    """uint8 holding 8 / BITS planes -> int8 code * 2^(8 - BITS) of one plane."""
    SHIFT: tl.constexpr = 8 - BITS - BITS * PLANE
    MASK: tl.constexpr = 0xFF & ~((1 << (8 - BITS)) - 1)
    if BITS == 8:
        return packed.to(tl.int8, bitcast=True)
    elif USE_ASM:
        # Four bytes per 32-bit register: bits shifted over from the byte below land under the mask. Plain
        # operators mean the same, but cost up to 10 PRMT per IMMA, since the compiler widens each byte.
        return tl.inline_asm_elementwise(
            f"shl.b32 $0, $1, {SHIFT}; and.b32 $0, $0, {MASK * 0x01010101};",
            "=r,r",
            [packed],
            dtype=tl.int8,
            is_pure=True,
            pack=4,
        )
    else:
        return ((packed << SHIFT) & MASK).to(tl.int8, bitcast=True)


@triton.jit
def _add(a, b, USE_ASM: tl.constexpr):
    """a + b, rounded on its own.

    Spelled as an instruction because LLVM pairs plain adds and multiplies into f32x2 on sm_100 and sm_120, and
    ptxas 12.9 (Triton 3.6) then contracts the pairs into FFMA2 in spite of `.rn` and `--fmad=false`.
    """
    if USE_ASM:
        a, b = tl.broadcast(a, b)
        return tl.inline_asm_elementwise(
            "add.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return a + b


@triton.jit
def _round_to(t, dtype: tl.constexpr, USE_ASM: tl.constexpr):
    """One round-to-nearest-even to `dtype`; spelled out for bf16 in the interpreter, which truncates."""
    if dtype == tl.bfloat16 and not USE_ASM:
        bits = t.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(t == t, rounded, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return t.to(dtype)


@triton.jit
def _gemm_kernel(
    x_ptr,  # int8 [M, K] contiguous
    act_scale_ptr,  # fp32 [M]
    row_sum_ptr,  # int32 [M] for four_level, else None
    w_ptr,  # uint8 [ceil16(N), row_bytes]
    weight_scale_ptr,  # fp32 [N], or [1] with TENSOR_SCALE
    bias_ptr,  # float [N], or None
    residual_ptr,  # float [M, N] contiguous, or None
    y_ptr,  # float [M, N] contiguous
    m,
    n,
    k,
    row_bytes,
    BITS: tl.constexpr,
    FOUR_LEVEL: tl.constexpr,
    TENSOR_SCALE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EVEN_K: tl.constexpr,  # K is a multiple of BLOCK_K: no mask along K
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    USE_ASM: tl.constexpr,  # False in the interpreter, which has no inline assembly
):
    """Y = act(float(acc) * act_scale[m] * weight_scale[n] + bias[n]) + residual, each step rounded on its own."""
    # 8-bit codes have one plane; two half-K dots keep two dots per loop body. With a single one, Triton 3.8 and
    # 3.9 split the int8 fragments into bytes on sm_80 and spill.
    PLANES: tl.constexpr = 8 // BITS
    DOTS: tl.constexpr = 2 if BITS == 8 else PLANES
    RUN: tl.constexpr = 64 if BITS == 8 else 128 // PLANES  # consecutive codes that one dot takes from a 128-block
    SPAN: tl.constexpr = BLOCK_K // DOTS

    grid_m = tl.cdiv(m, BLOCK_M)
    pid_m = tl.program_id(0) % grid_m  # neighbours share a weight tile
    pid_n = tl.program_id(0) // grid_m
    rows_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)

    # Of each 128-block, dot d takes the codes at d * RUN + 0..RUN-1: a plane of RUN bytes (at W8 a half of 128).
    span = tl.arange(0, SPAN)
    in_block = (span // RUN) * 128 + span % RUN
    x_ptrs = x_ptr + rows_m.to(tl.int64)[None, :] * k + in_block[:, None]
    # Rows past N repeat the last one; their results are never stored.
    w_rows = w_ptr + tl.minimum(rows_n, n - 1).to(tl.int64)[:, None] * row_bytes
    w_ptrs = w_rows + (in_block if BITS == 8 else span)[None, :]
    in_m = (rows_m < m)[None, :]

    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.int32)
    for k_start in range(0, k, BLOCK_K):
        if BITS != 8:
            if EVEN_K:
                packed = tl.load(w_ptrs)
            else:
                packed = tl.load(w_ptrs, mask=(k_start * BITS // 8 + span < row_bytes)[None, :], other=0)
        for d in tl.static_range(DOTS):
            if BITS == 8:
                if EVEN_K:
                    packed = tl.load(w_ptrs + d * RUN)
                else:
                    in_row = (k_start + d * RUN + in_block < row_bytes)[None, :]
                    packed = tl.load(w_ptrs + d * RUN, mask=in_row, other=0)
                w = _top_bits(packed, 0, BITS, USE_ASM)
            else:
                w = _top_bits(packed, d, BITS, USE_ASM)
            if EVEN_K:
                x = tl.load(x_ptrs + d * RUN, mask=in_m, other=0)
            else:
                x = tl.load(x_ptrs + d * RUN, mask=in_m & (k_start + d * RUN + in_block < k)[:, None], other=0)
            acc = tl.dot(w, x, acc, out_dtype=tl.int32)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K * BITS // 8

    acc = acc >> (8 - BITS)  # exact: every term carries this power of two
    store_m = rows_m < m
    store_n = rows_n < n
    if FOUR_LEVEL:
        acc = 2 * acc + tl.load(row_sum_ptr + rows_m, mask=store_m, other=0)[None, :]
    t = acc.to(tl.float32)
    t = t * tl.load(act_scale_ptr + rows_m, mask=store_m, other=0.0)[None, :]
    if TENSOR_SCALE:
        t = t * tl.load(weight_scale_ptr)
    else:
        t = t * tl.load(weight_scale_ptr + rows_n, mask=store_n, other=0.0)[:, None]
    if bias_ptr is not None:
        t = _add(t, tl.load(bias_ptr + rows_n, mask=store_n, other=0.0).to(tl.float32)[:, None], USE_ASM)
    if ACTIVATION == 1:
        t = tl.where(t < 0.0, 0.0, t)  # keeps NaN, which tl.maximum drops
    elif ACTIVATION == 2:
        t = 0.5 * t * (1.0 + tl.math.erf(t * 0.7071067811865476))

    # Written as Y^T, with n the contiguous direction of the pointers: the compiler moves the tile into a coalesced
    # layout once, and does so after the rounding, so that it moves half the bytes.
    offsets = rows_m.to(tl.int64)[None, :] * n + rows_n[:, None]
    mask = store_m[None, :] & store_n[:, None]
    if residual_ptr is not None:
        t = _add(t, tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32), USE_ASM)
    tl.store(y_ptr + offsets, _round_to(t, y_ptr.dtype.element_ty, USE_ASM), mask=mask)


class Config(NamedTuple):
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# By the largest M of the bucket. One table per instruction family: mma.sync on sm_80..89 and sm_120, wgmma and its
# successors elsewhere. tests/test_triton_compile.py compiles every entry and checks spills, byte permutes, shared
# memory ("sm80" fits the 99 KB of sm_86) and multiply instructions (64 x 64 on 8 warps would do each twice).
_ANY = 1 << 62
_BUSY_TILES = 128  # about one tile per multiprocessor
CONFIGS = {
    ("sm80", 8): {
        16: Config(16, 64, 256, 4, 4),
        32: Config(32, 64, 256, 4, 4),
        64: Config(64, 64, 128, 4, 4),
        256: Config(64, 128, 128, 4, 3),
        _ANY: Config(128, 128, 128, 8, 3),
    },
    ("sm80", 4): {
        16: Config(16, 64, 256, 4, 4),
        32: Config(32, 64, 256, 4, 4),
        64: Config(64, 64, 128, 4, 4),
        256: Config(64, 128, 128, 4, 3),
        _ANY: Config(128, 128, 128, 8, 3),
    },
    ("sm80", 2): {
        16: Config(16, 64, 512, 4, 4),
        32: Config(32, 64, 256, 4, 4),
        64: Config(64, 64, 256, 4, 2),
        256: Config(64, 128, 256, 4, 3),
        _ANY: Config(128, 128, 128, 8, 3),
    },
    ("sm90", 8): {
        16: Config(16, 64, 256, 4, 4),
        32: Config(32, 64, 256, 4, 4),
        64: Config(64, 64, 128, 4, 4),
        256: Config(128, 64, 128, 4, 4),
        _ANY: Config(128, 128, 128, 8, 4),
    },
    ("sm90", 4): {
        16: Config(16, 64, 256, 4, 4),
        32: Config(32, 64, 256, 4, 4),
        64: Config(64, 64, 256, 4, 4),
        256: Config(128, 64, 256, 4, 3),
        _ANY: Config(128, 128, 128, 8, 4),
    },
    ("sm90", 2): {
        16: Config(16, 64, 512, 4, 4),
        32: Config(32, 64, 512, 4, 3),
        64: Config(64, 64, 256, 4, 4),
        256: Config(128, 64, 256, 4, 3),
        _ANY: Config(128, 128, 256, 8, 3),
    },
}


@functools.cache
def family(device: torch.device) -> str:
    """The table that a device reads; the interpreter's CPU tensors read the first."""
    if device.type != "cuda":
        return "sm80"
    return "sm90" if torch.cuda.get_device_capability(device)[0] in (9, 10, 11) else "sm80"


def config(m: int, n: int, bits: int, arch: str) -> Config:
    """The tile for [M, N]; results never depend on it.

    M picks the bucket; above 64 tokens a smaller bucket serves where the larger tiles would leave most of the
    machine idle.
    """
    table = CONFIGS[arch, bits]
    choice = table[_bucket(m)]
    for smaller in (256, 64):
        if m > smaller and _tiles(m, n, choice) < _BUSY_TILES:
            choice = table[smaller]
    return choice


def _bucket(m: int) -> int:
    return next(limit for limit in (16, 32, 64, 256, _ANY) if m <= limit)


def _tiles(m: int, n: int, cfg: Config) -> int:
    return -(-m // cfg.block_m) * -(-n // cfg.block_n)


def interpreted() -> bool:
    """True when TRITON_INTERPRET=1 was set as this file was imported: kernels then run in numpy."""
    return not isinstance(_gemm_kernel, triton.JITFunction)


def qgemm(
    xq: torch.Tensor,
    act_scale: torch.Tensor,
    row_sum: torch.Tensor | None,
    qweight: torch.Tensor,
    weight_scale: torch.Tensor,
    bits: int,
    four_level: bool,
    out_features: int,
    bias: torch.Tensor | None = None,
    activation: str = "none",
    residual: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    tile: Config | None = None,
) -> torch.Tensor:
    """Y[M, N] in `out_dtype`.

    Args:
        xq: int8 [M, K], contiguous.
        act_scale: fp32 [M]. row_sum: int32 [M], read only under `four_level`.
        qweight: uint8 [ceil16(N), ceil128(K) * bits / 8]. weight_scale: fp32 [N] or [1].
        bias: float [N] or None. residual: float [M, N] or None.
        activation: "none", "relu" or "gelu" (the erf form).
        tile: in place of the table's choice; changes the speed, never a bit.

    Raises:
        ValueError: where `qweight` is too small for [N, K], or K could overflow the int32 sum.
    """
    m, k = xq.shape
    n = out_features
    row_bytes = qweight.shape[1]
    if k > _MAX_K:
        raise ValueError(f"in_features must be at most {_MAX_K} for an exact int32 sum, got {k}")
    if qweight.shape[0] < n or row_bytes * 8 < k * bits:
        raise ValueError(
            f"qweight {list(qweight.shape)} is too small for out_features={n}, in_features={k}, bits={bits}"
        )
    y = torch.empty(m, n, dtype=out_dtype, device=xq.device)
    if m == 0 or n == 0:
        return y
    if k % 16:
        # Rows that start off 16-byte boundaries would be read byte by byte, with spills. Zeros add nothing.
        xq = torch.nn.functional.pad(xq, (0, -k % 16))
        k = xq.shape[1]
    cfg = tile or config(m, n, bits, family(xq.device))
    with device_of(xq):
        _gemm_kernel[(_tiles(m, n, cfg),)](
            xq,
            act_scale,
            row_sum if four_level else None,
            qweight,
            weight_scale,
            bias,
            residual if residual is None else residual.contiguous(),
            y,
            m,
            n,
            k,
            row_bytes,
            BITS=bits,
            FOUR_LEVEL=four_level,
            TENSOR_SCALE=weight_scale.numel() == 1,
            ACTIVATION=_ACTIVATIONS[activation],
            EVEN_K=k % cfg.block_k == 0,
            BLOCK_M=cfg.block_m,
            BLOCK_N=cfg.block_n,
            BLOCK_K=cfg.block_k,
            USE_ASM=not interpreted(),
            num_warps=cfg.num_warps,
            num_stages=cfg.num_stages,
            enable_fp_fusion=False,
        )
    return y
