"""Plain torch on any device: exact, complete, and the specification's twin. Slow by design."""

from __future__ import annotations

import torch

from dqkernels import packing, qmath, reference
from dqkernels.config import LayerConfig

dequantize_weight = reference.dequantize
layernorm_quantize = reference.layernorm_quantize
gelu_quantize = reference.gelu_quantize
qattention = reference.qattention
qattention_decode = reference.qattention_decode
qembedding = reference.qembedding
quantize_activation = qmath.quantize_activation
qgemm = reference.qgemm
grad_input = reference.grad_input
grad_weight = reference.grad_weight
qattention_backward = reference.qattention_backward
quantize_into_cache = reference.quantize_into_cache


def available(device_type: str) -> tuple[bool, str]:
    """Always there."""
    return True, "plain torch"


def supports(op: str, **facts) -> str | None:
    """Everything."""
    return None


def quantize_weight(weight: torch.Tensor, layer: LayerConfig) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Float [N, K] -> packed codes, scale fp32 [N] or [1], group multipliers uint8 [N, G] or None."""
    quantized = qmath.quantize_weight(weight, layer)
    return packing.pack(quantized.codes, layer.bits), quantized.scale, quantized.group_mult


def quantize_by_step(
    weight: torch.Tensor, step: torch.Tensor, bits: int, quantizer: str, clip: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Float [N, K] by given steps [N] or [1] -> packed codes, scale."""
    quantized = qmath.quantize_by_step(weight, step, bits, quantizer, clip)
    return packing.pack(quantized.codes, bits), quantized.scale
