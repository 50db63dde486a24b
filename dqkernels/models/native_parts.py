"""What a native layer or step asks of a linear or a norm: where it runs, what it reads, how it is written down."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from dqkernels import backends, checks
from dqkernels.kernels import cpu_gemm
from dqkernels.nn import QLinear

#: Parameters of a packed linear, and of a norm.
_OF_LINEARS, _OF_NORMS = {"qweight", "group_mult", "bias"}, {"weight", "bias"}


def elsewhere(linear: nn.Module, label: str, normed: bool, **facts: Any) -> Iterator[str]:
    """Which of this linear's steps another backend runs. facts: more of those that the GEMM's is chosen by."""
    layer, where = linear.layer, ("cpu", linear.backend, linear.strict)
    found = [("qgemm", {"bits": layer.bits, "group_size": layer.group_size, **facts})]
    found += [("layernorm_quantize", {"mode": layer.act_granularity})] if normed else []
    for op, facts in found:
        chosen = backends.choose(op, *where, **facts).backend
        if chosen != "cpu":
            yield f"{op} of {label} runs on {chosen}"


def unreadable(modules: tuple[nn.Module, ...], label: str) -> Iterator[str]:
    """Which tensors would be copied to be read: the core keeps addresses, and a copy knows no change of its source."""
    for module in modules:
        for tensor in tensors(module):
            if tensor.device.type != "cpu":
                yield f"{label} hold a tensor on {tensor.device}"
            elif not tensor.is_contiguous() or tensor.dtype == torch.float64:
                yield f"{label} hold a {tensor.dtype} tensor of strides {list(tensor.stride())}"


def tensors(module: nn.Module) -> list[torch.Tensor]:
    """What a linear, or a norm, is computed with, as it is."""
    own, buffers = module._parameters, module._buffers
    # As they were made, and not by name, which goes through a lookup of nn.Module's for each. What was put in the place
    # of a parameter since, a tensor in an attribute, has to be asked for.
    if (type(module) is QLinear and _OF_LINEARS <= own.keys() and "weight_scale" in buffers) or (
        type(module) is nn.LayerNorm and own.keys() == _OF_NORMS
    ):
        given = (*own.values(), *buffers.values())
        return [tensor for tensor in given if tensor is not None and tensor.numel()]
    given = (module.weight, module.bias) if isinstance(module, nn.LayerNorm) else (*module.packed(), module.bias)
    scale = getattr(module, "act_scale", None)
    return [tensor for tensor in (*given, scale) if tensor is not None and tensor.numel()]


def linear_state(linear: nn.Module) -> tuple[Any, ...]:
    """What a call of this linear was written down for."""
    # A static scale is a number of the call that was written down: its value counts. NaN, which is refused, too.
    scale = getattr(linear, "act_scale", None)
    value = None if scale is None else scale.tolist()
    return linear.layer, linear.backend, linear.strict, repr(value), *map(place, tensors(linear))


def place(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Where a tensor lies, and as what."""
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def part_of(linear: nn.Module, residual: torch.Tensor | None) -> cpu_gemm.Part:
    """Its tensors, as the GEMM takes them."""
    qweight, scale, mult = linear.packed()
    return cpu_gemm.part(qweight, scale, checks.given(mult), linear.bias, residual, linear.out_features)


def checked(linear: nn.Module, x: torch.Tensor, activation: str, residual: torch.Tensor | None) -> cpu_gemm.Part:
    """`part_of`, after the checks of `ops.qlinear`: what is written down is never checked again."""
    layer, size = linear.layer, linear.out_features
    mode, clip, scale = input_of(linear)
    checks.check_activation(x, mode, scale, clip)
    qweight, weight_scale, mult = linear.packed()
    given = (qweight, weight_scale, checks.given(mult), linear.bias)
    checks.check_gemm(x.shape[-1], *given, layer.bits, layer.group_size, size, activation, x.dtype)
    checks.check_residual(residual, (*x.shape[:-1], size))
    return cpu_gemm.part(*given, residual, size)


def input_of(linear: nn.Module) -> tuple[str, float | None, torch.Tensor | None]:
    """How it quantizes its input: mode, clip, static scale."""
    return linear.layer.act_granularity, linear.layer.act_clip, getattr(linear, "act_scale", None)


def format_of(linear: nn.Module) -> dict[str, Any]:
    """The format of its weights, as the GEMM takes it."""
    layer = linear.layer
    return {"bits": layer.bits, "four_level": layer.four_level, "group_size": layer.group_size}
