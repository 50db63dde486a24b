"""The compiled C++ core (`_C`) for CPU tensors."""

from __future__ import annotations

import torch

from dqkernels import qmath
from dqkernels.config import LayerConfig
from dqkernels.kernels import cpu_attention, cpu_backward, cpu_gemm, cpu_norm, native


def available(device_type: str) -> tuple[bool, str]:
    """True for CPU tensors when the compiled core loads."""
    if device_type != "cpu":
        return False, f"takes cpu tensors, not {device_type}"
    if native.native() is None:
        return False, native.why_absent()
    core = native.native()
    isa, kernel = core.cpu_isa(), core.cpu_gemm_kernel()
    return True, f"compiled core, {isa}" + ("" if kernel == isa else f" (its GEMM: {kernel})")


_GROUP_SIZES = (-1, 32, 64, 128)


def supports(op: str, *, bits: int = 8, group_size: int = -1, norm: bool | None = None, **facts) -> str | None:
    """Everything that the formats have; a LayerNorm before a GEMM is a step of its own."""
    if op == "qlinear_multi" and norm is not None:
        return "has no LayerNorm inside its GEMM"
    if group_size not in _GROUP_SIZES or (group_size != -1 and bits == 8):
        return f"has no {op} with group_size={group_size} at {bits} bits, only -1, and 32, 64 or 128 at 2 and 4 bits"
    return None


def qgemm(
    q,
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
    """See `reference.qgemm`; the same bits but for GELU. Needs no row sums."""
    return cpu_gemm.gemm(
        q,
        [cpu_gemm.part(qweight, weight_scale, group_mult, bias, residual, out_features)],
        bits=bits,
        four_level=four_level,
        group_size=group_size,
        activation=activation,
        out_dtype=out_dtype,
        act_scale=act_scale,
    )[0]


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
    """Quantizes x [..., K], then `qgemm` -> [..., out_features], in one call of the core."""
    return cpu_gemm.gemm(
        x,
        [cpu_gemm.part(qweight, weight_scale, group_mult, bias, residual, out_features)],
        bits=bits,
        four_level=four_level,
        group_size=group_size,
        activation=activation,
        out_dtype=out_dtype,
        act_scale=act_scale,
        mode=act_mode,
        clip=act_clip,
    )[0]


def qlinear_multi(
    x, norm, parts, *, bits, four_level, group_size, act_mode, act_clip, act_scale, activation, out_dtype
):
    """`qlinear` of each (qweight, weight_scale, group_mult, bias, out_features) on one x [..., K], quantized once. norm
    is None."""
    return cpu_gemm.gemm(
        x,
        [cpu_gemm.part(*part[:4], None, part[4]) for part in parts],
        bits=bits,
        four_level=four_level,
        group_size=group_size,
        activation=activation,
        out_dtype=out_dtype,
        act_scale=act_scale,
        mode=act_mode,
        clip=act_clip,
    )


def qembedding(ids, qweight, weight_scale, group_mult, position, **facts):
    """See `reference.qembedding`; the same bits."""
    return cpu_gemm.embedding(ids, qweight, weight_scale, group_mult, position, **facts)


def quantize_activation(
    x: torch.Tensor, mode: str, clip: float | None = None, act_scale: torch.Tensor | None = None, want_sum: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `qmath.quantize_activation`; the same bits."""
    return native.quantize_rows(x, mode, clip, act_scale, want_sum)


def layernorm_quantize(x, residual, weight, bias, *, eps, mode, clip, act_scale, want_sum):
    """See `reference.layernorm_quantize`; codes exact given y, y within the contract's bound."""
    return cpu_norm.layernorm_quantize(x, residual, weight, bias, eps, mode, clip, act_scale, want_sum)


def gelu_quantize(x, *, mode, clip, act_scale, want_sum):
    """See `reference.gelu_quantize`; GELU within the contract's bound, its codes exact."""
    return cpu_norm.gelu_quantize(x, mode, clip, act_scale, want_sum)


def quantize_weight(weight: torch.Tensor, layer: LayerConfig) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes by `qmath`, packed by the core."""
    quantized = qmath.quantize_weight(weight, layer)
    return native.pack(quantized.codes, layer.bits), quantized.scale, quantized.group_mult


def dequantize_weight(qweight, weight_scale, group_mult, **facts):
    """See `reference.dequantize`; the same bits."""
    return cpu_backward.dequantize(qweight, weight_scale, group_mult, **facts)


def quantize_by_step(
    weight: torch.Tensor, step: torch.Tensor, bits: int, quantizer: str, clip: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes by `qmath`, packed by the core."""
    quantized = qmath.quantize_by_step(weight, step, bits, quantizer, clip)
    return native.pack(quantized.codes, bits), quantized.scale


def qattention(q, k, v, mask, bias, *, causal, softmax_scale, mode, clip):
    """See `reference.qattention`; bits differ from it only where `exp` moves a code."""
    return cpu_attention.qattention(q, k, v, mask, bias, causal, softmax_scale, mode, clip)


def qattention_decode(
    q, k_cache, k_scale, v_cache, v_scale, lengths, source, bias, *, causal, softmax_scale, mode, clip
):
    """See `reference.qattention_decode`; the bits of `qattention` over the same keys."""
    return cpu_attention.qattention_decode(
        q, k_cache, k_scale, v_cache, v_scale, lengths, source, bias, causal, softmax_scale, mode, clip
    )


def quantize_into_cache(k, v, k_cache, k_scale, v_cache, v_scale, position, *, mode, clip):
    """See `reference.quantize_into_cache`; the same bits."""
    cpu_attention.quantize_into_cache(k, v, k_cache, k_scale, v_cache, v_scale, position, mode, clip)


def grad_input(grad, qweight, weight_scale, group_mult, passed, **facts):
    """See `reference.grad_input`: the core's floats, torch's product."""
    return cpu_backward.grad_input(grad, qweight, weight_scale, group_mult, passed, **facts)


def grad_weight(grad, q, act_scale, out_dtype):
    """See `reference.grad_weight`: torch's product."""
    return cpu_backward.grad_weight(grad, q, act_scale, out_dtype)


def qattention_backward(grad, q8, q_scale, k8, k_scale, v8, v_scale, mask, bias, q_passed, k_passed, v_passed, **facts):
    """See `reference.qattention_backward`, computed a few heads at a time."""
    return cpu_backward.qattention_backward(
        grad, q8, q_scale, k8, k_scale, v8, v_scale, mask, bias, q_passed, k_passed, v_passed, **facts
    )
