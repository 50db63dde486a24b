"""Attention of `reference` in plain torch: the int8 form, its form over a cache, and its backward pass.

Nothing here looks at a device, a backend or a module; callers reach these functions through `reference`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from dqkernels import packing, qmath


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
    quantize: Callable = qmath.quantize_activation,
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
        quantize: `qmath.quantize_activation`, or a kernel that gives its bits.

    Returns:
        [batch, heads, queries, head_dim] in q's dtype. A query that sees no key gets zeros.
    """
    queries, keys = q.shape[2], k.shape[2]
    q8, q_scale, _ = quantize(q.float() * softmax_scale, mode, clip)
    k8, k_scale, _ = quantize(k, mode, clip)
    v8, v_scale, _ = quantize(v, mode, clip)
    v_scale = value_scale(v8, v_scale)
    visible = _visible(queries, keys, causal, mask, q.device)
    return _attend(q8, q_scale, k8, k_scale, v8, v_scale, visible, bias, q.dtype)


def value_scale(v8: torch.Tensor, v_scale: torch.Tensor) -> torch.Tensor:
    """The scales [...] of V's codes [..., head_dim] with 0 for zero rows, as attention and its caches want them.

    The quantizer's 1 would become vs_max and round the other keys' c_j away. A NaN (a row that was not finite) stays.
    """
    return torch.where((v8 == 0).all(dim=-1) & v_scale.isfinite(), 0.0, v_scale)


def quantize_into_cache(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    k_scale: torch.Tensor,
    v_cache: torch.Tensor,
    v_scale: torch.Tensor,
    position: torch.Tensor | None,
    *,
    mode: str,
    clip: float | None,
    quantize: Callable = qmath.quantize_activation,
) -> None:
    """Quantizes new keys and values as `qattention` would, and writes them where `qattention_decode` reads.

    Args:
        k, v: [rows, heads, tokens, head_dim]; fp32, fp16 or bf16. Row r belongs to cache r.
        k_cache, v_cache: int8 [caches, heads, capacity, head_dim], contiguous; written. There may be more caches than
            rows.
        k_scale, v_scale: fp32 [caches, heads, capacity], contiguous; written. A zero row of V gets 0 (`value_scale`).
        position: int32 [rows], where the first token of each row goes; or None: to 0, and the tokens are all that the
            caches will hold.
        mode: `per_token`; or `per_tensor`, one scale for all of k and one for all of v, hence only without `position`:
            `qattention` takes that scale over all keys there are, so each further token would change those of the
            tokens before it, whose float values are gone.
        quantize: `qmath.quantize_activation`, or a kernel that gives its bits.
    """
    rows, _, tokens, _ = k.shape
    for x, cache, cache_scale, is_value in ((k, k_cache, k_scale, False), (v, v_cache, v_scale, True)):
        codes, scale, _ = quantize(x, mode, clip)
        if is_value:
            scale = value_scale(codes, scale)
        if position is None:
            cache[:rows, :, :tokens] = codes
            cache_scale[:rows, :, :tokens] = scale
        else:
            row = torch.arange(rows, device=x.device).unsqueeze(1)
            at = position.long().unsqueeze(1) + torch.arange(tokens, device=x.device)
            cache[row, :, at] = codes.transpose(1, 2)  # [rows, tokens, heads, ...] by the two indices
            cache_scale[row, :, at] = scale.transpose(1, 2)


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
        source: int32 [rows], the cache that a row reads (beams of one source share one); or [rows, capacity], the cache
            in which its key of each position lies (beams that were reordered: a beam's past is spread over the caches
            that its ancestors wrote; behind `lengths` it may hold anything); or None: its own.
        bias: float, broadcastable to [rows, heads, queries, capacity], or None.
        causal: query i of `queries` sees keys up to `lengths - queries + i`; else each sees all `lengths` keys.
        mode: of Q; `per_tensor` takes one scale over all rows.

    Returns:
        [rows, heads, queries, head_dim] in q's dtype. A query that sees no key gets zeros.
    """
    queries, capacity = q.shape[2], k_cache.shape[2]
    q8, q_scale, _ = qmath.quantize_activation(q.float() * softmax_scale, mode, clip)
    if source is not None and source.dim() == 2:
        positions = torch.arange(capacity, device=q.device)
        cache = torch.where(positions < lengths.unsqueeze(1), source, 0).long()
        # [rows, capacity, heads, ...] by the two indices, heads back in front of the keys
        k_cache, k_scale, v_cache, v_scale = (
            t[cache, :, positions].transpose(1, 2) for t in (k_cache, k_scale, v_cache, v_scale)
        )
    elif source is not None:
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
    if k8.shape[2] == 0 or q8.numel() == 0:
        return torch.zeros(q8.shape, dtype=dtype, device=q8.device)
    _, _, e, c, v_max = _shares(q8, q_scale, k8, k_scale, v_scale, visible, bias)
    # Up to 127 * 127 * keys: an exact int32, and in fp32 too where that is below 2^24.
    if v8.shape[2] * qmath.ACT_MAX**2 <= 1 << 24:
        total = c @ v8.float()
    else:
        total = (c.double() @ v8.double()).float()
    weight = e.sum(dim=-1, keepdim=True)
    out = (v_max * total).div_(torch.where(weight == 0, 1.0, weight))
    return out.to(dtype)


def _visible(queries: int, keys: int, causal: bool, mask: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """bool, broadcasts to [batch, heads, queries, keys]: the mask, and keys up to `keys - queries + i` for query i."""
    visible = torch.ones(queries, keys, dtype=torch.bool, device=device)
    if causal:
        visible = visible.tril(keys - queries)
    return visible if mask is None else visible & mask


def _shares(
    q8: torch.Tensor,
    q_scale: torch.Tensor,
    k8: torch.Tensor,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
    visible: torch.Tensor,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """visible, share = exp(s - m), e, c [batch, heads, queries, keys] and v_max [batch, heads, queries, 1]; fp32."""
    shape = (*q8.shape[:3], k8.shape[2])
    # head_dim * 127 * 127 < 2^24 for head_dim <= 1040: fp32 products of codes are exact integers.
    score = q8.float() @ k8.float().transpose(-1, -2)  # in place from here on: these tensors are the largest there are
    score.mul_(q_scale.unsqueeze(-1)).mul_(k_scale.unsqueeze(-2))
    if bias is not None:
        score.add_(bias.float())
    visible = visible.expand(shape)
    hidden = ~visible
    score.masked_fill_(hidden, float("-inf"))
    top = score.amax(dim=-1, keepdim=True)
    share = score.sub_(torch.where(top == float("-inf"), 0.0, top)).exp_()
    v_max = torch.where(visible, v_scale.unsqueeze(-2), 0.0).amax(dim=-1, keepdim=True)
    # One quotient per query; the clamp takes back the ulp by which the product may exceed 1.
    ratio = (v_scale.unsqueeze(-2) * qmath.divide(1.0, torch.where(v_max > 0, v_max, 1.0))).clamp_(max=1.0)
    scaled = qmath.ACT_MAX * share
    e = qmath.round_half_even(scaled)
    c = scaled.mul_(ratio.masked_fill_(hidden, 0.0)).round_()
    return visible, share, e, c, v_max


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
    compute_dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The gradients of `qattention`, straight through its quantizers (design section 3, "Attention, backward").

    With `q^ = q8 qs`, `k^ = k8 ks`, `v^ = v8 vs`, `p = softmax(q^ . k^ + bias)` over the visible keys, not rounded, and
    the share that the forward pass gave to v^, `P^_j = c_j vs_max / (vs_j sum e)` (`e_j / sum e` for a zero row of V):
    `dV = P^' dO`, `dP = dO v^'`, `dS_j = p_j (dP_j - sum_i p_i dP_i)`, `dQ = softmax_scale dS k^`, `dK = dS' q^`,
    `d(bias) = dS` summed to the bias's shape; `'` transposes.

    Args:
        grad: [batch, heads, queries, head_dim], of the output; fp32, fp16 or bf16.
        q8, q_scale: the forward's codes int8 [batch, heads, queries, head_dim] and scales fp32 [batch, heads, queries]
            of q times `softmax_scale`; k8, k_scale, v8, v_scale: those of k and v, with [keys] in place of [queries].
            v_scale is what `value_scale` makes of V's.
        mask, bias, causal: the forward's.
        q_passed, k_passed, v_passed: uint8 [batch * heads * tokens, ceil(head_dim / 8)], `pack_bits` of where the clip
            let the value through, or None without a clip.
        want_bias: whether the gradient of the bias is asked for.
        out_dtype: of the first three results.
        compute_dtype: fp32, or fp64 to look at rounding; the codes e and c stay the forward's.

    Returns:
        dQ, dK, dV in the shapes of q8, k8, v8, and d(bias) in fp32 and the shape of bias, or None.
    """
    queries, keys = q8.shape[2], k8.shape[2]
    if keys == 0 or q8.numel() == 0:
        zeros = [torch.zeros(x.shape, dtype=out_dtype, device=q8.device) for x in (q8, k8, v8)]
        return *zeros, torch.zeros(bias.shape, dtype=torch.float32, device=q8.device) if want_bias else None
    visible = _visible(queries, keys, causal, mask, q8.device)
    visible, share, e, c, v_max = _shares(q8, q_scale, k8, k_scale, v_scale, visible, bias)
    q_codes, k_codes, v_codes = (x.to(compute_dtype) for x in (q8, k8, v8))
    q_scale, k_scale, v_scale = (x.to(compute_dtype) for x in (q_scale, k_scale, v_scale))
    q_scale, k_scale, v_scale = q_scale.unsqueeze(-1), k_scale.unsqueeze(-2), v_scale.unsqueeze(-2)
    if compute_dtype != torch.float32:
        score = (q_codes @ k_codes.transpose(-1, -2)) * q_scale * k_scale
        score = (score if bias is None else score + bias.to(compute_dtype)).masked_fill(~visible, float("-inf"))
        top = score.amax(dim=-1, keepdim=True)
        share = torch.exp(score - torch.where(top == float("-inf"), 0.0, top))
    # What a hidden key holds is never looked at: its scale may be NaN, and 0 * NaN would reach other keys' sums.
    total = share.sum(dim=-1, keepdim=True)
    p = torch.where(visible, share / torch.where(total == 0, 1.0, total), 0.0)
    weight = e.sum(dim=-1, keepdim=True)
    weight = torch.where(weight == 0, 1.0, weight).to(compute_dtype)
    is_zero = v_scale == 0
    of_v = torch.where(is_zero, e, c * v_max.to(compute_dtype) / torch.where(is_zero, 1.0, v_scale)) / weight
    of_v = torch.where(visible, torch.where(v_max.isfinite(), of_v, float("nan")), 0.0)

    grad = grad.to(compute_dtype)
    grad_p = torch.where(visible, (grad @ v_codes.transpose(-1, -2)) * v_scale, 0.0)
    grad_s = p * (grad_p - (p * grad_p).sum(dim=-1, keepdim=True))
    grad_s = torch.where(visible, grad_s, 0.0)
    grads = [
        torch.where(visible, grad_s * k_scale, 0.0) @ k_codes * softmax_scale,
        torch.where(visible, grad_s * q_scale, 0.0).transpose(-1, -2) @ q_codes,
        of_v.transpose(-1, -2) @ grad,
    ]
    for i, passed in enumerate((q_passed, k_passed, v_passed)):
        if passed is not None:
            keep = packing.unpack_bits(passed, q8.shape[3]).reshape(grads[i].shape)
            grads[i] = torch.where(keep, grads[i], 0.0)
    grad_bias = grad_s.sum_to_size(bias.shape) if want_bias else None
    return *(g.to(out_dtype) for g in grads), grad_bias
