"""The compiled CUDA kernels (`_C`) for CUDA tensors."""

from __future__ import annotations

import torch

from dqkernels.kernels import native


def available(device_type: str) -> tuple[bool, str]:
    """True for CUDA tensors when the core was built with CUDA."""
    if device_type != "cuda":
        return False, f"takes cuda tensors, not {device_type}"
    core = native.native()
    if core is None:
        return False, native.why_absent()
    if not hasattr(core, "cuda_quantize_rows"):
        return False, f"the compiled core has {native.why_no_cuda(native.build_info())}"
    if not torch.cuda.is_available():
        return False, "no CUDA device"
    return True, "compiled CUDA kernels"


def supports(op: str, **facts) -> str | None:
    """The ops defined here take every option of the op table."""
    return None


def quantize_activation(
    x: torch.Tensor, mode: str, clip: float | None = None, act_scale: torch.Tensor | None = None, want_sum: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `qmath.quantize_activation`; the same bits."""
    return native.cuda_quantize_rows(x, mode, clip, act_scale, want_sum)
