"""The backward pass on a CPU: weights become floats in the core, and torch's own library multiplies them.

A product of floats is no work of ours there: torch's BLAS does it, on the threads that the core shares with it. What is
left is to read the packed weight once, and attention piece by piece: scores of whole sequences are computed again here,
and only those of a few heads are there at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dqkernels import packing, reference

from .cpu_gemm import embedding

#: Scores of one piece of attention, fp32: what the steps behind each other find in a cache.
PIECE = 1 << 19


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
    """fp32 [out_features, in_features], the bits of `reference.dequantize`: every row of the table, gathered."""
    packing.check_packed(qweight, out_features, in_features, bits)
    return embedding(
        torch.arange(out_features, dtype=torch.int32),
        qweight,
        weight_scale,
        group_mult,
        None,
        bits=bits,
        four_level=four_level,
        group_size=group_size,
        embedding_dim=in_features,
        embed_scale=1.0,
        out_dtype=torch.float32,
    )


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
    """See `reference.grad_input`; the same bits."""
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
        grad_x.masked_fill_(~packing.unpack_bits(passed, in_features), 0.0)
    return grad_x.to(out_dtype)


def grad_weight(grad: torch.Tensor, q: torch.Tensor, act_scale: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """See `reference.grad_weight`; the same bits."""
    return (grad.float().t() @ (q * act_scale.unsqueeze(1))).to(out_dtype)


def _pieces(batch: int, heads: int, scores: int) -> Iterator[tuple[slice, slice]]:
    """Batches and heads of pieces of at most PIECE scores, or of one head of one batch."""
    fit = max(1, PIECE // max(1, scores))
    if fit >= heads:
        step = fit // heads
        yield from ((slice(b, b + step), slice(None)) for b in range(0, batch, step))
    else:
        yield from ((slice(b, b + 1), slice(h, h + fit)) for b in range(batch) for h in range(0, heads, fit))


def _part(x: torch.Tensor | None, where: tuple[slice, slice]) -> torch.Tensor | None:
    """A piece of what has, or broadcasts to, [batch, heads, ...]."""
    if x is None:
        return None
    x = x[(None,) * (4 - x.dim())]
    return x[tuple(part if size > 1 else slice(None) for part, size in zip(where, x.shape, strict=False))]


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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """See `reference.qattention_backward`, which it calls for a few heads at a time.

    The pieces depend on the shape alone, so runs repeat; d(bias) is their sum in order.
    """
    codes = q8, k8, v8
    grads = [torch.empty(x.shape, dtype=out_dtype) for x in codes]
    grad_bias = torch.zeros(bias.shape, dtype=torch.float32) if want_bias else None
    passed = [
        None if bits is None else bits.view(*x.shape[:3], -1)
        for bits, x in zip((q_passed, k_passed, v_passed), codes, strict=True)
    ]
    operands = grad, q8, q_scale, k8, k_scale, v8, v_scale
    for where in _pieces(*q8.shape[:2], q8.shape[2] * k8.shape[2]):
        bits = [None if x is None else x[where].reshape(-1, x.shape[-1]) for x in passed]
        piece_bias = _part(bias, where)
        *found, found_bias = reference.qattention_backward(
            *(x[where] for x in operands),
            _part(mask, where),
            piece_bias,
            *bits,
            causal=causal,
            softmax_scale=softmax_scale,
            want_bias=want_bias,
            out_dtype=out_dtype,
        )
        for whole, piece in zip(grads, found, strict=True):
            whole[where] = piece
        if want_bias:
            _part(grad_bias, where).add_(found_bias)
    return *grads, grad_bias
