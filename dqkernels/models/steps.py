"""Steps of a transformer block on packed linears: a norm, projections of one input, a projection onto a residual.

A step that cannot be one launch is made of calls of the modules it consists of, so that hooks and float layers work.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from dqkernels import fused, ops

#: Activation modules of transformers (by class name) -> epilogues. Its GELU is the erf form.
_EPILOGUES = {"GELUActivation": "gelu", "ReLU": "relu"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def hooked(module: nn.Module) -> bool:
    """Whether somebody watches calls of this module."""
    return any(getattr(module, name) for name in _HOOKS)


def fusable(x: torch.Tensor, norm: nn.Module | None = None) -> bool:
    """Whether fused steps may run on `x`: they have no gradients, and autocast wants a type of its own for norms."""
    if torch.is_autocast_enabled(x.device.type):
        return False
    if not torch.is_grad_enabled():
        return True
    return not (x.requires_grad or (norm is not None and any(p.requires_grad for p in norm.parameters())))


def project(
    x: torch.Tensor, linears: Sequence[nn.Module], norm: nn.Module | None = None, activation: nn.Module | None = None
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Several linears on one input, quantized once.

    Args:
        x: [..., K].
        linears: up to three, of K in_features each.
        norm: LayerNorm of x before them, or None.
        activation: module behind each of them, or None.

    Returns:
        norm(x) in x's dtype (x itself without a norm), and one [..., N] per linear.
    """
    if norm is not None and not _plain_norm(norm):
        x, norm = norm(x), None
    epilogue = "none" if activation is None or hooked(activation) else _EPILOGUES.get(type(activation).__name__)
    if not _alike(linears):
        normed = x if norm is None else norm(x)
        found = [linear(normed) for linear in linears]
        return normed, found if activation is None else [activation(each) for each in found]
    first, layer = linears[0], linears[0].layer
    lists = zip(*((*m.packed(), m.bias, m.out_features) for m in linears), strict=True)
    qweight, scale, mult, bias, sizes = (list(each) for each in lists)
    given = (None, None, 0.0) if norm is None else (norm.weight, norm.bias, norm.eps)
    found = fused.qlinear_multi(
        x, *given, qweight, scale, mult, bias, layer.bits, layer.four_level, layer.group_size, sizes,
        layer.act_granularity, layer.act_clip, _act_scale(first), epilogue or "none", x.dtype,
        first.backend, first.strict,
    )  # fmt: skip
    normed = x if norm is None else found.pop(0)
    if activation is not None and epilogue in (None, "none"):
        found = [activation(each) for each in found]
    return normed, found


def project_onto(x: torch.Tensor, linear: nn.Module, base: torch.Tensor | None) -> torch.Tensor:
    """`base + linear(x)`, the sum in the epilogue: one rounding. base: [..., N] or None for nothing."""
    if base is None or not packed(linear) or hooked(linear):
        out = linear(x)
        return out if base is None else base + out
    layer = linear.layer
    return ops.qlinear(
        x, *linear.packed(), linear.bias, base, layer.bits, layer.four_level, layer.group_size, linear.out_features,
        layer.act_granularity, layer.act_clip, _act_scale(linear), "none", x.dtype, linear.backend, linear.strict,
    )  # fmt: skip


def packed(linear: nn.Module) -> bool:
    """Whether this is a `QLinear`, or the layer of `train` that computes as one; not a subclass with its own ideas."""
    return type(linear).__name__ in ("QLinear", "QATLinear") and type(linear).__module__.startswith("dqkernels.")


def _act_scale(linear: nn.Module) -> torch.Tensor | None:
    return getattr(linear, "act_scale", None)


def _alike(linears: Sequence[nn.Module]) -> bool:
    """Whether these can share one launch: packed in one format, read one quantized input, run on one backend."""
    if not all(packed(linear) and not hooked(linear) for linear in linears):
        return False
    if len(linears) > 1 and _act_scale(linears[0]) is not None:
        return False  # static scales are measured, and stored, per linear
    facts = {
        (
            m.layer.bits, m.layer.four_level, m.layer.group_size, m.layer.act_granularity, m.layer.act_clip, m.backend,
            m.strict,
        )
        for m in linears
    }  # fmt: skip
    return len(facts) == 1


def _plain_norm(norm: nn.Module) -> bool:
    return type(norm) is nn.LayerNorm and norm.weight is not None and not hooked(norm)
