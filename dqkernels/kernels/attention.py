"""Int8 attention in Triton, prefill form: int8 Q, K, V and 8-bit probabilities (docs/design.md, "Attention").

The codes of a probability are rounded against the final maximum, so a tile of queries passes over the keys twice:
first for the largest score and the largest visible V scale, then for the two integer sums. Maxima and integer sums
have no order, hence a result depends on neither the tile nor the batch, and decoding a token (attention_decode.py)
gives its prefill's bits. Q, K and V are quantized by launches of their own, V transposed, because int8 matrix
instructions read four consecutive keys of one column.

Importing this file imports Triton; nothing imports it when the package is imported.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .gemm import interpreted
from .launch import Launcher
from .quantize import _MAGIC, _MAGIC_BITS, _abs_bits, _codes, _row_scale, device_of
from .rounding import _add, _round_to
from .tiles import AttentionTile, attention_tile

MAX_HEAD_DIM = 128
_TOKENS = 128  # K and V are padded to a multiple of this many tokens, so that no tile of keys needs a mask to be read


# -------------------------------------------------------------------- shared with attention_decode.py


@triton.jit
def _load_rows(row_ptrs, inside, head_dim, factor, DIM: tl.constexpr):
    """fp32 [T, DIM] times `factor`, rounded, from the row that each pointer starts; 0 outside."""
    dims = tl.arange(0, DIM)
    inside = inside[:, None] & (dims < head_dim)[None, :]
    return tl.load(row_ptrs[:, None] + dims[None, :], mask=inside, other=0.0).to(tl.float32) * factor


@triton.jit
def _quantize_tile(x, amax_bits_ptr, clip):
    """fp32 [T, D] -> int32 codes [T, D] and fp32 scale [T]; one scale for all rows where amax_bits_ptr is given."""
    bits = tl.max(_abs_bits(x), 1)
    if amax_bits_ptr is not None:
        bits = tl.zeros_like(bits) + tl.load(amax_bits_ptr)
    scale, inv, usable = _row_scale(bits, None, clip, 0)
    return _codes(x, inv[:, None], clip, usable[:, None]), scale


@triton.jit
def _scores(dots, q_scale, k_scale, bias, visible, USE_ASM: tl.constexpr):
    """s = float(q . k) * qs * ks (+ bias), each step rounded on its own; -inf where the key is not visible."""
    s = dots.to(tl.float32) * q_scale[:, None] * k_scale[None, :]
    if bias is not None:
        s = _add(s, bias, USE_ASM)
    return tl.where(visible, s, float("-inf"))


@triton.jit
def _beside(seen, dots):
    """`seen`, in the layout of the dots: the comparison always holds, but only we know that. Left to itself the
    compiler takes the maximum of the V scales in another layout, with 16 shuffles where this one needs 2."""
    return seen & (dots != -2147483648)


@triton.jit
def _update_top(top, v_max, s, v_scale, visible):
    """Running maxima per query: of the scores, and of the visible V scales. A NaN counts as +inf, which nothing
    finite reaches, and a row that ends with one becomes NaN; a float max would drop it."""
    top = tl.maximum(top, tl.max(tl.where(s == s, s, float("inf")), 1))
    v_scale = tl.where(v_scale == v_scale, v_scale, float("inf"))
    v_max = tl.maximum(v_max, tl.max(tl.where(visible, v_scale[None, :], 0.0), 1))
    return top, v_max


@triton.jit
def _round(t, USE_ASM: tl.constexpr):
    """round_half_even of 0 <= t < 2^22 as int32."""
    return _add(t, tl.zeros_like(t) + _MAGIC, USE_ASM).to(tl.int32, bitcast=True) - _MAGIC_BITS


@triton.jit
def _exp(x, USE_ASM: tl.constexpr):
    """exp(x) for x <= 0, within 2 ulp and |x| / 2 more of the product; a GPU flushes results below 2^-126 to 0."""
    if USE_ASM:
        # tl.exp is the same instruction with three more around it that keep subnormal results.
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * 1.4426950408889634], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp(x)


@triton.jit
def _shares(s, top, v_scale, v_inv, USE_ASM: tl.constexpr):
    """e = round(127 exp(s - m)) as int32 and c = round(127 exp(s - m) min(1, vs / vs_max)) as int8, both 0..127."""
    t = 127.0 * _exp(_add(s, -top[:, None], USE_ASM), USE_ASM)
    v_scale = tl.where(v_scale == v_scale, v_scale, 0.0)  # an invisible key must not make 0 * NaN of it
    ratio = tl.minimum(v_scale[None, :] * v_inv[:, None], 1.0)
    return _round(t, USE_ASM), _round(t * ratio, USE_ASM).to(tl.int8)


@triton.jit
def _finite_top(top, v_max):
    """What the second pass subtracts and multiplies by: m (0 where no key is visible) and 1 / vs_max."""
    return tl.where(top == float("-inf"), 0.0, top), tl.div_rn(1.0, tl.where(v_max > 0.0, v_max, 1.0))


@triton.jit
def _output(total, weight, top, v_max):
    """vs_max * sum(c v) / sum(e); 0 where no key was visible, NaN where a NaN or an infinite score was."""
    weight = tl.where(weight == 0, 1, weight).to(tl.float32)
    out = tl.div_rn(v_max[:, None] * total.to(tl.float32), weight[:, None])
    spoilt = (top == float("inf")) | (v_max == float("inf"))
    return tl.where(spoilt[:, None], float("nan"), out)


# ---------------------------------------------------------------------------------------------- K and V


@triton.jit
def _pair_keys(x, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """Reorders each 32 columns: 16h + 8p + 2t + j goes to 16h + 4t + 2p + j.

    A thread of an int8 matrix instruction owns columns 2t and 2t + 1 of every 8 of its result, and wants columns
    4t..4t+3 of every 16 of its next left operand. The order of the keys inside a sum is free: with V's keys in this
    order too, the codes of the probabilities stay in their thread.
    """
    x = tl.reshape(x, [ROWS, KEYS // 32, 2, 2, 4, 2])
    return tl.reshape(tl.permute(x, 0, 1, 2, 4, 3, 5), [ROWS, KEYS])


@triton.jit
def _amax_kernel(
    x_ptr,  # float [batch, heads, count, head_dim] by strides
    amax_bits_ptr,  # int32 [1], zero before the launch
    factor,
    heads,
    count,
    head_dim,
    stride_b,
    stride_h,
    stride_t,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The bits of max|x * factor| over the tensor; a block of tokens of one head per program."""
    tiles = tl.cdiv(count, BLOCK)
    head = (tl.program_id(0) // tiles).to(tl.int64)
    tokens = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    x_ptr += head // heads * stride_b + head % heads * stride_h
    x = _load_rows(x_ptr + tokens.to(tl.int64) * stride_t, tokens < count, head_dim, factor, DIM)
    tl.atomic_max(amax_bits_ptr, tl.max(tl.max(_abs_bits(x), 1), 0), sem="relaxed")


@triton.jit
def _quantize_tokens_kernel(
    x_ptr,  # float [batch, heads, count, head_dim] by strides
    q_ptr,  # int8 [batch * heads, padded, DIM], or [batch * heads, DIM, padded] with TRANSPOSE
    scale_ptr,  # fp32 [batch * heads, padded]
    amax_bits_ptr,  # int32 [1] for per_tensor, else None
    factor,
    clip,  # fp32, +inf for none
    heads,
    count,
    padded,
    head_dim,
    stride_b,
    stride_h,
    stride_t,
    TRANSPOSE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Int8 codes and scales of x * factor, zero codes in the padding; a block of tokens of one head per program."""
    tiles = padded // BLOCK
    head = (tl.program_id(0) // tiles).to(tl.int64)
    tokens = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    x_ptr += head // heads * stride_b + head % heads * stride_h
    x = _load_rows(x_ptr + tokens.to(tl.int64) * stride_t, tokens < count, head_dim, factor, DIM)
    codes, scale = _quantize_tile(x, amax_bits_ptr, clip)
    if TRANSPOSE:
        # V. The scale 1 of a zero row would become vs_max and round the other keys' c away.
        empty = (tl.max(tl.abs(codes), 1) == 0) & (scale == scale)
        scale = tl.where(empty, 0.0, scale)
    tl.store(scale_ptr + head * padded + tokens, scale)
    dims = tl.arange(0, DIM)
    q_ptr += head * padded * DIM
    if TRANSPOSE:
        codes = _pair_keys(tl.trans(codes.to(tl.int8)), DIM, BLOCK)
        tl.store(q_ptr + dims.to(tl.int64)[:, None] * padded + tokens[None, :], codes)
    else:
        tl.store(q_ptr + tokens.to(tl.int64)[:, None] * DIM + dims[None, :], codes.to(tl.int8))


# -------------------------------------------------------------------------------------------- attention


@triton.jit
def _tile(ptr, rows, keys, count, key_count, stride_q, stride_k, ROWS: tl.constexpr):
    """A [rows, keys] tile of the mask or the bias; [1, keys] where all queries share one row (not ROWS).

    `ptr` is that of the tile's first row; from there 32 bits reach (see `strides`), and leave registers free.
    """
    at = keys[None, :] * stride_k
    inside = (keys < key_count)[None, :]
    if ROWS:
        at = at + tl.arange(0, rows.shape[0])[:, None] * stride_q
        inside = inside & (rows < count)[:, None]
    return tl.load(ptr + at, mask=inside, other=0)


@triton.jit
def _visible(mask_ptr, rows, keys, count, key_count, stride_q, stride_k, CAUSAL: tl.constexpr, ROWS: tl.constexpr):
    """bool [rows, keys] (or [1, keys]): the key exists, the mask shows it, and it is not in the future."""
    seen = (keys < key_count)[None, :]
    if mask_ptr is not None:
        seen = seen & (_tile(mask_ptr, rows, keys, count, key_count, stride_q, stride_k, ROWS) != 0)
    if CAUSAL:
        seen = seen & (keys[None, :] <= (key_count - count + rows)[:, None])
    return seen


@triton.jit
def _step(
    q, q_scale, k_ptrs, k_scale_ptr, v_scale_ptr, mask_ptr, bias_ptr, rows, cols, queries, keys,
    stride_mq, stride_mk, stride_bq, stride_bk,
    CAUSAL: tl.constexpr, MASK_ROWS: tl.constexpr, BIAS_ROWS: tl.constexpr, USE_ASM: tl.constexpr,
):  # fmt: skip
    """Scores [BLOCK_M, BLOCK_N], V scales and visibility of the keys `cols`; both passes call it."""
    seen = _visible(mask_ptr, rows, cols, queries, keys, stride_mq, stride_mk, CAUSAL, MASK_ROWS)
    bias = None
    if bias_ptr is not None:
        bias = _tile(bias_ptr, rows, cols, queries, keys, stride_bq, stride_bk, BIAS_ROWS).to(tl.float32)
    dots = tl.dot(q, tl.load(k_ptrs), out_dtype=tl.int32)
    if CAUSAL or MASK_ROWS:
        seen = _beside(seen, dots)
    s = _scores(dots, q_scale, tl.load(k_scale_ptr + cols), bias, seen, USE_ASM)
    return s, tl.load(v_scale_ptr + cols), seen


@triton.jit
def _attention_kernel(
    q_ptr,  # int8 [batch * heads, padded_q, DIM]
    q_scale_ptr,  # fp32 [batch * heads, padded_q]
    k_ptr,  # int8 [batch * heads, padded, DIM]
    k_scale_ptr,  # fp32 [batch * heads, padded]
    v_ptr,  # int8 [batch * heads, DIM, padded], keys in the order of _pair_keys
    v_scale_ptr,  # fp32 [batch * heads, padded]
    mask_ptr,  # uint8 [batch, heads, queries, keys] by strides, or None
    bias_ptr,  # float [batch, heads, queries, keys] by strides, or None
    out_ptr,  # float [batch, heads, queries, head_dim] contiguous
    heads,
    queries,
    keys,
    padded_q,
    padded,
    head_dim,
    stride_mb,
    stride_mh,
    stride_mq,
    stride_mk,
    stride_bb,
    stride_bh,
    stride_bq,
    stride_bk,
    CAUSAL: tl.constexpr,
    MASK_ROWS: tl.constexpr,  # the mask differs between queries
    BIAS_ROWS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    USE_ASM: tl.constexpr,  # False in the interpreter, which has no inline assembly
):
    """A tile of BLOCK_M queries of one head per program."""
    tiles = tl.cdiv(queries, BLOCK_M)
    head = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tiles - 1 - tl.program_id(0) % tiles  # under a causal mask the last tile has the most keys
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    batch = head // heads
    if mask_ptr is not None:
        mask_ptr += batch * stride_mb + head % heads * stride_mh + (tile * BLOCK_M).to(tl.int64) * stride_mq
    if bias_ptr is not None:
        bias_ptr += batch * stride_bb + head % heads * stride_bh + (tile * BLOCK_M).to(tl.int64) * stride_bq
    k_scale_ptr += head * padded
    v_scale_ptr += head * padded

    dims = tl.arange(0, DIM)
    block = tl.arange(0, BLOCK_N)
    k_ptrs = k_ptr + head * padded * DIM + block.to(tl.int64)[None, :] * DIM + dims[:, None]
    v_ptrs = v_ptr + head * padded * DIM + dims.to(tl.int64)[None, :] * padded + block[:, None]
    q_row = head * padded_q + rows
    q = tl.load(q_ptr + q_row[:, None] * DIM + dims[None, :])
    q_scale = tl.load(q_scale_ptr + q_row)

    end = keys
    if CAUSAL:  # keys past the last query's are visible to none
        end = tl.minimum(keys, keys - queries + (tile + 1) * BLOCK_M)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    # Where all queries see the same keys, one number stands for all.
    v_max = tl.zeros([BLOCK_M if CAUSAL or MASK_ROWS else 1], tl.float32)
    k_tiles = k_ptrs
    for start in range(0, end, 2 * BLOCK_N):
        # Two dots per loop body: with one, Triton 3.8 and 3.9 split int8 fragments into bytes on sm_80 and spill.
        for half in tl.static_range(2):
            s, v_scale, seen = _step(
                q, q_scale, k_tiles, k_scale_ptr, v_scale_ptr, mask_ptr, bias_ptr, rows, start + half * BLOCK_N + block,
                queries, keys, stride_mq, stride_mk, stride_bq, stride_bk, CAUSAL, MASK_ROWS, BIAS_ROWS, USE_ASM,
            )  # fmt: skip
            top, v_max = _update_top(top, v_max, s, v_scale, seen)
            k_tiles += BLOCK_N * DIM

    shift, v_inv = _finite_top(top, v_max)
    weight = tl.zeros([BLOCK_M], tl.int32)
    total = tl.zeros([BLOCK_M, DIM], tl.int32)
    for start in range(0, end, BLOCK_N):
        s, v_scale, _ = _step(
            q, q_scale, k_ptrs, k_scale_ptr, v_scale_ptr, mask_ptr, bias_ptr, rows, start + block,
            queries, keys, stride_mq, stride_mk, stride_bq, stride_bk, CAUSAL, MASK_ROWS, BIAS_ROWS, USE_ASM,
        )  # fmt: skip
        e, c = _shares(s, shift, v_scale, v_inv, USE_ASM)
        weight += tl.sum(e, 1)
        total = tl.dot(_pair_keys(c, BLOCK_M, BLOCK_N), tl.load(v_ptrs), total, out_dtype=tl.int32)
        k_ptrs += BLOCK_N * DIM
        v_ptrs += BLOCK_N

    out = _output(total, weight, top, v_max)
    at = out_ptr + (head * queries + rows)[:, None] * head_dim + dims[None, :]
    inside = (rows < queries)[:, None] & (dims < head_dim)[None, :]
    tl.store(at, _round_to(out, out_ptr.dtype.element_ty, USE_ASM), mask=inside)


_amax = Launcher(_amax_kernel)
_quantize_tokens = Launcher(_quantize_tokens_kernel)
_attention = Launcher(_attention_kernel)


def padded_dim(head_dim: int) -> int:
    """head_dim as a kernel sees it: a power of two from 32 on, the last dimensions zero.

    Raises:
        ValueError: above 128.
    """
    if not 0 < head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"head_dim must be 1..{MAX_HEAD_DIM} on the triton backend, got {head_dim}")
    return max(32, triton.next_power_of_2(head_dim))


def _unit_stride(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def amax_bits(x: torch.Tensor, factor: float) -> torch.Tensor:
    """int32 [1]: the bits of max|x * factor| of [batch, heads, count, head_dim], the one row of `per_tensor`."""
    batch, heads, count, head_dim = x.shape
    bits = torch.zeros(1, dtype=torch.int32, device=x.device)
    _amax(
        (batch * heads * triton.cdiv(count, 64),),
        x,
        bits,
        factor,
        heads,
        count,
        head_dim,
        *x.stride()[:3],
        DIM=padded_dim(head_dim),
        BLOCK=64,
    )
    return bits


def _codes_of_tokens(x, factor, per_tensor, clip, transpose=False):
    """Codes and scales of Q, K or V in the layout that `_attention_kernel` reads."""
    batch, heads, count, head_dim = x.shape
    dim, padded = padded_dim(head_dim), triton.cdiv(count, _TOKENS) * _TOKENS
    codes = torch.empty(batch * heads, padded, dim, dtype=torch.int8, device=x.device)
    scale = torch.empty(batch * heads, padded, dtype=torch.float32, device=x.device)
    _quantize_tokens(
        (batch * heads * (padded // 64),),
        x,
        codes,
        scale,
        amax_bits(x, factor) if per_tensor else None,
        factor,
        clip,
        heads,
        count,
        padded,
        head_dim,
        *x.stride()[:3],
        TRANSPOSE=transpose,
        DIM=dim,
        BLOCK=64,
    )
    return codes, scale


def strides(x: torch.Tensor | None, shape: tuple) -> tuple[torch.Tensor | None, tuple[int, ...]]:
    """x broadcast to `shape` (bool as uint8) and its strides; zeros for None.

    Copied only where 128 rows or a row of keys span more than 32-bit offsets reach.
    """
    if x is None:
        return None, (0,) * len(shape)
    x = x.expand(shape)
    if 128 * x.stride(2) + shape[3] * x.stride(3) >= 1 << 31:
        x = x.contiguous()
    return x.view(torch.uint8) if x.dtype == torch.bool else x, x.stride()


def qattention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    causal: bool,
    softmax_scale: float,
    mode: str,
    clip: float | None,
    tile: AttentionTile | None = None,
) -> torch.Tensor:
    """Attention [batch, heads, queries, head_dim] in q's dtype; arguments as in `reference.qattention`.

    Args:
        q, k, v: fp32, fp16 or bf16 [batch, heads, queries or keys, head_dim], any strides; head_dim up to 128.
        mask: bool, bias: fp32, fp16 or bf16, both broadcastable to [batch, heads, queries, keys], or None.
        mode: "per_token" or "per_tensor".
        tile: in place of the table's choice; changes the speed, never a bit.

    Raises:
        ValueError: for a head_dim above 128.
    """
    batch, heads, queries, head_dim = q.shape
    keys = k.shape[2]
    dim = padded_dim(head_dim)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if q.numel() == 0 or keys == 0:
        return out.zero_()
    q, k, v = _unit_stride(q), _unit_stride(k), _unit_stride(v)
    mask, mask_strides = strides(mask, (batch, heads, queries, keys))
    bias, bias_strides = strides(bias, (batch, heads, queries, keys))
    clip = float("inf") if clip is None else float(clip)
    per_tensor = mode == "per_tensor"
    mask_rows, bias_rows = mask_strides[2] != 0, bias_strides[2] != 0
    tile = tile or attention_tile(queries, mask_rows or bias_rows)
    with device_of(q):
        q_codes, q_scale = _codes_of_tokens(q, softmax_scale, per_tensor, clip)
        k_codes, k_scale = _codes_of_tokens(k, 1.0, per_tensor, clip)
        v_codes, v_scale = _codes_of_tokens(v, 1.0, per_tensor, clip, transpose=True)
        _attention(
            (batch * heads * triton.cdiv(queries, tile.block_m),),
            q_codes,
            q_scale,
            k_codes,
            k_scale,
            v_codes,
            v_scale,
            mask,
            bias,
            out,
            heads,
            queries,
            keys,
            q_codes.shape[1],
            k_codes.shape[1],
            head_dim,
            *mask_strides,
            *bias_strides,
            CAUSAL=causal,
            MASK_ROWS=mask_rows,
            BIAS_ROWS=bias_rows,
            DIM=dim,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            USE_ASM=not interpreted(),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return out
