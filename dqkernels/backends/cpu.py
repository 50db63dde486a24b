"""The compiled C++ core (`_C`) for CPU tensors."""

from __future__ import annotations

import torch

from dqkernels import qmath, reference
from dqkernels.config import LayerConfig
from dqkernels.kernels import cpu_attention, native


def available(device_type: str) -> tuple[bool, str]:
    """True for CPU tensors when the compiled core loads."""
    if device_type != "cpu":
        return False, f"takes cpu tensors, not {device_type}"
    if native.native() is None:
        return False, native.why_absent()
    return True, f"compiled core, {native.native().cpu_isa()}"


def supports(op: str, **facts) -> str | None:
    """The ops defined here take every option of the op table."""
    return None


def quantize_activation(
    x: torch.Tensor, mode: str, clip: float | None = None, act_scale: torch.Tensor | None = None, want_sum: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `qmath.quantize_activation`; the same bits."""
    return native.quantize_rows(x, mode, clip, act_scale, want_sum)


def layernorm_quantize(x, residual, weight, bias, *, eps, mode, clip, act_scale, want_sum):
    """See `reference.layernorm_quantize`: the norm by torch, its codes by the core."""
    y = reference.layernorm(x, residual, weight, bias, eps)
    return y, *native.quantize_rows(y, mode, clip, act_scale, want_sum)


def gelu_quantize(x, *, mode, clip, act_scale, want_sum):
    """See `reference.gelu_quantize`: GELU by torch, its codes by the core."""
    return native.quantize_rows(reference.gelu(x), mode, clip, act_scale, want_sum)


def quantize_weight(weight: torch.Tensor, layer: LayerConfig) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes by `qmath`, packed by the core."""
    quantized = qmath.quantize_weight(weight, layer)
    return native.pack(quantized.codes, layer.bits), quantized.scale, quantized.group_mult


def dequantize_weight(qweight, weight_scale, group_mult, *, bits, four_level, group_size, out_features, in_features):
    """Codes unpacked by the core, floats by `qmath`: fp32 [out_features, in_features]."""
    codes = native.unpack(qweight, out_features, in_features, bits)
    return qmath.dequantize_codes(codes, weight_scale, group_mult, four_level, group_size)


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
