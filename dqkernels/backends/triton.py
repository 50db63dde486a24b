"""Triton on a CUDA device, or on CPU tensors in Triton's interpreter (TRITON_INTERPRET=1). Exact."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys

import torch

_MIN_CAPABILITY = (8, 0)  # Turing's int8 dot does not compile
_MAX_HEAD_DIM = 128


def available(device_type: str) -> tuple[bool, str]:
    """Whether this backend can take tensors of `device_type` here, and why (not). Imports no Triton."""
    if sys.platform != "linux":
        return False, f"Triton ships for Linux only, not {sys.platform}"
    if importlib.util.find_spec("triton") is None:
        return False, "triton is not installed"
    if device_type not in ("cuda", "cpu"):
        return False, f"takes cuda tensors, not {device_type}"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return True, "Triton's interpreter (TRITON_INTERPRET=1)"
    if device_type == "cpu":
        return False, "takes cuda tensors, and cpu ones only in its interpreter (TRITON_INTERPRET=1)"
    if not torch.cuda.is_available():
        return False, "no CUDA device"
    if torch.version.hip is not None:
        return False, "tested on CUDA only, this torch is for ROCm"
    capability = torch.cuda.get_device_capability()
    if capability < _MIN_CAPABILITY:
        return False, f"needs compute capability 8.0 or newer, the device has {capability[0]}.{capability[1]}"
    return True, "Triton kernels"


_GROUP_SIZES = (-1, 32, 64, 128)


def supports(op: str, *, bits: int = 8, group_size: int = -1, head_dim: int = 1, **facts) -> str | None:
    """Everything but heads of more than 128."""
    if head_dim > _MAX_HEAD_DIM:
        return f"has no {op} of head_dim={head_dim}, only up to {_MAX_HEAD_DIM}"
    if group_size not in _GROUP_SIZES or (group_size != -1 and bits == 8):
        return f"has no {op} with group_size={group_size} at {bits} bits, only -1, and 32, 64 or 128 at 2 and 4 bits"
    return None


def quantize_activation(x, mode, clip=None, act_scale=None, want_sum=False):
    """x [..., K] -> int8 codes [..., K], fp32 scale [...], int32 row sums [...] (or [0])."""
    return _kernels()[0].quantize_activation(x, mode, clip, act_scale, want_sum)


def qgemm(
    xq,
    act_scale,
    row_sum,
    qweight,
    weight_scale,
    group_mult,
    bias,
    residual,
    *,
    bits,
    four_level,
    group_size,
    out_features,
    activation,
    out_dtype,
):
    """int8 xq [..., K] times packed weights, with the epilogue -> [..., out_features].

    Raises:
        ValueError: for a group_size that `supports` refuses, or without its group_mult.
    """
    lead, k = xq.shape[:-1], xq.shape[-1]
    rows = xq.reshape(-1, k).contiguous()
    want_sum = four_level and group_size == -1  # with groups the kernel has the sums in its dots
    if want_sum and (row_sum is None or row_sum.numel() != rows.shape[0]):
        row_sum = rows.sum(dim=1, dtype=torch.int32)
    y = _kernels()[1].qgemm(
        rows,
        act_scale.reshape(-1).contiguous(),
        row_sum.reshape(-1).contiguous() if want_sum else None,
        qweight.contiguous(),
        weight_scale.contiguous(),
        bits,
        four_level,
        out_features,
        None if bias is None else bias.contiguous(),
        activation,
        None if residual is None else residual.reshape(-1, out_features),
        out_dtype,
        group_mult=None if group_mult is None else group_mult.contiguous(),
        group_size=group_size,
    )
    return y.reshape(*lead, out_features)


def qlinear(
    x,
    qweight,
    weight_scale,
    group_mult,
    bias,
    residual,
    *,
    bits,
    four_level,
    group_size,
    out_features,
    act_mode,
    act_clip,
    act_scale,
    activation,
    out_dtype,
):
    """Quantizes x [..., K], then `qgemm` -> [..., out_features]."""
    quantize, gemm = _kernels()
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    xq, scale, row_sum = quantize.quantize_rows(rows, act_mode, act_clip, act_scale, four_level and group_size == -1)
    y = gemm.qgemm(
        xq,
        scale,
        row_sum,
        qweight.contiguous(),
        weight_scale.contiguous(),
        bits,
        four_level,
        out_features,
        None if bias is None else bias.contiguous(),
        activation,
        None if residual is None else residual.reshape(-1, out_features),
        out_dtype,
        group_mult=None if group_mult is None else group_mult.contiguous(),
        group_size=group_size,
    )
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], out_features)


def qattention(q, k, v, mask, bias, *, causal, softmax_scale, mode, clip):
    """Int8 attention [batch, heads, queries, head_dim] in q's dtype, as `reference.qattention`."""
    return _attention()[0].qattention(q, k, v, mask, bias, causal, softmax_scale, mode, clip)


def qattention_decode(
    q, k_cache, k_scale, v_cache, v_scale, lengths, source, bias, *, causal, softmax_scale, mode, clip
):
    """A few queries per row over an int8 cache, as `reference.qattention_decode`."""
    return _attention()[1].qattention_decode(
        q, k_cache, k_scale, v_cache, v_scale, lengths, source, bias, causal, softmax_scale, mode, clip
    )


def quantize_into_cache(k, v, k_cache, k_scale, v_cache, v_scale, position, *, mode, clip):
    """Codes and scales of new keys and values into their caches, as `reference.quantize_into_cache`."""
    from dqkernels.kernels import kv_cache

    kv_cache.quantize_into_cache(k, v, k_cache, k_scale, v_cache, v_scale, position, mode, clip)


def qattention_backward(grad, q8, q_scale, k8, k_scale, v8, v_scale, mask, bias, q_passed, k_passed, v_passed, **facts):
    """dQ, dK, dV and d(bias) or None, as `reference.qattention_backward`."""
    from dqkernels.kernels import attention_backward

    return attention_backward.qattention_backward(
        grad, q8, q_scale, k8, k_scale, v8, v_scale, mask, bias, q_passed, k_passed, v_passed, **facts
    )


@functools.cache
def _attention():
    from dqkernels.kernels import attention, attention_decode

    return attention, attention_decode


def grad_input(grad, qweight, weight_scale, group_mult, passed, **facts):
    """grad [M, N] times the dequantized weight, masked by `passed` -> [M, in_features]."""
    return _backward().grad_input(grad, qweight, weight_scale, group_mult, passed, **facts)


def grad_weight(grad, q, act_scale, out_dtype):
    """grad^T [N, M] times the dequantized activations -> [N, K]."""
    return _backward().grad_weight(grad, q, act_scale, out_dtype)


@functools.cache
def _backward():
    from dqkernels.kernels import backward

    return backward


def layernorm_quantize(x, residual, weight, bias, *, eps, mode, clip, act_scale, want_sum):
    """LayerNorm of x (+ residual) -> y [..., K] in x's dtype, then q, scale, row_sum of its quantization."""
    return _row_kernels()[0].layernorm_quantize(x, residual, weight, bias, eps, mode, clip, act_scale, want_sum)


def gelu_quantize(x, *, mode, clip, act_scale, want_sum):
    """GELU (erf form), rounded to x's dtype and quantized."""
    return _row_kernels()[0].gelu_quantize(x, mode, clip, act_scale, want_sum)


def qembedding(
    ids,
    qweight,
    weight_scale,
    group_mult,
    position,
    *,
    bits,
    four_level,
    group_size,
    embedding_dim,
    embed_scale,
    out_dtype,
):
    """Rows `ids` of the packed table, scaled, plus `position` -> [..., embedding_dim] in `out_dtype`."""
    return _row_kernels()[1].qembedding(
        ids,
        qweight,
        weight_scale,
        group_mult,
        position,
        bits,
        four_level,
        group_size,
        embedding_dim,
        embed_scale,
        out_dtype,
    )


def dequantize_weight(qweight, weight_scale, group_mult, *, bits, four_level, group_size, out_features, in_features):
    """The float matrix of packed weights -> fp32 [out_features, in_features]."""
    return _row_kernels()[1].dequantize_weight(
        qweight, weight_scale, group_mult, bits, four_level, group_size, out_features, in_features
    )


def quantize_weight(weight, layer):
    """Float [N, K] by the layer's rule -> packed codes, scale [N] or [1], group multipliers [N, G] or None."""
    return _row_kernels()[2].quantize_weight(weight, layer)


def quantize_by_step(weight, step, bits, quantizer, clip):
    """Float [N, K] by given steps [N] or [1] -> packed codes, scale."""
    from dqkernels.kernels import weight_step

    return weight_step.quantize_by_step(weight, step, bits, quantizer, clip)


@functools.cache
def _kernels():
    """The launchers; importing them imports Triton, so this waits for the first call."""
    from dqkernels.kernels import gemm, quantize

    return quantize, gemm


@functools.cache
def _row_kernels():
    from dqkernels.kernels import embedding, norm, weight

    return norm, embedding, weight
