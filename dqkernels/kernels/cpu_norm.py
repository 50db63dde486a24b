"""Torch tensors in and out of the compiled core's LayerNorm and GELU on a CPU. No arithmetic here."""

from __future__ import annotations

import torch

from dqkernels.kernels import native
from dqkernels.kernels.cpu_step import Tape


def layernorm_quantize(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    mode: str,
    clip: float | None,
    act_scale: torch.Tensor | float | None,
    want_sum: bool,
    into: Tape | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, q, scale and row_sum; arguments and results as of `reference.layernorm_quantize`.

    into: write the call down there.

    Raises:
        ValueError: for operands that are not on the CPU, or what `native.quantize_rows` refuses.
        RuntimeError: where the core is absent.
    """
    core = native.require("norm_quantize")
    for name, tensor in (("x", x), ("residual", residual), ("weight", weight), ("bias", bias)):
        if tensor is not None:
            native.check_device(name, tensor, "cpu")
            if tensor.dtype not in native.DTYPES:
                raise ValueError(f"{name} must be one of {list(map(str, native.DTYPES))}, got {tensor.dtype}")
    rows, clip, out = native.quantize_arguments(x, mode, clip, act_scale, want_sum)
    count, k = rows.shape
    y = (torch if into is None else into).empty(x.shape, dtype=x.dtype)
    added = None if residual is None else native.adjacent_rows(residual)
    weight, bias = native.adjacent(weight), None if bias is None else native.adjacent(bias)
    core.norm_quantize(
        _rows(rows),
        None if added is None else _rows(added),
        (weight.data_ptr(), native.DTYPES[weight.dtype], 0),
        None if bias is None else (bias.data_ptr(), native.DTYPES[bias.dtype], 0),
        eps,
        y.data_ptr(),
        count,
        k,
        _codes(mode, clip, act_scale, out),
        torch.get_num_threads(),
        None if into is None else into.core,
    )
    if into is not None:
        into.keep(rows, added, weight, bias)
        into.keep(*out, own=True)
    return y, *out


def gelu_quantize(
    x: torch.Tensor, mode: str, clip: float | None, act_scale: torch.Tensor | float | None, want_sum: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, scale and row_sum; arguments and results as of `reference.gelu_quantize`.

    Raises:
        ValueError: for an x that is not on the CPU, or what `native.quantize_rows` refuses.
        RuntimeError: where the core is absent.
    """
    core = native.require("gelu_quantize")
    native.check_device("x", x, "cpu")
    rows, clip, out = native.quantize_arguments(x, mode, clip, act_scale, want_sum)
    core.gelu_quantize(_rows(rows), *rows.shape, _codes(mode, clip, act_scale, out), torch.get_num_threads())
    return out


def _rows(x: torch.Tensor) -> tuple[int, int, int]:
    return x.data_ptr(), native.DTYPES[x.dtype], x.stride(0)


def _codes(mode, clip, act_scale, out) -> tuple:
    static_scale = float(act_scale) if mode == "static" else 0.0
    return native.MODES[mode], clip, static_scale, *(t.data_ptr() for t in out)
