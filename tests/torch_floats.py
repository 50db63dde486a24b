"""The native core with torch's LayerNorm and GELU in it, for tests that compare bits with modules of torch.

A fused block norms and activates by the backend's own float ops, a module by torch's: the same numbers within the
contract's bound, but other last bits. With both by torch, what is left to compare is what fusing itself changes.
"""

from __future__ import annotations

import pytest
import torch

from dqkernels import backends, reference
from dqkernels.decode import native_step
from dqkernels.kernels import cpu_gemm, native
from dqkernels.models import blocks, native_layer


def put_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the end of the test; eager has them already."""
    core, gemm = backends._module("cpu"), cpu_gemm.gemm

    def layernorm_quantize(x, residual, weight, bias, *, eps, mode, clip, act_scale, want_sum):
        y = reference.layernorm(x, residual, weight, bias, eps)
        return y, *native.quantize_rows(y, mode, clip, act_scale, want_sum)

    def gemm_with_gelu(x, parts, *, activation, out_dtype, **facts):
        if activation != "gelu":
            return gemm(x, parts, activation=activation, out_dtype=out_dtype, **facts)
        bare = [one._replace(residual=None) for one in parts]
        found = gemm(x, bare, activation="none", out_dtype=torch.float32, **facts)
        found = [reference.activate(y, "gelu") for y in found]
        return [
            (y if one.residual is None else y + one.residual.float().reshape(y.shape)).to(out_dtype)
            for y, one in zip(found, parts, strict=True)
        ]

    monkeypatch.setattr(core, "layernorm_quantize", layernorm_quantize)
    monkeypatch.setattr(cpu_gemm, "gemm", gemm_with_gelu)
    monkeypatch.setattr(native_step, "why_not", lambda *_: "a test has put torch's float ops in")
    monkeypatch.setattr(native_layer, "run", lambda *_: None)
    monkeypatch.setattr(blocks, "describe_encoder", lambda _: "")
