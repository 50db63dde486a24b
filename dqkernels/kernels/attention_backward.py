"""The backward pass of int8 attention in Triton, by recomputation (docs/design.md, "Attention, backward").

Nothing of size queries x keys is kept between forward and backward: the scores come again from the int8 product of the
saved codes, the bits of the forward pass, and with them the shares. Two kernels and no float atomics: tiles of queries
give dQ and leave five numbers per query behind, tiles of keys read them and give dK and dV. The tile depends on types
and head_dim only, so the order of a sum depends on no batch mate and no length, and padding adds exact zeros.

The other operand of every float product is as good as exact: int8 codes fit 16 bits, their scales are applied in fp32,
and so is softmax_scale. What is rounded, once, is P^ to the type of the gradient and dS to bf16. For fp16 gradients dS
goes in as two bf16 parts, 16 bits together: fp16 itself would lose its small values. fp32 products stay in fp32,
without tensor cores.

Importing this file imports Triton; nothing imports it when the package is imported.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .attention import (
    _beside,
    _exp,
    _finite_top,
    _round,
    _scores,
    _tile,
    _unit_stride,
    _update_top,
    _visible,
    padded_dim,
    strides,
)
from .gemm import interpreted
from .launch import Launcher
from .quantize import device_of
from .rounding import _add, _round_to
from .tiles import AttentionTile, attention_grad_tiles

# P^ is at most 2, and at least 2^-24 where it is not 0: times 2^14 it is a normal fp16 number. Taken off again in fp32.
_SHARE_UNIT = tl.constexpr(16384.0)


@triton.jit
def _dot(a, b, acc, USE_ASM: tl.constexpr):
    """acc + a . b with fp32 sums; in fp32 in the interpreter, whose dot misreads bf16."""
    if USE_ASM:
        return tl.dot(a, b, acc, input_precision="ieee")
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")


@triton.jit
def _wide(codes, dtype: tl.constexpr, USE_ASM: tl.constexpr):
    """int8 codes as `dtype`, exactly.

    The empty instruction keeps the compiler from moving the conversion behind the layout of a matrix operand, where
    each warp would read single bytes and convert them all for itself.
    """
    if dtype == tl.float32 or not USE_ASM:
        return codes.to(tl.float32)
    elif dtype == tl.float16:
        codes = codes.to(tl.float16)
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [codes], dtype=tl.float16, is_pure=False, pack=2)
    else:
        codes = codes.to(tl.bfloat16)
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [codes], dtype=tl.bfloat16, is_pure=False, pack=2)


@triton.jit
def _add_product(x, codes, acc, dtype: tl.constexpr, USE_ASM: tl.constexpr):
    """acc + x . codes of fp32 x and int8 codes: x in one bf16 part, in two for fp16 gradients, in fp32 for those."""
    if dtype == tl.float32:
        return _dot(x, codes.to(tl.float32), acc, USE_ASM)
    codes = _wide(codes, tl.bfloat16, USE_ASM)
    high = _round_to(x, tl.bfloat16, USE_ASM)
    acc = _dot(high, codes, acc, USE_ASM)
    if dtype == tl.float16:
        low = _round_to(_add(x, -high.to(tl.float32), USE_ASM), tl.bfloat16, USE_ASM)
        acc = _dot(low, codes, acc, USE_ASM)
    return acc


@triton.jit
def _passing(x, passed_ptr, rows, in_rows, head_dim, ROWS: tl.constexpr, DIM: tl.constexpr):
    """x [ROWS, DIM], and 0 where the clip saturated: bit d % 8 of byte d // 8 of the row is 0."""
    at = tl.arange(0, DIM // 8)
    count = tl.cdiv(head_dim, 8)
    inside = in_rows[:, None] & (at < count)[None, :]
    bits = tl.load(passed_ptr + rows[:, None] * count + at[None, :], mask=inside, other=0).to(tl.int32)
    bits = tl.expand_dims(bits, 2) >> tl.arange(0, 8)[None, None, :]
    x = tl.reshape(x, [ROWS, DIM // 8, 8])
    return tl.reshape(tl.where(bits & 1 != 0, x, 0.0), [ROWS, DIM])


@triton.jit
def _pairs(
    q, q_scale, g, k_ptr, k_scale_ptr, v_ptr, v_scale_ptr, mask_ptr, bias_ptr, rows, cols, queries, keys, head_dim,
    stride_mq, stride_mk, stride_bq, stride_bk,
    CAUSAL: tl.constexpr, MASK_ROWS: tl.constexpr, BIAS_ROWS: tl.constexpr, DIM: tl.constexpr, USE_ASM: tl.constexpr,
):  # fmt: skip
    """Scores and dP [BLOCK_M, BLOCK_N] of the keys `cols`, their visibility, codes of K and both scales."""
    dims = tl.arange(0, DIM)
    seen = _visible(mask_ptr, rows, cols, queries, keys, stride_mq, stride_mk, CAUSAL, MASK_ROWS)
    bias = None
    if bias_ptr is not None:
        bias = _tile(bias_ptr, rows, cols, queries, keys, stride_bq, stride_bk, BIAS_ROWS).to(tl.float32)
    at = cols[:, None] * head_dim + dims[None, :]
    inside = (cols < keys)[:, None] & (dims < head_dim)[None, :]
    k = tl.load(k_ptr + at, mask=inside, other=0)
    v = tl.load(v_ptr + at, mask=inside, other=0)
    k_scale = tl.load(k_scale_ptr + cols, mask=cols < keys, other=0.0)
    v_scale = tl.load(v_scale_ptr + cols, mask=cols < keys, other=0.0)
    dots = tl.dot(q, tl.trans(k), out_dtype=tl.int32)
    if CAUSAL or MASK_ROWS:
        seen = _beside(seen, dots)
    s = _scores(dots, q_scale, k_scale, bias, seen, USE_ASM)
    v = _wide(v, g.dtype, USE_ASM)
    grad_p = _dot(g, tl.trans(v), tl.zeros(s.shape, tl.float32), USE_ASM) * v_scale[None, :]
    return s, grad_p, seen, k, k_scale, v_scale


@triton.jit
def _grad_query_kernel(
    g_ptr,  # float [batch, heads, queries, head_dim] by strides
    q_ptr,  # int8 [batch * heads, queries, head_dim]
    q_scale_ptr,  # fp32 [batch * heads, queries]
    k_ptr,  # int8 [batch * heads, keys, head_dim]
    k_scale_ptr,  # fp32 [batch * heads, keys]
    v_ptr,  # int8 [batch * heads, keys, head_dim]
    v_scale_ptr,  # fp32 [batch * heads, keys], 0 for a zero row
    mask_ptr,  # uint8 [batch, heads, queries, keys] by strides, or None
    bias_ptr,  # float [batch, heads, queries, keys] by strides, or None
    passed_ptr,  # uint8 [batch * heads * queries, ceil(head_dim / 8)], or None
    out_ptr,  # float [batch * heads, queries, head_dim]: dQ
    ds_ptr,  # fp32 [batch * heads, queries, keys]: dS of the keys that a tile reaches, or None
    stats_ptr,  # fp32 [batch * heads, 5, queries]: m, 1 / sum exp(s - m), sum p dP, vs_max, 1 / sum e
    softmax_scale,
    heads,
    queries,
    keys,
    head_dim,
    stride_gb,
    stride_gh,
    stride_gt,
    stride_mb,
    stride_mh,
    stride_mq,
    stride_mk,
    stride_bb,
    stride_bh,
    stride_bq,
    stride_bk,
    CAUSAL: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    BIAS_ROWS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    USE_ASM: tl.constexpr,  # False in the interpreter
):
    """dQ = softmax_scale * dS . k^ of a tile of BLOCK_M queries of one head per program."""
    tiles = tl.cdiv(queries, BLOCK_M)
    head = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tiles - 1 - tl.program_id(0) % tiles  # under a causal mask the last tile has the most keys
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    batch = head // heads
    if mask_ptr is not None:
        mask_ptr += batch * stride_mb + head % heads * stride_mh + (tile * BLOCK_M).to(tl.int64) * stride_mq
    if bias_ptr is not None:
        bias_ptr += batch * stride_bb + head % heads * stride_bh + (tile * BLOCK_M).to(tl.int64) * stride_bq
    if ds_ptr is not None:
        ds_ptr += (head * queries + tile * BLOCK_M) * keys
    g_ptr += batch * stride_gb + head % heads * stride_gh
    k_ptr += head * keys * head_dim
    v_ptr += head * keys * head_dim
    k_scale_ptr += head * keys
    v_scale_ptr += head * keys

    dims = tl.arange(0, DIM)
    block = tl.arange(0, BLOCK_N)
    in_q = rows < queries
    inside = in_q[:, None] & (dims < head_dim)[None, :]
    q_row = head * queries + rows
    q = tl.load(q_ptr + q_row[:, None] * head_dim + dims[None, :], mask=inside, other=0)
    q_scale = tl.load(q_scale_ptr + q_row, mask=in_q, other=0.0)
    g = tl.load(g_ptr + rows.to(tl.int64)[:, None] * stride_gt + dims[None, :], mask=inside, other=0.0)

    end = keys
    if CAUSAL:  # keys past the last query's are visible to none
        end = tl.minimum(keys, keys - queries + (tile + 1) * BLOCK_M)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    v_max = tl.zeros([BLOCK_M if CAUSAL or MASK_ROWS else 1], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mean = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, end, BLOCK_N):
        s, grad_p, seen, k, k_scale, v_scale = _pairs(
            q, q_scale, g, k_ptr, k_scale_ptr, v_ptr, v_scale_ptr, mask_ptr, bias_ptr, rows, start + block, queries,
            keys, head_dim, stride_mq, stride_mk, stride_bq, stride_bk, CAUSAL, MASK_ROWS, BIAS_ROWS, DIM, USE_ASM,
        )  # fmt: skip
        before = top
        top, v_max = _update_top(top, v_max, s, v_scale, seen)
        shift, _ = _finite_top(top, v_max)
        share = _exp(_add(s, -shift[:, None], USE_ASM), USE_ASM)
        shrink = _exp(_add(before, -shift, USE_ASM), USE_ASM)
        total = _add(total * shrink, tl.sum(share, 1), USE_ASM)
        # A hidden key may hold a scale of NaN.
        mean = _add(mean * shrink, tl.sum(tl.where(seen, share * grad_p, 0.0), 1), USE_ASM)

    shift, _ = _finite_top(top, v_max)
    # The forward's rows of NaN: what they touch from here on becomes NaN.
    spoilt = (top == float("inf")) | (v_max == float("inf"))
    inv = tl.where(spoilt, float("nan"), tl.div_rn(1.0, tl.where(total > 0.0, total, 1.0)))
    mean = mean * inv
    weight = tl.zeros([BLOCK_M], tl.int32)
    acc = tl.zeros([BLOCK_M, DIM], tl.float32)
    for start in range(0, end, BLOCK_N):
        cols = start + block
        s, grad_p, seen, k, k_scale, v_scale = _pairs(
            q, q_scale, g, k_ptr, k_scale_ptr, v_ptr, v_scale_ptr, mask_ptr, bias_ptr, rows, cols, queries,
            keys, head_dim, stride_mq, stride_mk, stride_bq, stride_bk, CAUSAL, MASK_ROWS, BIAS_ROWS, DIM, USE_ASM,
        )  # fmt: skip
        share = _exp(_add(s, -shift[:, None], USE_ASM), USE_ASM)
        weight += tl.sum(_round(127.0 * share, USE_ASM), 1)
        grad_s = share * inv[:, None] * _add(grad_p, -mean[:, None], USE_ASM)
        if ds_ptr is not None:
            at = ds_ptr + tl.arange(0, BLOCK_M)[:, None] * keys + cols[None, :]
            tl.store(at, tl.where(seen, grad_s, 0.0), mask=in_q[:, None] & (cols < keys)[None, :])
        grad_s = tl.where(seen, grad_s * k_scale[None, :], 0.0)
        acc = _add_product(grad_s, k, acc, g.dtype, USE_ASM)

    acc *= softmax_scale
    if passed_ptr is not None:
        acc = _passing(acc, passed_ptr, q_row, in_q, head_dim, BLOCK_M, DIM)
    out = out_ptr + q_row[:, None] * head_dim + dims[None, :]
    tl.store(out, _round_to(acc, out_ptr.dtype.element_ty, USE_ASM), mask=inside)
    e_inv = tl.where(spoilt, float("nan"), tl.div_rn(1.0, tl.where(weight == 0, 1, weight).to(tl.float32)))
    stats_ptr += head * 5 * queries
    tl.store(stats_ptr + rows, shift, mask=in_q)
    tl.store(stats_ptr + queries + rows, inv, mask=in_q)
    tl.store(stats_ptr + 2 * queries + rows, mean, mask=in_q)
    tl.store(stats_ptr + 3 * queries + rows, v_max + tl.zeros([BLOCK_M], tl.float32), mask=in_q)
    tl.store(stats_ptr + 4 * queries + rows, e_inv, mask=in_q)


@triton.jit
def _share_of_v(share, v_scale, v_scale_inv, v_max, e_inv, UNIT: tl.constexpr, USE_ASM: tl.constexpr):
    """UNIT times P^ [BLOCK_N, BLOCK_M] of fp32 exp(s - m): c_j vs_max / (vs_j sum e), or e_j / sum e for a zero row."""
    t = 127.0 * share
    scale = tl.where(v_scale == v_scale, v_scale, 0.0)
    _, v_inv = _finite_top(v_max, v_max)
    ratio = tl.minimum(scale[:, None] * v_inv[None, :], 1.0)
    c = _round(t * ratio, USE_ASM).to(tl.float32) * (v_max * e_inv)[None, :] * (v_scale_inv * UNIT)[:, None]
    e = _round(t, USE_ASM).to(tl.float32) * (e_inv * UNIT)[None, :]
    return tl.where((v_scale > 0.0)[:, None], c, e)


@triton.jit
def _grad_key_kernel(
    g_ptr,  # float [batch, heads, queries, head_dim] by strides
    q_ptr,  # int8 [batch * heads, queries, head_dim]
    q_scale_ptr,  # fp32 [batch * heads, queries]
    k_ptr,  # int8 [batch * heads, keys, head_dim]
    k_scale_ptr,  # fp32 [batch * heads, keys]
    v_ptr,  # int8 [batch * heads, keys, head_dim]
    v_scale_ptr,  # fp32 [batch * heads, keys], 0 for a zero row
    mask_ptr,  # uint8 [batch, heads, queries, keys] by strides, or None
    bias_ptr,  # float [batch, heads, queries, keys] by strides, or None
    k_passed_ptr,  # uint8 [batch * heads * keys, ceil(head_dim / 8)], or None
    v_passed_ptr,  # the same of V
    dk_ptr,  # float [batch * heads, keys, head_dim]
    dv_ptr,  # float [batch * heads, keys, head_dim]
    stats_ptr,  # fp32 [batch * heads, 5, queries], of _grad_query_kernel
    heads,
    queries,
    keys,
    head_dim,
    stride_gb,
    stride_gh,
    stride_gt,
    stride_mb,
    stride_mh,
    stride_mq,
    stride_mk,
    stride_bb,
    stride_bh,
    stride_bq,
    stride_bk,
    CAUSAL: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    BIAS_ROWS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    USE_ASM: tl.constexpr,  # False in the interpreter
):
    """dK = dS' . q^ and dV = P^' . dO of a tile of BLOCK_N keys of one head per program.

    Everything of queries and keys is held transposed, [BLOCK_N, BLOCK_M]: dS' and P^' are left operands as they come.
    """
    tiles = tl.cdiv(keys, BLOCK_N)
    head = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    cols = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    batch = head // heads
    first = tile * 0
    if CAUSAL:  # the first query that sees the tile's first key, rounded down to a tile of queries
        first = tl.maximum(tile * BLOCK_N - (keys - queries), 0) // BLOCK_M * BLOCK_M
    if mask_ptr is not None:
        mask_ptr += batch * stride_mb + head % heads * stride_mh + first.to(tl.int64) * stride_mq
    if bias_ptr is not None:
        bias_ptr += batch * stride_bb + head % heads * stride_bh + first.to(tl.int64) * stride_bq
    g_ptr += batch * stride_gb + head % heads * stride_gh
    q_ptr += head * queries * head_dim
    q_scale_ptr += head * queries
    stats_ptr += head * 5 * queries

    dims = tl.arange(0, DIM)
    block = tl.arange(0, BLOCK_M)
    in_k = cols < keys
    inside = in_k[:, None] & (dims < head_dim)[None, :]
    k_row = head * keys + cols
    at_k = k_row[:, None] * head_dim + dims[None, :]
    k = tl.load(k_ptr + at_k, mask=inside, other=0)
    k_scale = tl.load(k_scale_ptr + k_row, mask=in_k, other=0.0)
    v = _wide(tl.load(v_ptr + at_k, mask=inside, other=0), g_ptr.dtype.element_ty, USE_ASM)
    v_scale = tl.load(v_scale_ptr + k_row, mask=in_k, other=0.0)
    v_scale_inv = tl.div_rn(1.0, tl.where(v_scale > 0.0, v_scale, 1.0))
    UNIT: tl.constexpr = _SHARE_UNIT if g_ptr.dtype.element_ty == tl.float16 else 1.0

    grad_k = tl.zeros([BLOCK_N, DIM], tl.float32)
    grad_v = tl.zeros([BLOCK_N, DIM], tl.float32)
    for start in range(first, queries, BLOCK_M):
        rows = start + block
        in_q = rows < queries
        in_rows = in_q[:, None] & (dims < head_dim)[None, :]
        q = tl.load(q_ptr + rows.to(tl.int64)[:, None] * head_dim + dims[None, :], mask=in_rows, other=0)
        g = tl.load(g_ptr + rows.to(tl.int64)[:, None] * stride_gt + dims[None, :], mask=in_rows, other=0.0)
        q_scale = tl.load(q_scale_ptr + rows, mask=in_q, other=0.0)
        shift = tl.load(stats_ptr + rows, mask=in_q, other=0.0)
        inv = tl.load(stats_ptr + queries + rows, mask=in_q, other=0.0)
        mean = tl.load(stats_ptr + 2 * queries + rows, mask=in_q, other=0.0)
        v_max = tl.load(stats_ptr + 3 * queries + rows, mask=in_q, other=0.0)
        e_inv = tl.load(stats_ptr + 4 * queries + rows, mask=in_q, other=0.0)

        seen = tl.trans(_visible(mask_ptr, rows, cols, queries, keys, stride_mq, stride_mk, CAUSAL, MASK_ROWS))
        dots = tl.dot(k, tl.trans(q), out_dtype=tl.int32)
        if CAUSAL or MASK_ROWS:
            seen = _beside(seen, dots)
        # The products in the order of _scores, so that these are the forward's bits.
        s = dots.to(tl.float32) * q_scale[None, :] * k_scale[:, None]
        if bias_ptr is not None:
            bias = _tile(bias_ptr, rows, cols, queries, keys, stride_bq, stride_bk, BIAS_ROWS).to(tl.float32)
            s = _add(s, tl.trans(bias), USE_ASM)
            bias_ptr += BLOCK_M * stride_bq
        s = tl.where(seen, s, float("-inf"))
        share = _exp(_add(s, -shift[None, :], USE_ASM), USE_ASM)

        of_v = _share_of_v(share, v_scale, v_scale_inv, v_max, e_inv, UNIT, USE_ASM)
        of_v = _round_to(tl.where(seen, of_v, 0.0), g.dtype, USE_ASM)
        grad_v = _dot(of_v, g, grad_v, USE_ASM)

        grad_p = _dot(v, tl.trans(g), tl.zeros([BLOCK_N, BLOCK_M], tl.float32), USE_ASM) * v_scale[:, None]
        grad_s = share * inv[None, :] * _add(grad_p, -mean[None, :], USE_ASM)
        grad_s = tl.where(seen, grad_s * q_scale[None, :], 0.0)
        grad_k = _add_product(grad_s, q, grad_k, g.dtype, USE_ASM)
        if mask_ptr is not None:
            mask_ptr += BLOCK_M * stride_mq

    grad_v *= 1.0 / UNIT
    if k_passed_ptr is not None:
        grad_k = _passing(grad_k, k_passed_ptr, k_row, in_k, head_dim, BLOCK_N, DIM)
        grad_v = _passing(grad_v, v_passed_ptr, k_row, in_k, head_dim, BLOCK_N, DIM)
    tl.store(dk_ptr + at_k, _round_to(grad_k, dk_ptr.dtype.element_ty, USE_ASM), mask=inside)
    tl.store(dv_ptr + at_k, _round_to(grad_v, dv_ptr.dtype.element_ty, USE_ASM), mask=inside)


_grad_query = Launcher(_grad_query_kernel)
_grad_key = Launcher(_grad_key_kernel)


def qattention_backward(
    grad: torch.Tensor,
    q8: torch.Tensor,
    q_scale: torch.Tensor,
    k8: torch.Tensor,
    k_scale: torch.Tensor,
    v8: torch.Tensor,
    v_scale: torch.Tensor,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    q_passed: torch.Tensor | None,
    k_passed: torch.Tensor | None,
    v_passed: torch.Tensor | None,
    *,
    causal: bool,
    softmax_scale: float,
    want_bias: bool,
    out_dtype: torch.dtype,
    tiles: tuple[AttentionTile, AttentionTile] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """dQ, dK, dV in `out_dtype`, and d(bias) in fp32 or None; arguments as in `reference.qattention_backward`.

    With `want_bias` dS is written out, fp32 [batch, heads, queries, keys], and summed to the bias's shape.

    Args:
        grad: fp32, fp16 or bf16 [batch, heads, queries, head_dim], any strides; head_dim up to 128. Its type is that of
            the products.
        tiles: of queries and of keys, in place of the table's choice; they change the order of float sums.

    Raises:
        ValueError: for a head_dim above 128.
    """
    batch, heads, queries, head_dim = q8.shape
    keys = k8.shape[2]
    dim = padded_dim(head_dim)
    grads = [torch.empty(x.shape, dtype=out_dtype, device=grad.device) for x in (q8, k8, v8)]
    if q8.numel() == 0 or keys == 0:
        grads = [x.zero_() for x in grads]
        return *grads, torch.zeros(bias.shape, dtype=torch.float32, device=grad.device) if want_bias else None
    shape = (batch, heads, queries, keys)
    grad = _unit_stride(grad)
    q8, q_scale, k8, k_scale, v8, v_scale = (x.contiguous() for x in (q8, q_scale, k8, k_scale, v8, v_scale))
    passed = [None if x is None else x.contiguous() for x in (q_passed, k_passed, v_passed)]
    mask, mask_strides = strides(mask, shape)
    bias_shape = None if bias is None else bias.shape
    bias, bias_strides = strides(bias, shape)
    stats = torch.empty(batch * heads, 5, queries, dtype=torch.float32, device=grad.device)
    grad_s = None
    if want_bias:  # zeros: a causal tile leaves hidden keys out
        grad_s = torch.zeros(shape, dtype=torch.float32, device=grad.device)
    mask_rows, bias_rows = mask_strides[2] != 0, bias_strides[2] != 0
    query_tile, key_tile = tiles or attention_grad_tiles(dim, grad.element_size(), mask_rows or bias_rows)
    numbers = (heads, queries, keys, head_dim, *grad.stride()[:3], *mask_strides, *bias_strides)
    facts = {"CAUSAL": causal, "MASK_ROWS": mask_rows, "BIAS_ROWS": bias_rows, "DIM": dim, "USE_ASM": not interpreted()}
    codes = (grad, q8, q_scale, k8, k_scale, v8, v_scale, mask, bias)
    with device_of(grad):
        _grad_query(
            (batch * heads * triton.cdiv(queries, query_tile.block_m),),
            *codes,
            passed[0],
            grads[0],
            grad_s,
            stats,
            softmax_scale,
            *numbers,
            **facts,
            **_blocks(query_tile),
        )
        _grad_key(
            (batch * heads * triton.cdiv(keys, key_tile.block_n),),
            *codes,
            *passed[1:],
            *grads[1:],
            stats,
            *numbers,
            **facts,
            **_blocks(key_tile),
        )
    return *grads, grad_s.sum_to_size(bias_shape) if want_bias else None


def _blocks(tile: AttentionTile) -> dict:
    return {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
