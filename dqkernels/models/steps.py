"""Steps of a transformer block on packed linears: a norm, projections of one input, a projection onto a residual.

A step that cannot be one launch is made of calls of the modules it consists of, so that hooks, gradients and float
layers work. Each step decides for itself: what is frozen in one may be trained in the next.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from dqkernels import checks, fused, ops

#: Where transformers makes the hooks that capture outputs.
_CAPTURING = "transformers.utils.output_capturing"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def hooked(module: nn.Module) -> bool:
    """Whether calls of this module are watched or replaced: hooks, or a `forward` on the instance (as accelerate's).

    transformers leaves a hook on every attention once maps or hidden states were asked for: it counts when it captures.
    """
    own = module.__dict__  # nearly always four empty dictionaries, looked at for every module of every call
    if any(map(own.get, _HOOKS)) and any(_watches(hook) for name in _HOOKS for hook in own[name].values()):
        return True
    return "forward" in own or _has_any_global_hook()


def _watches(hook: Callable) -> bool:
    if getattr(hook, "__module__", None) != _CAPTURING:
        return True
    collector = getattr(sys.modules.get(_CAPTURING), "_active_collector", None)
    return collector is None or bool(collector.get())  # an empty one captures nothing


def under_autocast(x: torch.Tensor) -> bool:
    """Whether autocast chooses types for operations on `x`: it wants fp32 norms, and a type of its own for linears."""
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def project(
    x: torch.Tensor, linears: Sequence[nn.Module], norm: nn.Module | None = None, activation: nn.Module | None = None
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Several linears on one input, quantized once.

    Args:
        x: [..., K].
        linears: up to 64, of K in_features each; the CUDA kernel takes three in a launch.
        norm: LayerNorm of x before them, or None.
        activation: module behind each of them, or None.

    Returns:
        norm(x) in x's dtype (x itself without a norm), and one [..., N] per linear.
    """
    if norm is not None and not plain_norm(norm):
        x, norm = norm(x), None
    if apart(linears) is not None or under_autocast(x) or wants_gradient(x, norm, *linears):
        normed = x if norm is None else norm(x)
        found = [linear(normed) for linear in linears]
        return normed, found if activation is None else [activation(each) for each in found]
    first, layer = linears[0], linears[0].layer
    checks.check_width(x, first.in_features)
    lists = zip(*((*m.packed(), m.bias, m.out_features) for m in linears), strict=True)
    qweight, scale, mult, bias, sizes = (list(each) for each in lists)
    given = (None, None, 0.0) if norm is None else (norm.weight, norm.bias, norm.eps)
    inside = "none" if activation is None else epilogue(activation)
    found = fused.linears(
        x, *given, qweight, scale, mult, bias, layer.bits, layer.four_level, layer.group_size, sizes,
        layer.act_granularity, layer.act_clip, _act_scale(first), inside or "none", x.dtype,
        first.backend, first.strict,
    )  # fmt: skip
    normed, found = (x, found) if norm is None else (found[0], list(found[1:]))
    if inside is None:
        found = [activation(each) for each in found]
    return normed, found


def project_onto(x: torch.Tensor, linear: nn.Module, base: torch.Tensor | None) -> torch.Tensor:
    """`base + linear(x)`, the sum in the epilogue: one rounding. base: [..., N] or None for nothing."""
    if base is None or apart((linear,)) is not None or under_autocast(x) or wants_gradient(x, base, linear):
        out = linear(x)
        return out if base is None else base + out
    layer = linear.layer
    checks.check_width(x, linear.in_features)
    return ops.linear(
        x, *linear.packed(), linear.bias, base, layer.bits, layer.four_level, layer.group_size, linear.out_features,
        layer.act_granularity, layer.act_clip, _act_scale(linear), "none", x.dtype, linear.backend, linear.strict,
    )  # fmt: skip


def behind(x: torch.Tensor, norm: nn.Module, linear: nn.Module) -> torch.Tensor:
    """norm(x), by the kernel that norms before linears like `linear`, on a CPU: a decode step there has no other.

    x: [..., K].
    """
    if not plain_norm(norm) or not normed_by_kernel(x, norm, linear):
        return norm(x)
    return kernel_norm(x, norm, linear)


def kernel_norm(x: torch.Tensor, norm: nn.LayerNorm, linear: nn.Module) -> torch.Tensor:
    """norm(x) by the kernel of linears like `linear`, whose codes nobody wants here."""
    return ops.layernorm_quantize(x, None, norm.weight, norm.bias, norm.eps, "per_token", backend=linear.backend)[0]


def normed_by_kernel(x: torch.Tensor, norm: nn.Module, linear: nn.Module) -> bool:
    """Whether that kernel gives norm(x) beside linears like `linear`: on a CPU, for whoever wants no gradient."""
    watched = apart((linear,)) is not None or under_autocast(x) or wants_gradient(x, norm)
    return not watched and x.device.type == "cpu" and linear.backend in ("auto", "cpu")


def epilogue(activation: nn.Module) -> str | None:
    """The GEMM's epilogue that computes this module, or None. GELU of transformers is the erf form."""
    kind = type(activation)
    if hooked(activation):
        return None
    if kind is nn.ReLU:
        return "relu"
    known = kind.__module__ == "transformers.activations" and kind.__name__ == "GELUActivation"
    return "gelu" if known or (kind is nn.GELU and activation.approximate == "none") else None


def packed(linear: nn.Module) -> bool:
    """Whether this is a `QLinear`, or the layer of `train` that computes as one; not a subclass with its own ideas."""
    return type(linear).__name__ in ("QLinear", "QATLinear") and type(linear).__module__.startswith("dqkernels.")


def apart(linears: Sequence[nn.Module]) -> str | None:
    """Why these cannot share one launch, in words; None when they can."""
    for linear in linears:
        if not packed(linear):
            return "one is not packed"
        if hooked(linear):
            return "one is watched"
    if len(linears) > 1 and _act_scale(linears[0]) is not None:
        return "static scales are measured, and stored, per linear"
    formats = {(m.layer.bits, m.layer.four_level, m.layer.group_size) for m in linears}
    inputs = {(m.layer.act_granularity, m.layer.act_clip, m.backend, m.strict) for m in linears}
    if len(formats) > 1:
        return "they are packed in different formats"
    return None if len(inputs) == 1 else "they quantize their input in different ways"


def plain_norm(norm: nn.Module) -> bool:
    """Whether this is torch's LayerNorm with a weight, and nobody watches it."""
    return type(norm) is nn.LayerNorm and norm.weight is not None and not hooked(norm)


def _act_scale(linear: nn.Module) -> torch.Tensor | None:
    return getattr(linear, "act_scale", None)


def wants_gradient(*operands: torch.Tensor | nn.Module | None) -> bool:
    """Whether one of them takes part in a backward pass: fused steps have no gradients."""
    return torch.is_grad_enabled() and any(t.requires_grad for each in operands for t in _tensors(each))


def _tensors(operand: torch.Tensor | nn.Module | None) -> Iterable[torch.Tensor]:
    if isinstance(operand, nn.Module):
        return operand.parameters()
    return () if operand is None else (operand,)
