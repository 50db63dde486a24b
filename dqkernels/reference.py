"""Every op of the table in plain torch, exact where the contract is exact: what each kernel is compared with.

Integer products are summed in int32, or in a float format in which no partial sum can round. Nothing here looks
at a device, a backend or a module.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from dqkernels import packing, qmath
from dqkernels.packing import pack_bits as pack_bits
from dqkernels.packing import unpack_bits as unpack_bits
from dqkernels.reference_attention import qattention as qattention
from dqkernels.reference_attention import qattention_backward as qattention_backward
from dqkernels.reference_attention import qattention_decode as qattention_decode
from dqkernels.reference_attention import quantize_into_cache as quantize_into_cache
from dqkernels.reference_attention import value_scale as value_scale

ACTIVATIONS = ("none", "relu", "gelu")
#: As many products of int8 codes (-128 among them) sum to 2^24 at most, and integers up to there are exact in fp32.
_FP32_K = (1 << 24) // (128 * qmath.ACT_MAX)
#: Bytes of unpacked codes handled at once by the GEMM, so that a 250027-row head does not double the memory.
_UNPACK_BYTES = 32 << 20


def int_matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Exact `a . b^T` of int8 [M, K] and int8 [N, K] in int32 [M, N]; any M, N >= 0, K <= 131,071."""
    m, k = a.shape
    n = b.shape[0]
    if m == 0 or n == 0:
        return a.new_zeros(m, n, dtype=torch.int32)
    # With K = 1 (the tail of a group) torch's matmul returns uninitialised memory.
    if a.device.type == "cpu" and k > 1 and _cpu_int_mm_is_fast() and _cpu_int_mm_is_exact():
        return torch._int_mm(a, b.t())
    if a.device.type == "cuda" and m > 16 and k % 8 == 0 and n % 8 == 0:
        return torch._int_mm(a, b.t())
    if a.device.type == "cpu":
        # Pieces of K whose sums are exact in fp32; a product in fp64 takes three times as long.
        pieces = zip(a.split(_FP32_K, dim=1), b.split(_FP32_K, dim=1), strict=True)
        return sum((x.float() @ y.float().t()).to(torch.int32) for x, y in pieces)
    if k <= _FP32_K:
        # Codes have 8 significant bits, so TF32 or bf16 products inside this matmul are exact as well.
        return (a.float() @ b.float().t()).to(torch.int32)
    return (a.double() @ b.double().t()).to(torch.int32)


@functools.cache
def _cpu_int_mm_is_fast() -> bool:
    """Whether this CPU has VNNI: without it torch's int8 matmul is 30 times slower than fp32's (torch 2.13, Zen 3)."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    if any(capabilities.get(name) for name in ("avx512_vnni", "avx_vnni")):
        return True
    return getattr(torch.cpu, "_is_vnni_supported", bool)()  # private; bool() is False


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
        return acc.mul_(2).add_(row_sum.unsqueeze(1))
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
    t = acc.float()  # in place from here on: large activations cost more in memory than in arithmetic
    t.mul_(act_scale.unsqueeze(1)).mul_(weight_scale.reshape(1, -1))
    if bias is not None:
        t.add_(bias.float())
    t = activate(t, activation)
    if residual is not None:
        t.add_(residual.float())
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
    out = q.new_empty(0, out_features, dtype=out_dtype)
    step = max(packing.BLOCK_N, _UNPACK_BYTES // k // packing.BLOCK_N * packing.BLOCK_N)
    for first in range(0, out_features, step):
        last = min(first + step, out_features)
        codes = packing.unpack(qweight[first : packing.padded_n(last)], last - first, k, bits)
        mult = None if group_mult is None else group_mult[first:last]
        acc = accumulate(rows, sums, codes, mult, four_level, group_size)
        part = epilogue(
            acc,
            scale,
            weight_scale[first:last] if weight_scale.numel() > 1 else weight_scale,
            None if bias is None else bias[first:last],
            None if added is None else added[:, first:last],
            activation,
            out_dtype,
        )
        if last - first == out_features:  # one part, which is all: no copy
            out = part
            break
        if first == 0:
            out = part.new_empty(rows.shape[0], out_features)
        out[:, first:last] = part
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
    return (grad.float().t() @ q.float().mul_(act_scale.unsqueeze(1))).to(out_dtype)


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


def layernorm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """LayerNorm of `x (+ residual)` in fp32, rounded to x's dtype."""
    total = x.float() if residual is None else x.float() + residual.float()
    return F.layer_norm(total, (x.shape[-1],), weight.float(), None if bias is None else bias.float(), eps).to(x.dtype)


def gelu(x: torch.Tensor) -> torch.Tensor:
    """GELU (erf form) in fp32, rounded to x's dtype."""
    # On CPU tensors torch has another GELU for strided ones, with other last bits.
    return F.gelu(x.float().contiguous()).to(x.dtype)


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
    y = layernorm(x, residual, weight, bias, eps)
    return y, *qmath.quantize_activation(y, mode, clip, act_scale, want_sum)


def gelu_quantize(
    x: torch.Tensor, *, mode: str, clip: float | None, act_scale: torch.Tensor | None, want_sum: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """GELU (erf form) in fp32, rounded to x's dtype, then `quantize_activation`."""
    return qmath.quantize_activation(gelu(x), mode, clip, act_scale, want_sum)
