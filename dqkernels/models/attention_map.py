"""The attention maps of int8 attention: what `output_attentions=True` gives, and what a loss on maps trains."""

from __future__ import annotations

import torch

from dqkernels import ops


def attention_map(
    q: torch.Tensor,
    k: torch.Tensor,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    causal: bool,
    softmax_scale: float,
    mode: str,
    clip: float | None,
    backend: str = "auto",
    strict: bool = False,
) -> torch.Tensor:
    """The probabilities of `ops.qattention` before they are rounded: `p = softmax(q^ . k^ + bias)` over visible keys.

    q^ and k^ are the dequantized codes, those of the op. The gradient goes straight through the quantizers as that of
    the op does (design, "Attention, backward"): `dS_j = p_j (dp_j - sum_i p_i dp_i)`, `dQ = softmax_scale dS k^`,
    `dK = dS' q^`, zero where the clip stopped the value.

    Args:
        q: [batch, heads, queries, head_dim]; k: [batch, heads, keys, head_dim]; fp32, fp16 or bf16.
        mask, bias, causal, softmax_scale, mode, clip, backend, strict: as of `ops.qattention`.

    Returns:
        fp32 [batch, heads, queries, keys], whatever autocast says; rows add up to 1, or are zero where a query sees
        no key.
    """
    return _Map.apply(q, k, mask, bias, causal, softmax_scale, (mode, clip, False, None, backend, strict))


class _Map(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, mask, bias, causal, softmax_scale, how):
        clip = how[1]
        with _full_precision(q):
            scaled = q.to(torch.float32) * softmax_scale
            (q8, q_scale), (k8, k_scale) = (ops.quantize_activation(x, *how)[:2] for x in (scaled, k))
            queries, keys = q.shape[2], k.shape[2]
            visible = torch.ones(queries, keys, dtype=torch.bool, device=q.device)
            visible = visible.tril(keys - queries) if causal else visible
            visible = visible if mask is None else visible & mask
            # Products of codes first: they are exact in fp32, and so is a TF32 product of them.
            score = (q8.float() @ k8.float().transpose(-1, -2)) * q_scale.unsqueeze(-1) * k_scale.unsqueeze(-2)
            score = score if bias is None else score + bias.float()
            score = score.masked_fill(~visible, float("-inf"))
            top = score.amax(dim=-1, keepdim=True) if keys else score.new_zeros(*score.shape[:3], 1)
            share = torch.exp(score - torch.where(top == float("-inf"), 0.0, top))
            total = share.sum(dim=-1, keepdim=True)
            # A row without visible keys is zero, and a hidden key's NaN reaches nobody.
            p = torch.where(visible, share / torch.where(total == 0, 1.0, total), 0.0)
        passed = (None, None) if clip is None else (scaled.abs() < clip, k.abs() < clip)
        ctx.save_for_backward(q8, q_scale, k8, k_scale, p, *passed)
        ctx.dtypes, ctx.softmax_scale = (q.dtype, k.dtype), softmax_scale
        ctx.bias = None if bias is None else (bias.shape, bias.dtype)
        return p

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        q8, q_scale, k8, k_scale, p, *passed = ctx.saved_tensors
        with _full_precision(grad):
            seen = p != 0  # true for a NaN; elsewhere the products are zero anyway, but for 0 * NaN
            weighted = torch.where(seen, p * grad, 0.0)
            grad_s = torch.where(seen, weighted - p * weighted.sum(dim=-1, keepdim=True), 0.0)
            grads = [
                torch.where(seen, grad_s * k_scale.unsqueeze(-2), 0.0) @ k8.float() * ctx.softmax_scale,
                torch.where(seen, grad_s * q_scale.unsqueeze(-1), 0.0).transpose(-1, -2) @ q8.float(),
            ]
            grads = [g if keep is None else torch.where(keep, g, 0.0) for g, keep in zip(grads, passed, strict=True)]
        grad_bias = None
        if ctx.bias is not None and ctx.needs_input_grad[3]:
            shape, dtype = ctx.bias
            grad_bias = grad_s.sum_to_size(shape).to(dtype)
        grads = [g.to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True)]
        return *grads, None, grad_bias, None, None, None


def _full_precision(x: torch.Tensor) -> torch.autocast:
    """Under autocast a product of fp32 would come back rounded to 16 bits."""
    return torch.autocast(x.device.type, enabled=False)
