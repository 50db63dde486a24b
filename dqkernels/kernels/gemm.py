"""W2/W4/W8 x A8 GEMM in Triton with its epilogue: Y[M, N] = epilogue(Xq[M, K] . Wq[N, K]^T).

Weights stay packed (planar format v1) until they are in registers, where one shift and one mask per four codes put
each plane into the top bits of its bytes: code * 2^(8 - bits). The power of two comes off the exact int32 sum.
The weight tile is the left operand of the dot, so the accumulator is a tile of Y^T: sm_90 then feeds wgmma from
registers, with no trip of the unpacked weights through shared memory.

Split-K: the blocks of one tile each sum a part of K, write the int32 partial tile to a slab of their own and count
themselves in; the last to arrive adds the slabs up and runs the epilogue, once. Slabs need no zeroing. The counters
are zeroed by the launcher on the call's own stream, in memory of the call: two streams, or two replayed graphs, can
then never meet in one counter, and a launch that died leaves nothing behind. The price is one small memset.

Importing this file imports Triton; nothing imports it when the package is imported.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import measured
from .launch import Bound, Launcher
from .quantize import _MAGIC, _MAGIC_BITS, device_of
from .rounding import _add, _round_to
from .tiles import Config, count

_ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2}
_MAX_K = 131_071  # int32 holds K * 127 * 128 up to here


@triton.jit
def _top_bits(packed, PLANE: tl.constexpr, BITS: tl.constexpr, USE_ASM: tl.constexpr, HALF: tl.constexpr = 0):
    """uint8 holding 8 / BITS planes -> int8 code * 2^(8 - BITS) of one plane, with the bits of HALF set below it."""
    SHIFT: tl.constexpr = 8 - BITS - BITS * PLANE
    MASK: tl.constexpr = 0xFF & ~((1 << (8 - BITS)) - 1)
    if BITS == 8:
        return packed.to(tl.int8, bitcast=True)
    elif USE_ASM:
        # Four bytes per 32-bit register: bits shifted over from the byte below land under the mask. Plain
        # operators mean the same, but cost up to 10 PRMT per IMMA, since the compiler widens each byte.
        return tl.inline_asm_elementwise(
            f"shl.b32 $0, $1, {SHIFT}; and.b32 $0, $0, {MASK * 0x01010101}; or.b32 $0, $0, {HALF * 0x01010101};",
            "=r,r",
            [packed],
            dtype=tl.int8,
            is_pure=True,
            pack=4,
        )
    else:
        return (((packed << SHIFT) & MASK) | HALF).to(tl.int8, bitcast=True)


@triton.jit
def _sum_channel(
    x_ptr,
    w_ptr,
    rows_m,
    rows_n,
    m,
    n,
    k,
    row_bytes,
    k_first,
    k_last,
    BITS: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    """int32 [BLOCK_N, BLOCK_M]: sum of code * q over k_first..k_last."""
    # 8-bit codes have one plane; two half-K dots keep two dots per loop body. With a single one, Triton 3.8 and
    # 3.9 split the int8 fragments into bytes on sm_80 and spill.
    PLANES: tl.constexpr = 8 // BITS
    DOTS: tl.constexpr = 2 if BITS == 8 else PLANES
    RUN: tl.constexpr = 64 if BITS == 8 else 128 // PLANES  # consecutive codes that one dot takes from a 128-block
    SPAN: tl.constexpr = BLOCK_K // DOTS

    # Of each 128-block, dot d takes the codes at d * RUN + 0..RUN-1: a plane of RUN bytes (at W8 a half of 128).
    span = tl.arange(0, SPAN)
    in_block = (span // RUN) * 128 + span % RUN
    x_ptrs = x_ptr + rows_m.to(tl.int64)[None, :] * k + (k_first + in_block)[:, None]
    # Rows past N repeat the last one; their results are never stored.
    w_rows = w_ptr + tl.minimum(rows_n, n - 1).to(tl.int64)[:, None] * row_bytes
    w_ptrs = w_rows + (k_first * BITS // 8 + (in_block if BITS == 8 else span))[None, :]
    in_m = (rows_m < m)[None, :]

    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.int32)
    for k_start in range(k_first, k_last, BLOCK_K):
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
    return acc >> (8 - BITS)  # exact: every term carries this power of two


@triton.jit
def _sum_groups(
    x_ptr,
    w_ptr,
    group_mult_ptr,
    rows_m,
    rows_n,
    m,
    n,
    k,
    row_bytes,
    groups,
    k_first,
    k_last,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    FOUR_LEVEL: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    """int32 [BLOCK_N, BLOCK_M]: sum of mult * level * q over k_first..k_last.

    A dot takes the SPAN codes that share a plane, a 128-block and a group, so each group's sum is one or more whole
    dots. For four_level a set bit below the code makes the byte (2 * code + 1) * 2^5, an int8 too: the dot then
    includes the group's row sum, of which the quantizer knows only the total.
    """
    RUN: tl.constexpr = 16 * BITS  # consecutive codes of one plane of a 128-block
    SPAN: tl.constexpr = GROUP if GROUP < RUN else RUN
    HALF: tl.constexpr = 32 if FOUR_LEVEL else 0
    SHIFT: tl.constexpr = 5 if FOUR_LEVEL else 8 - BITS

    span = tl.arange(0, SPAN)
    x_ptrs = x_ptr + rows_m.to(tl.int64)[None, :] * k + (k_first + span)[:, None]
    row = tl.minimum(rows_n, n - 1).to(tl.int64)
    w_ptrs = w_ptr + row[:, None] * row_bytes + (k_first * BITS // 8 + span)[None, :]
    mult_ptrs = group_mult_ptr + row * groups
    in_m = (rows_m < m)[None, :]

    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.int32)
    for k_start in range(k_first, k_last, BLOCK_K):
        for b in tl.static_range(BLOCK_K // 128):
            for part in tl.static_range(RUN // SPAN):
                if EVEN_K:
                    packed = tl.load(w_ptrs + b * RUN + part * SPAN)
                else:
                    in_row = (k_start * BITS // 8 + b * RUN + part * SPAN + span < row_bytes)[None, :]
                    packed = tl.load(w_ptrs + b * RUN + part * SPAN, mask=in_row, other=0)
                for plane in tl.static_range(8 // BITS):
                    w = _top_bits(packed, plane, BITS, USE_ASM, HALF)
                    at = b * 128 + plane * RUN + part * SPAN
                    if EVEN_K:
                        x = tl.load(x_ptrs + at, mask=in_m, other=0)
                    else:
                        x = tl.load(x_ptrs + at, mask=in_m & (k_start + at + span < k)[:, None], other=0)
                    if (plane * RUN + part * SPAN) % GROUP == 0:
                        # Asked for before the dot that hides its latency. Past K, x is 0 and any multiplier serves.
                        mult = tl.load(mult_ptrs + tl.minimum((k_start + at) // GROUP, groups - 1))
                        group_acc = tl.dot(w, x, out_dtype=tl.int32)
                    else:
                        group_acc = tl.dot(w, x, group_acc, out_dtype=tl.int32)
                    if (plane * RUN + part * SPAN + SPAN) % GROUP == 0:
                        # The power of two first: with it the sum over groups could leave int32.
                        acc += (group_acc >> SHIFT) * mult.to(tl.int32)[:, None]
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K * BITS // 8
    return acc


@triton.jit
def _finish(
    acc,
    act_scale_ptr,
    row_sum_ptr,
    weight_scale_ptr,
    bias_ptr,
    residual_ptr,
    out_scale_ptr,
    y_ptr,
    rows_m,
    rows_n,
    m,
    n,
    TENSOR_SCALE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    """Y = act(float(acc) * act_scale[m] * weight_scale[n] + bias[n]) + residual, each step rounded on its own."""
    store_m = rows_m < m
    store_n = rows_n < n
    if row_sum_ptr is not None:
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
    if out_scale_ptr is not None:
        y = _static_codes(t, tl.load(out_scale_ptr))
    else:
        y = _round_to(t, y_ptr.dtype.element_ty, USE_ASM)
    tl.store(y_ptr + offsets, y, mask=mask)


@triton.jit
def _static_codes(t, scale):
    """round_half_even(clamp(t / scale, -127, 127)) as int8, with the quotient as t * (1 / scale); NaN gives 0."""
    scaled = tl.minimum(tl.maximum(t * tl.div_rn(1.0, scale), -127.0), 127.0)
    # The integer is read off the bits of the sum (see quantize.py); the clamp between keeps it from being fused.
    codes = (scaled + _MAGIC).to(tl.int32, bitcast=True) - _MAGIC_BITS
    return tl.where(t == t, codes, 0).to(tl.int8)


@triton.jit(do_not_specialize=["m"])  # M only bounds masks: one variant for any number of tokens
def _gemm_kernel(
    x_ptr,  # int8 [M, K] contiguous
    act_scale_ptr,  # fp32 [M]
    row_sum_ptr,  # int32 [M] for four_level without groups, else None
    w_ptr,  # uint8 [ceil16(N), row_bytes]
    weight_scale_ptr,  # fp32 [N], or [1] with TENSOR_SCALE
    group_mult_ptr,  # uint8 [N, groups] contiguous, or None
    bias_ptr,  # float [N], or None
    residual_ptr,  # float [M, N] contiguous, or None
    out_scale_ptr,  # fp32 [1] for an int8 Y, else None
    y_ptr,  # float or int8 [M, N] contiguous
    slab_ptr,  # int32 [splits, tiles, BLOCK_N, BLOCK_M] with more than one split, else None
    counter_ptr,  # int32 [tiles], zero before the launch, or None
    m,
    n,
    k,
    row_bytes,
    groups,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,  # group_size, or -1
    FOUR_LEVEL: tl.constexpr,
    TENSOR_SCALE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EVEN_K: tl.constexpr,  # K is a multiple of BLOCK_K: no mask along K
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    USE_ASM: tl.constexpr,  # False in the interpreter, which has no inline assembly
):
    """One tile of Y, or with split-K one part of its sum; see `_finish` for the formula."""
    tile = tl.program_id(0)
    grid_m = tl.cdiv(m, BLOCK_M)
    pid_m = tile % grid_m  # neighbours share a weight tile
    pid_n = tile // grid_m
    if BLOCK_M >= 128:  # and those of a large M that run at once 16 tiles of X: both then stay in the L2 cache
        group = 16 * tl.cdiv(n, BLOCK_N)
        first_m = tile // group * 16
        pid_m = first_m + tile % group % tl.minimum(grid_m - first_m, 16)
        pid_n = tile % group // tl.minimum(grid_m - first_m, 16)
    rows_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)

    k_first = 0
    k_last = k
    if slab_ptr is not None:
        share = tl.cdiv(tl.cdiv(k, BLOCK_K), tl.num_programs(1)) * BLOCK_K
        k_first = tl.program_id(1) * share
        k_last = tl.minimum(k_first + share, k)
    if GROUP == -1:
        acc = _sum_channel(
            x_ptr, w_ptr, rows_m, rows_n, m, n, k, row_bytes, k_first, k_last,
            BITS, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K, USE_ASM,
        )  # fmt: skip
    else:
        acc = _sum_groups(
            x_ptr, w_ptr, group_mult_ptr, rows_m, rows_n, m, n, k, row_bytes, groups, k_first, k_last,
            BITS, GROUP, FOUR_LEVEL, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K, USE_ASM,
        )  # fmt: skip

    if slab_ptr is None:
        _finish(
            acc, act_scale_ptr, row_sum_ptr, weight_scale_ptr, bias_ptr, residual_ptr, out_scale_ptr, y_ptr,
            rows_m, rows_n, m, n, TENSOR_SCALE, ACTIVATION, USE_ASM,
        )  # fmt: skip
    else:
        splits = tl.num_programs(1)
        stride = tl.num_programs(0).to(tl.int64) * (BLOCK_N * BLOCK_M)
        in_tile = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        slabs = slab_ptr + tile.to(tl.int64) * (BLOCK_N * BLOCK_M) + in_tile
        tl.store(slabs + tl.program_id(1) * stride, acc)
        # The barrier puts every thread's stores before the one thread's release; the acquire of the last block
        # to arrive then sees all slabs.
        tl.debug_barrier()
        arrived = tl.atomic_add(counter_ptr + tile, 1, sem="acq_rel", scope="gpu")
        if arrived == splits - 1:
            total = tl.zeros([BLOCK_N, BLOCK_M], tl.int32)
            for _ in range(splits):
                total += tl.load(slabs, cache_modifier=".cg")  # L2: where the other blocks wrote it
                slabs += stride
            _finish(
                total, act_scale_ptr, row_sum_ptr, weight_scale_ptr, bias_ptr, residual_ptr, out_scale_ptr, y_ptr,
                rows_m, rows_n, m, n, TENSOR_SCALE, ACTIVATION, USE_ASM,
            )  # fmt: skip


_gemm = Launcher(_gemm_kernel)


def interpreted() -> bool:
    """True when TRITON_INTERPRET=1 was set as this file was imported: kernels then run in numpy."""
    return _gemm.interpreted


def refresh() -> None:
    """Reads the measured tables again; for `tune`, whose table changed."""
    measured.refresh()
    _plan.cache_clear()


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
    split_k: int | None = None,
    group_mult: torch.Tensor | None = None,
    group_size: int = -1,
    out_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Y[M, N] in `out_dtype`.

    Args:
        xq: int8 [M, K], contiguous.
        act_scale: fp32 [M]. row_sum: int32 [M], read only under `four_level` without groups.
        qweight: uint8 [ceil16(N), ceil128(K) * bits / 8]. weight_scale: fp32 [N] or [1].
        bias: float [N] or None. residual: float [M, N] or None.
        activation: "none", "relu" or "gelu" (the erf form).
        out_dtype: a float type, or int8 with `out_scale`.
        tile, split_k: in place of `measured.choose`; they change the speed, never a bit. `split_k` is the most blocks
            that share a tile; with fewer K steps than that, each gets one.
        group_mult: uint8 [N, ceil(K / group_size)], contiguous, for group_size 32, 64 or 128.
        out_scale: fp32, one element. Y is then int8 codes by the `static` rule (design section 3) of the fp32
            result. A NaN gets code 0: int8 has none, so whoever reads the codes marks the rows whose act_scale is
            NaN, as the quantizer's scales do.

    Raises:
        ValueError: where `qweight` or `group_mult` is too small for [N, K], K could overflow the int32 sum, the
            group size does not exist, `row_sum` is missing, or `out_dtype` and `out_scale` do not fit together.
    """
    (m, k), n, row_bytes = xq.shape, out_features, qweight.shape[1]
    if k > _MAX_K:
        raise ValueError(f"in_features must be at most {_MAX_K} for an exact int32 sum, got {k}")
    if qweight.shape[0] < n or row_bytes * 8 < k * bits:
        raise ValueError(
            f"qweight {list(qweight.shape)} is too small for out_features={n}, in_features={k}, bits={bits}"
        )
    if four_level and group_mult is None and row_sum is None:
        raise ValueError("four_level without groups needs row_sum, the sum of each row of xq")
    if (out_dtype == torch.int8) != (out_scale is not None):
        raise ValueError(f"an int8 output and out_scale need each other, got {out_dtype} and out_scale={out_scale}")
    _check_groups(group_mult, group_size, n, k, bits)
    y = torch.empty(m, n, dtype=out_dtype, device=xq.device)
    if m == 0 or n == 0:
        return y
    if k % 16:
        # Rows that start off 16-byte boundaries would be read byte by byte, with spills. Zeros add nothing.
        xq = torch.nn.functional.pad(xq, (0, -k % 16))
        k = xq.shape[1]
    plan = _plan(
        m,
        n,
        k,
        row_bytes,
        bits,
        four_level,
        group_size,
        weight_scale.numel() == 1,
        activation,
        None if bias is None else bias.dtype,
        None if residual is None else residual.dtype,
        out_dtype,
        tile,
        split_k,
        xq.device,
    )
    slabs = counters = None
    if plan.slabs is not None:
        slabs = torch.empty(plan.slabs, dtype=torch.int32, device=xq.device)
        counters = torch.zeros(plan.slabs[1], dtype=torch.int32, device=xq.device)
    with device_of(xq):
        plan.launch(
            xq,
            act_scale,
            row_sum if four_level and group_mult is None else None,
            qweight,
            weight_scale,
            group_mult,
            bias,
            residual if residual is None else residual.contiguous(),
            out_scale,
            y,
            slabs,
            counters,
            m,
            n,
            k,
            row_bytes,
            plan.groups,
        )
    return y


class _Plan(NamedTuple):
    launch: Bound
    groups: int
    slabs: tuple[int, int, int] | None  # [splits, tiles, elements of a tile], None for one split


@functools.lru_cache(maxsize=4096)
def _plan(
    m, n, k, row_bytes, bits, four_level, group_size, tensor_scale, activation, bias_dtype, residual_dtype, out_dtype,
    tile, split_k, device,
) -> _Plan:  # fmt: skip
    """The launch for these facts; they include every type, size and None that the kernel is compiled for."""
    cfg, split = measured.choose(m, n, k, bits, group_size, device)
    cfg, split = tile or cfg, split_k or split
    steps = max(1, -(-k // cfg.block_k))
    split = -(-steps // -(-steps // split))  # as many as have a step to do: 5 steps among 4 are 2, 2, 1
    tiles = count(m, n, cfg)
    launch = _gemm.bind(
        (tiles, split),
        BITS=bits,
        GROUP=group_size,
        FOUR_LEVEL=four_level,
        TENSOR_SCALE=tensor_scale,
        ACTIVATION=_ACTIVATIONS[activation],
        EVEN_K=k % cfg.block_k == 0,
        BLOCK_M=cfg.block_m,
        BLOCK_N=cfg.block_n,
        BLOCK_K=cfg.block_k,
        USE_ASM=not interpreted(),
        num_warps=cfg.num_warps,
        num_stages=cfg.num_stages,
    )
    groups = 0 if group_size == -1 else -(-k // group_size)
    return _Plan(launch, groups, (split, tiles, cfg.block_n * cfg.block_m) if split > 1 else None)


def _check_groups(group_mult: torch.Tensor | None, group_size: int, n: int, k: int, bits: int) -> None:
    """A wrong group size or a short `group_mult` would read other memory."""
    if group_size == -1 and group_mult is None:
        return
    if group_size not in (32, 64, 128) or bits == 8 or group_mult is None:
        raise ValueError(
            f"group_size must be -1, or 32, 64 or 128 at 2 and 4 bits with group_mult, "
            f"got {group_size} at {bits} bits, group_mult={None if group_mult is None else list(group_mult.shape)}"
        )
    if group_mult.dtype != torch.uint8 or tuple(group_mult.shape) != (n, -(-k // group_size)):
        raise ValueError(
            f"group_mult must be uint8 [{n}, {-(-k // group_size)}], got {group_mult.dtype} {list(group_mult.shape)}"
        )
