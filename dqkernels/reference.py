"""Every op of the table in plain torch, exact where the contract is exact: what each kernel is compared with.

Integer products are summed in int32, or in a float format in which no partial sum can round. Nothing here looks
at a device, a backend or a module.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from dqkernels import packing, qmath

ACTIVATIONS = ("none", "relu", "gelu")
#: Integers of magnitude up to 2^24 and 2^53 are exact in fp32 and fp64, in any order of summation.
_FP32_EXACT = 1 << 24
#: Bytes of unpacked codes handled at once by the GEMM, so that a 250027-row head does not double the memory.
_UNPACK_BYTES = 32 << 20


def int_matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Exact `a . b^T` of int8 [M, K] and int8 [N, K] in int32 [M, N]; any M, N >= 0, K <= 131,071."""
    m, k = a.shape
    n = b.shape[0]
    if m == 0 or n == 0:
        return a.new_zeros(m, n, dtype=torch.int32)
    # With K = 1 (the tail of a group) torch's matmul returns uninitialised memory.
    if a.device.type == "cpu" and k > 1 and _cpu_int_mm_is_exact():
        return torch._int_mm(a, b.t())
    if a.device.type == "cuda" and m > 16 and k % 8 == 0 and n % 8 == 0:
        return torch._int_mm(a, b.t())
    if k * qmath.ACT_MAX * 128 <= _FP32_EXACT:
        # Codes have 8 significant bits, so TF32 or bf16 products inside this matmul are exact as well.
        return (a.float() @ b.float().t()).to(torch.int32)
    return (a.double() @ b.double().t()).to(torch.int32)


@functools.cache
def _cpu_int_mm_is_exact() -> bool:
    """Whether torch's int8 matmul is exact here: without VNNI, oneDNN may add pairs in saturating int16."""
    a = torch.full((20, 512), 127, dtype=torch.int8)
    a[1::2] = -127
    b = torch.full((24, 512), -127, dtype=torch.int8)
    b[1::3] = 127
    b[2::3, ::2] = -128
    try:
        return all(
            torch.equal(torch._int_mm(a[:m], b.t()), (a[:m].double() @ b.double().t()).to(torch.int32)) for m in (1, 20)
        )
    except RuntimeError:
        return False


def accumulate(
    q: torch.Tensor,
    row_sum: torch.Tensor | None,
    codes: torch.Tensor,
    group_mult: torch.Tensor | None,
    four_level: bool,
    group_size: int,
) -> torch.Tensor:
    """The exact int32 sum [M, N] that the epilogue scales.

    `sum(q * code)`; for four_level `2 * acc + row_sum`; with groups `sum_g mult[n, g] * acc_g`, where acc_g is
    that of the group (design section 3).
    """
    if group_mult is None:
        acc = int_matmul(q, codes)
        if not four_level:
            return acc
        if row_sum is None:
            row_sum = q.sum(dim=1, dtype=torch.int32)
        return 2 * acc + row_sum.unsqueeze(1)
    acc = q.new_zeros(q.shape[0], codes.shape[0], dtype=torch.int32)
    for group, start in enumerate(range(0, codes.shape[1], group_size)):
        stop = start + group_size
        part = accumulate(q[:, start:stop].contiguous(), None, codes[:, start:stop].contiguous(), None, four_level, -1)
        acc += part * group_mult[:, group].to(torch.int32)
    return acc


def epilogue(
    acc: torch.Tensor,
    act_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """int32 [M, N] to floats, each step rounded on its own, in the one order that all backends share."""
    t = acc.float()
    t = t * act_scale.unsqueeze(1)
    t = t * weight_scale.reshape(1, -1)
    if bias is not None:
        t = t + bias.float()
    t = activate(t, activation)
    if residual is not None:
        t = t + residual.float()
    return t.to(out_dtype)


def activate(t: torch.Tensor, activation: str) -> torch.Tensor:
    """`none`, `relu`, or `gelu` (the exact erf form)."""
    if activation == "relu":
        return t.relu()
    if activation == "gelu":
        return F.gelu(t)
    return t


def qgemm(
    q: torch.Tensor,
    act_scale: torch.Tensor,
    row_sum: torch.Tensor | None,
    qweight: torch.Tensor,
    weight_scale: torch.Tensor,
    group_mult: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    *,
    bits: int,
    four_level: bool,
    group_size: int,
    out_features: int,
    activation: str,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """`Y = X . W^T` of int8 activations [..., K] and packed weights, with the epilogue; [..., out_features].

    act_scale fp32 [...], row_sum int32 [...] or None, qweight packed v1, weight_scale fp32 [N] or [1],
    group_mult uint8 [N, G] or None, bias [N] or None, residual [..., N] or None.
    """
    k = q.shape[-1]
    rows = q.reshape(-1, k)
    scale = act_scale.reshape(-1)
    sums = None if row_sum is None or row_sum.numel() != rows.shape[0] else row_sum.reshape(-1)
    added = None if residual is None else residual.reshape(-1, out_features)
    packing.check_packed(qweight, out_features, k, bits)
    out = torch.empty(rows.shape[0], out_features, dtype=out_dtype, device=q.device)
    step = max(packing.BLOCK_N, _UNPACK_BYTES // k // packing.BLOCK_N * packing.BLOCK_N)
    for first in range(0, out_features, step):
        last = min(first + step, out_features)
        codes = packing.unpack(qweight[first : packing.padded_n(last)], last - first, k, bits)
        mult = None if group_mult is None else group_mult[first:last]
        acc = accumulate(rows, sums, codes, mult, four_level, group_size)
        out[:, first:last] = epilogue(
            acc,
            scale,
            weight_scale[first:last] if weight_scale.numel() > 1 else weight_scale,
            None if bias is None else bias[first:last],
            None if added is None else added[:, first:last],
            activation,
            out_dtype,
        )
    return out.reshape(*q.shape[:-1], out_features)


def dequantize(
    qweight: torch.Tensor,
    weight_scale: torch.Tensor,
    group_mult: torch.Tensor | None,
    *,
    bits: int,
    four_level: bool,
    group_size: int,
    out_features: int,
    in_features: int,
) -> torch.Tensor:
    """The float matrix of packed weights: fp32 [out_features, in_features]."""
    codes = packing.unpack(qweight, out_features, in_features, bits)
    return qmath.dequantize_codes(codes, weight_scale, group_mult, four_level, group_size)


def pack_bits(mask: torch.Tensor) -> torch.Tensor:
    """bool [M, K] -> uint8 [M, ceil(K / 8)]; element k is bit k % 8 of byte k // 8."""
    m, k = mask.shape
    bits = F.pad(mask, (0, -k % 8)).reshape(m, -(-k // 8), 8).to(torch.int32)
    return (bits << torch.arange(8, device=mask.device)).sum(dim=-1).to(torch.uint8)


def unpack_bits(packed: torch.Tensor, k: int) -> torch.Tensor:
    """The inverse of `pack_bits`: bool [M, k]."""
    bits = packed.to(torch.int32).unsqueeze(-1) >> torch.arange(8, device=packed.device)
    return (bits & 1).flatten(1)[:, :k].bool()


def grad_input(
    grad: torch.Tensor,
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
    """Straight-through `grad_x = g . W^` [M, in_features] of grad [M, N] and packed weights, in fp32.

    `passed` is `pack_bits(|x| < clip)`, or None without a clip: the gradient is zero where the clip saturated.
    """
    weight = dequantize(
        qweight,
        weight_scale,
        group_mult,
        bits=bits,
        four_level=four_level,
        group_size=group_size,
        out_features=grad.shape[1],
        in_features=in_features,
    )
    grad_x = grad.float() @ weight
    if passed is not None:
        grad_x = torch.where(unpack_bits(passed, in_features), grad_x, 0.0)
    return grad_x.to(out_dtype)


def grad_weight(grad: torch.Tensor, q: torch.Tensor, act_scale: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """Straight-through `grad_w = g^T . x^` [N, K] of grad [M, N] and the forward's int8 q [M, K], in fp32."""
    return (grad.float().t() @ (q.float() * act_scale.unsqueeze(1))).to(out_dtype)


def qembedding(
    ids: torch.Tensor,
    qweight: torch.Tensor,
    weight_scale: torch.Tensor,
    group_mult: torch.Tensor | None,
    position: torch.Tensor | None,
    *,
    bits: int,
    four_level: bool,
    group_size: int,
    embedding_dim: int,
    embed_scale: float,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Rows of the packed table: `float32(level) * weight_scale`, `* embed_scale`, `+ position`, one rounding.

    ids int [...], position [..., embedding_dim] or broadcastable, returns [..., embedding_dim]. Only the rows
    asked for are unpacked.

    An id outside 0..N-1 is an IndexError on the CPU and a failed device-side assertion on a GPU, without a wait:
    `weight_scale` has no padding rows. With one scale for the whole table (per_tensor, which no `DQConfig` gives an
    embedding) the padding rows N..ceil16(N)-1 read as zeros; the op refuses their ids on the CPU, not on a GPU.
    """
    flat = ids.reshape(-1)
    # index_select and not [...]: it takes no negative ids, which would read rows from the end.
    codes = packing.unpack(_pad_rows(qweight.index_select(0, flat)), flat.numel(), embedding_dim, bits)
    scale = weight_scale.index_select(0, flat) if weight_scale.numel() > 1 else weight_scale
    mult = None if group_mult is None else group_mult.index_select(0, flat)
    rows = qmath.dequantize_codes(codes, scale, mult, four_level, group_size)
    if embed_scale != 1.0:
        rows = rows * torch.full_like(rows, embed_scale)
    rows = rows.reshape(*ids.shape, embedding_dim)
    if position is not None:
        rows = rows + position.float()
    return rows.to(out_dtype)


def _pad_rows(rows: torch.Tensor) -> torch.Tensor:
    missing = packing.padded_n(rows.shape[0]) - rows.shape[0]
    return F.pad(rows, (0, 0, 0, missing)) if missing else rows


def layernorm_quantize(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    eps: float,
    mode: str,
    clip: float | None,
    act_scale: torch.Tensor | None,
    want_sum: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """LayerNorm of `x (+ residual)` in fp32, rounded to x's dtype, and its int8 form.

    Returns y [..., K] in x's dtype, then q, scale and row_sum of `quantize_activation(y)`.
    """
    total = x.float() if residual is None else x.float() + residual.float()
    y = F.layer_norm(total, (x.shape[-1],), weight.float(), None if bias is None else bias.float(), eps).to(x.dtype)
    return y, *qmath.quantize_activation(y, mode, clip, act_scale, want_sum)


def gelu_quantize(
    x: torch.Tensor, *, mode: str, clip: float | None, act_scale: torch.Tensor | None, want_sum: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """GELU (erf form) in fp32, rounded to x's dtype, then `quantize_activation`."""
    # On CPU tensors torch has another GELU for strided ones, with other last bits.
    y = F.gelu(x.float().contiguous()).to(x.dtype)
    return qmath.quantize_activation(y, mode, clip, act_scale, want_sum)


def qattention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    causal: bool,
    softmax_scale: float,
    mode: str,
    clip: float | None,
) -> torch.Tensor:
    """Attention with int8 Q (after `softmax_scale`), K, V and 8-bit probabilities (design section 3).

    `s_j = float32(q . k_j) * qs * ks_j (+ bias)`, `m = max s` over visible keys,
    `e_j = round(127 exp(s_j - m))`, `c_j = round(127 exp(s_j - m) min(1, vs_j (1 / vs_max)))`,
    `out = vs_max * sum(c_j v_j) / sum(e_j)`; both sums int32. `per_tensor` gives every row the same scales. vs_max is
    taken over the visible rows of V that are not all zero.

    Args:
        q: [batch, heads, queries, head_dim]; k, v: [batch, heads, keys, head_dim]; fp32, fp16 or bf16.
        mask: bool, broadcastable to [batch, heads, queries, keys]; True where a key is visible. None: all.
        bias: float, broadcastable likewise, added to the scores (T5's position bias).
        causal: query i of `queries` sees keys up to `keys - queries + i`.
        mode: `per_token` (one scale per token and head) or `per_tensor` (DQ-BART's rule).

    Returns:
        [batch, heads, queries, head_dim] in q's dtype. A query that sees no key gets zeros.
    """
    batch, heads, queries, head_dim = q.shape
    keys = k.shape[2]
    q8, q_scale, _ = qmath.quantize_activation(q.float() * softmax_scale, mode, clip)
    k8, k_scale, _ = qmath.quantize_activation(k, mode, clip)
    v8, v_scale, _ = qmath.quantize_activation(v, mode, clip)
    v_scale = value_scale(v8, v_scale)
    visible = torch.ones(queries, keys, dtype=torch.bool, device=q.device)
    if causal:
        visible = visible.tril(keys - queries)
    if mask is not None:
        visible = visible & mask
    return _attend(q8, q_scale, k8, k_scale, v8, v_scale, visible, bias, q.dtype)


def value_scale(v8: torch.Tensor, v_scale: torch.Tensor) -> torch.Tensor:
    """The scales [...] of V's codes [..., head_dim] with 0 for zero rows, as attention and its caches want them.

    The quantizer's 1 would become vs_max and round the other keys' c_j away. A NaN (a row that was not finite) stays.
    """
    return torch.where((v8 == 0).all(dim=-1) & v_scale.isfinite(), 0.0, v_scale)


def qattention_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    k_scale: torch.Tensor,
    v_cache: torch.Tensor,
    v_scale: torch.Tensor,
    lengths: torch.Tensor,
    source: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    causal: bool,
    softmax_scale: float,
    mode: str,
    clip: float | None,
) -> torch.Tensor:
    """`qattention` of a few new queries over K and V that were quantized when they were written to a cache.

    Args:
        q: [rows, heads, queries, head_dim]; fp32, fp16 or bf16. A row is a sequence or a beam.
        k_cache, v_cache: int8 [caches, heads, capacity, head_dim], codes of `quantize_activation`.
        k_scale, v_scale: fp32 [caches, heads, capacity], their scales (`per_tensor`: one number repeated); of V, what
            `value_scale` makes of them.
        lengths: int32 [rows], how many keys are visible; what lies behind them is never looked at.
        source: int32 [rows], the cache that a row reads (beams of one source share one), or None: its own.
        bias: float, broadcastable to [rows, heads, queries, capacity], or None.
        causal: query i of `queries` sees keys up to `lengths - queries + i`; else each sees all `lengths` keys.
        mode: of Q; `per_tensor` takes one scale over all rows.

    Returns:
        [rows, heads, queries, head_dim] in q's dtype. A query that sees no key gets zeros.
    """
    queries, capacity = q.shape[2], k_cache.shape[2]
    q8, q_scale, _ = qmath.quantize_activation(q.float() * softmax_scale, mode, clip)
    if source is not None:
        k_cache, k_scale, v_cache, v_scale = (t[source.long()] for t in (k_cache, k_scale, v_cache, v_scale))
    last = lengths.reshape(-1, 1, 1, 1).long().expand(-1, 1, queries, 1)
    if causal:
        last = last - torch.arange(queries - 1, -1, -1, device=q.device).reshape(queries, 1)
    visible = torch.arange(capacity, device=q.device) < last
    return _attend(q8, q_scale, k_cache, k_scale, v_cache, v_scale, visible, bias, q.dtype)


def _attend(
    q8: torch.Tensor,
    q_scale: torch.Tensor,
    k8: torch.Tensor,
    k_scale: torch.Tensor,
    v8: torch.Tensor,
    v_scale: torch.Tensor,
    visible: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The attention formula on codes [batch, heads, tokens, head_dim] and scales [batch, heads, tokens]."""
    batch, heads, queries, head_dim = q8.shape
    keys = k8.shape[2]
    if keys == 0 or q8.numel() == 0:
        return torch.zeros(q8.shape, dtype=dtype, device=q8.device)
    # head_dim * 127 * 127 < 2^24 for head_dim <= 1040: fp32 products of codes are exact integers.
    score = q8.float() @ k8.float().transpose(-1, -2)
    score = score * q_scale.unsqueeze(-1) * k_scale.unsqueeze(-2)
    if bias is not None:
        score = score + bias.float()
    visible = visible.expand(batch, heads, queries, keys)
    score = score.masked_fill(~visible, float("-inf"))
    top = score.amax(dim=-1, keepdim=True)
    share = torch.exp(score - torch.where(top == float("-inf"), 0.0, top))
    v_max = torch.where(visible, v_scale.unsqueeze(-2), 0.0).amax(dim=-1, keepdim=True)
    # One quotient per query; the clamp takes back the ulp by which the product may exceed 1.
    ratio = (v_scale.unsqueeze(-2) * qmath.divide(1.0, torch.where(v_max > 0, v_max, 1.0))).clamp(max=1.0)
    e = qmath.round_half_even(qmath.ACT_MAX * share)
    c = qmath.round_half_even(qmath.ACT_MAX * share * ratio.masked_fill(~visible, 0.0))
    # float64: up to 127 * 127 * keys, an exact int32.
    total = c.double() @ v8.double()
    weight = e.sum(dim=-1, keepdim=True)
    out = v_max * total.float() / torch.where(weight == 0, 1.0, weight)
    return out.to(dtype)
