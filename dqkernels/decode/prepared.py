"""The steps of `models.steps` with their choices made once: what a decoder calls for every token.

`projection(linears, norm, activation)(x)` is `steps.project(x, linears, norm, activation)`, `onto(linear)(x, base)` is
`steps.project_onto(x, linear, base)`, bit for bit, as long as nobody changes the modules in between. No gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from dqkernels import fused, ops
from dqkernels.models import steps

Projection = Callable[[torch.Tensor], tuple[torch.Tensor, list[torch.Tensor]]]
Onto = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]


def lazily(make: Callable[[], Callable]) -> Callable:
    """A function that is made when it is first called: a native step calls few of those that a decoder has."""
    made: list[Callable] = []

    def call(*args):
        if not made:
            made.append(make())
        return made[0](*args)

    return call


def projection(
    linears: Sequence[nn.Module], norm: nn.Module | None = None, activation: nn.Module | None = None
) -> Projection:
    """x [..., K] -> norm(x) and one [..., N] per linear; arguments as `steps.project`."""
    if norm is not None and not steps.plain_norm(norm):
        inner = projection(linears, None, activation)
        return lambda x: inner(norm(x))
    if steps.apart(linears) is not None:
        return _of_modules(linears, norm, activation)
    first, layer = linears[0], linears[0].layer
    lists = zip(*((*m.packed(), m.bias, m.out_features) for m in linears), strict=True)
    weights = [list(each) for each in lists]
    qweight, scale, mult, bias, sizes = weights
    given = (None, None, 0.0) if norm is None else (norm.weight, norm.bias, norm.eps)
    inside = "none" if activation is None else steps.epilogue(activation)
    head = (*given, qweight, scale, mult, bias, layer.bits, layer.four_level, layer.group_size, sizes)
    how = (layer.act_granularity, layer.act_clip, getattr(first, "act_scale", None), inside or "none")
    where = (first.backend, first.strict)
    call = fused.qlinear_multi

    def run(x):
        found = call(x, *head, *how, x.dtype, *where)
        normed = x
        if norm is not None:
            normed, *found = found
        if inside is None:
            found = [activation(each) for each in found]
        return normed, found

    return run


def onto(linear: nn.Module) -> Onto:
    """x [..., K], base [..., N] or None -> base + linear(x); the sum in the epilogue where it can be."""
    if steps.apart((linear,)) is not None:

        def apart(x, base):
            out = linear(x)
            return out if base is None else base + out

        return apart
    layer = linear.layer
    weight = (*linear.packed(), linear.bias)
    how = (layer.bits, layer.four_level, layer.group_size, linear.out_features, layer.act_granularity, layer.act_clip)
    how += (getattr(linear, "act_scale", None), "none")
    where = (linear.backend, linear.strict)
    call = ops.qlinear
    return lambda x, base: call(x, *weight, base, *how, x.dtype, *where)


def _of_modules(linears: Sequence[nn.Module], norm: nn.Module | None, activation: nn.Module | None) -> Projection:
    def run(x):
        normed = x if norm is None else norm(x)
        found = [linear(normed) for linear in linears]
        return normed, found if activation is None else [activation(each) for each in found]

    return run
