"""Int8 attention in Triton, decode form: a few queries per sequence over K and V that stand quantized in a cache.

Rows (beams) that read one cache are gathered into one program, so their source's K and V are read once; rows whose
keys lie each in a cache of its own (beams that were reordered) have a program per row. The arithmetic is that of
attention.py, helper by helper, and gives the bits of its prefill.

Importing this file imports Triton; nothing imports it when the package is imported.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .attention import (
    _beside,
    _finite_top,
    _load_rows,
    _output,
    _quantize_tile,
    _scores,
    _shares,
    _unit_stride,
    _update_top,
    amax_bits,
    padded_dim,
    strides,
)
from .gemm import interpreted
from .launch import Launcher
from .quantize import device_of
from .rounding import _round_to

SLOTS = 16  # (row, query) pairs of one program: the height of an int8 matrix instruction
BLOCK_N = 32
NUM_WARPS = 4
NUM_STAGES = 1  # more, or 64 keys, or 8 warps: ptxas spills for one architecture or other (Triton 3.6, 3.9)
_SCAN = tl.constexpr(128)  # rows of `source` looked at together


@triton.jit
def _mates(source_ptr, start, rows, cache):
    """Row numbers start..start + 127, and which of them read `cache`."""
    others = start + tl.arange(0, _SCAN)
    inside = others < rows
    return others, inside & (tl.load(source_ptr + others, mask=inside, other=0) == cache)


@triton.jit
def _inside(keys, dims, EVEN_DIM: tl.constexpr):
    """The mask of a tile of a cache; that of the keys alone where the dimensions need none."""
    if EVEN_DIM:
        return keys
    else:
        return keys & dims


@triton.jit
def _places(source_row, caches, heads, head, capacity, cols, end):
    """Where in the caches the keys `cols` lie, counted in keys from the pointers of `_step`, and which are there."""
    written = cols < end
    if source_row is None:
        return cols.to(tl.int64), written
    else:
        cache = tl.load(source_row + cols, mask=written, other=0)
        there = written & (cache >= 0) & (cache < caches)
        return (cache.to(tl.int64) * heads + head) * capacity + cols, there


@triton.jit
def _step(
    q, q_scale, k_ptr, k_scale_ptr, v_scale_ptr, source_row, bias_rows, stride_bk, cols, end, length, caches, heads,
    head, capacity, head_dim, EVEN_DIM: tl.constexpr, DIM: tl.constexpr, USE_ASM: tl.constexpr,
):  # fmt: skip
    """Scores [SLOTS, BLOCK_N], V scales, visibility and places of the keys `cols`; both passes call it."""
    dims = tl.arange(0, DIM)
    at, there = _places(source_row, caches, heads, head, capacity, cols, end)
    lost = 0.0
    if source_row is not None:
        lost = float("nan")  # a key in no cache spoils the queries that see it
    seen = cols[None, :] < length[:, None]
    bias = None
    if bias_rows is not None:
        bias = tl.load(bias_rows[:, None] + cols.to(tl.int64)[None, :] * stride_bk, mask=seen, other=0.0).to(tl.float32)
    inside = _inside(there[None, :], (dims < head_dim)[:, None], EVEN_DIM)
    k = tl.load(k_ptr + at[None, :] * head_dim + dims[:, None], mask=inside, other=0)
    k_scale = tl.load(k_scale_ptr + at, mask=there, other=lost)
    v_scale = tl.load(v_scale_ptr + at, mask=there, other=0.0)
    dots = tl.dot(q, k, out_dtype=tl.int32)
    seen = _beside(seen, dots)
    return _scores(dots, q_scale, k_scale, bias, seen, USE_ASM), v_scale, seen, at, there


@triton.jit
def _decode_kernel(
    q_ptr,  # float [rows, heads, queries, head_dim] by strides
    k_ptr,  # int8 [caches, heads, capacity, head_dim] contiguous
    k_scale_ptr,  # fp32 [caches, heads, capacity] contiguous
    v_ptr,  # int8, as k_ptr
    v_scale_ptr,  # fp32, as k_scale_ptr
    lengths_ptr,  # int32 [rows]
    source_ptr,  # int32 [rows], or None: row r reads cache r; [rows, capacity] contiguous where BY_KEY
    bias_ptr,  # float [rows, heads, queries, capacity] by strides, or None
    amax_bits_ptr,  # int32 [1] for per_tensor, else None
    out_ptr,  # float [rows, heads, queries, head_dim] contiguous
    softmax_scale,
    clip,  # fp32, +inf for none
    rows,
    heads,
    queries,
    caches,
    capacity,
    head_dim,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_bb,
    stride_bh,
    stride_bq,
    stride_bk,
    BY_KEY: tl.constexpr,  # key j of row r is that of cache source[r, j]
    CAUSAL: tl.constexpr,
    EVEN_DIM: tl.constexpr,  # head_dim is DIM
    DIM: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    USE_ASM: tl.constexpr,  # False in the interpreter, which has no inline assembly
):
    """All rows that read one cache, for one head. The first such row's program does the work, the others' none."""
    row = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    SHARED: tl.constexpr = source_ptr is not None and not BY_KEY
    source_row = None
    if SHARED:
        wanted = tl.load(source_ptr + row)
        first = rows
        count = 0
        for start in range(0, rows, _SCAN):
            others, mates = _mates(source_ptr, start, rows, wanted)
            first = tl.minimum(first, tl.min(tl.where(mates, others, rows), 0))
            count += tl.sum(mates.to(tl.int32), 0)
        count = tl.where(first == row, count, 0)
        lost = (wanted < 0) | (wanted >= caches)  # nothing is read outside; such rows become NaN
        cache = tl.where(lost, 0, wanted)
    else:
        count = 1
        cache = row

    dims = tl.arange(0, DIM)
    block = tl.arange(0, BLOCK_N)
    if BY_KEY:
        source_row = source_ptr + row.to(tl.int64) * capacity
    else:
        plane = (cache.to(tl.int64) * heads + head) * capacity
        k_ptr += plane * head_dim
        v_ptr += plane * head_dim
        k_scale_ptr += plane
        v_scale_ptr += plane
    for group in range(0, count * queries, SLOTS):
        slot = group + tl.arange(0, SLOTS)
        used = slot < count * queries
        query = slot % queries
        if SHARED:
            # The slot's row is the (slot // queries)-th of the mates.
            slot_row = tl.zeros([SLOTS], tl.int32)
            before = 0
            for start in range(0, rows, _SCAN):
                others, mates = _mates(source_ptr, start, rows, wanted)
                rank = before + tl.cumsum(mates.to(tl.int32), 0) - 1
                hit = mates[:, None] & (rank[:, None] == (slot // queries)[None, :])
                slot_row += tl.sum(tl.where(hit, others[:, None], 0), 0)
                before += tl.sum(mates.to(tl.int32), 0)
        else:
            slot_row = tl.zeros([SLOTS], tl.int32) + row
        length = tl.minimum(tl.load(lengths_ptr + slot_row, mask=used, other=0), capacity)
        if CAUSAL:
            length = tl.where(used, length - queries + 1 + query, 0)
        end = tl.max(length, 0)  # what lies behind may never have been written

        at = slot_row.to(tl.int64)
        q_rows = q_ptr + at * stride_qb + head.to(tl.int64) * stride_qh + query * stride_qt
        codes, q_scale = _quantize_tile(_load_rows(q_rows, used, head_dim, softmax_scale, DIM), amax_bits_ptr, clip)
        q = codes.to(tl.int8)
        bias_rows = None
        if bias_ptr is not None:
            bias_rows = bias_ptr + at * stride_bb + head.to(tl.int64) * stride_bh + query.to(tl.int64) * stride_bq

        top = tl.full([SLOTS], float("-inf"), tl.float32)
        v_max = tl.zeros([SLOTS], tl.float32)
        for start in range(0, end, BLOCK_N):
            s, v_scale, seen, _, _ = _step(
                q, q_scale, k_ptr, k_scale_ptr, v_scale_ptr, source_row, bias_rows, stride_bk, start + block, end,
                length, caches, heads, head, capacity, head_dim, EVEN_DIM, DIM, USE_ASM,
            )  # fmt: skip
            top, v_max = _update_top(top, v_max, s, v_scale, seen)

        shift, v_inv = _finite_top(top, v_max)
        weight = tl.zeros([SLOTS], tl.int32)
        total = tl.zeros([SLOTS, DIM], tl.int32)
        for start in range(0, end, BLOCK_N):
            s, v_scale, _, at_key, there = _step(
                q, q_scale, k_ptr, k_scale_ptr, v_scale_ptr, source_row, bias_rows, stride_bk, start + block, end,
                length, caches, heads, head, capacity, head_dim, EVEN_DIM, DIM, USE_ASM,
            )  # fmt: skip
            e, c = _shares(s, shift, v_scale, v_inv, USE_ASM)
            weight += tl.sum(e, 1)
            inside = _inside(there[:, None], (dims < head_dim)[None, :], EVEN_DIM)
            v = tl.load(v_ptr + at_key[:, None] * head_dim + dims[None, :], mask=inside, other=0)
            total = tl.dot(c, v, total, out_dtype=tl.int32)

        out = _output(total, weight, top, v_max)
        if SHARED:
            out = tl.where(lost, float("nan"), out)
        out_rows = out_ptr + ((at * heads + head) * queries + query) * head_dim
        inside = used[:, None] & (dims < head_dim)[None, :]
        tl.store(out_rows[:, None] + dims[None, :], _round_to(out, out_ptr.dtype.element_ty, USE_ASM), mask=inside)


_decode = Launcher(_decode_kernel)


def qattention_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    k_scale: torch.Tensor,
    v_cache: torch.Tensor,
    v_scale: torch.Tensor,
    lengths: torch.Tensor,
    source: torch.Tensor | None,
    bias: torch.Tensor | None,
    causal: bool,
    softmax_scale: float,
    mode: str,
    clip: float | None,
) -> torch.Tensor:
    """Attention [rows, heads, queries, head_dim] in q's dtype; arguments as in `reference.qattention_decode`.

    A length above the capacity counts as the capacity; a row whose `source` is no cache becomes NaN, and so does a
    query that sees a key whose `source` is none. Caches and scales that are not contiguous are copied.

    Raises:
        ValueError: for a head_dim above 128.
    """
    rows, heads, queries, head_dim = q.shape
    caches, _, capacity, _ = k_cache.shape
    dim = padded_dim(head_dim)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if q.numel() == 0 or k_cache.numel() == 0:
        return out.zero_()
    q = _unit_stride(q)
    bias, bias_strides = strides(bias, (rows, heads, queries, capacity))
    with device_of(q):
        _decode(
            (rows * heads,),
            q,
            k_cache.contiguous(),
            k_scale.contiguous(),
            v_cache.contiguous(),
            v_scale.contiguous(),
            lengths.contiguous(),
            None if source is None else source.contiguous(),
            bias,
            amax_bits(q, softmax_scale) if mode == "per_tensor" else None,
            out,
            softmax_scale,
            float("inf") if clip is None else float(clip),
            rows,
            heads,
            queries,
            caches,
            capacity,
            head_dim,
            *q.stride()[:3],
            *bias_strides,
            BY_KEY=source is not None and source.dim() == 2,
            CAUSAL=causal,
            EVEN_DIM=head_dim == dim,
            DIM=dim,
            SLOTS=SLOTS,
            BLOCK_N=BLOCK_N,
            USE_ASM=not interpreted(),
            num_warps=NUM_WARPS,
            num_stages=NUM_STAGES,
        )
    return out
