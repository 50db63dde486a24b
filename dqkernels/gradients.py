"""The ops of the backward pass: `qlinear_grad_input` and `qlinear_grad_weight`. Schemas and refusals, no arithmetic.

Straight through the quantizers (DQ-BART, section 3; paper.md section 1.5): the gradient of a quantized linear is that
of the float linear whose weight and input are the dequantized ones, and zero where the activation clip saturated.
`ops.qlinear` calls the first of them in its backward pass; training calls both.
"""

from __future__ import annotations

import torch

from dqkernels import backends, checks

_LIB = torch.library.Library("dqkernels", "FRAGMENT")
_WHERE = 'str backend="auto", bool strict=False'

SCHEMAS = {
    "qlinear_grad_input": "(Tensor grad, Tensor qweight, Tensor weight_scale, Tensor? group_mult, Tensor? passed, "
    f"int bits, bool four_level, int group_size, int in_features, ScalarType out_dtype, {_WHERE}) -> Tensor",
    "qlinear_grad_weight": f"(Tensor grad, Tensor q, Tensor act_scale, ScalarType out_dtype, {_WHERE}) -> Tensor",
}
for _name, _schema in SCHEMAS.items():
    _LIB.define(_name + _schema)


def _grad_input(
    grad,
    qweight,
    weight_scale,
    group_mult,
    passed,
    bits,
    four_level,
    group_size,
    in_features,
    out_dtype,
    backend="auto",
    strict=False,
):
    checks.check_float("grad", grad)
    checks.check_gemm(
        in_features, qweight, weight_scale, group_mult, None, bits, group_size, grad.shape[-1], "none", out_dtype
    )
    rows = grad.reshape(-1, grad.shape[-1])
    checks.check_passed(passed, rows.shape[0], in_features)
    choice = backends.choose("grad_input", grad.device.type, backend, strict, bits=bits, group_size=group_size)
    out = choice.module.grad_input(
        rows,
        qweight,
        weight_scale,
        group_mult,
        passed,
        bits=bits,
        four_level=four_level,
        group_size=group_size,
        in_features=in_features,
        out_dtype=out_dtype,
    )
    return out.reshape(*grad.shape[:-1], in_features)


def _grad_weight(grad, q, act_scale, out_dtype, backend="auto", strict=False):
    checks.check_float("grad", grad)
    checks.check_codes(q, act_scale, None)
    if grad.shape[:-1] != q.shape[:-1]:
        raise ValueError(f"grad and q must have the same rows, got {list(grad.shape)} and {list(q.shape)}")
    if out_dtype not in checks.FLOAT_DTYPES:
        raise ValueError(f"out_dtype must be float32, float16 or bfloat16, got {out_dtype}")
    choice = backends.choose("grad_weight", grad.device.type, backend, strict)
    rows = grad.reshape(-1, grad.shape[-1]), q.reshape(-1, q.shape[-1])
    return choice.module.grad_weight(*rows, act_scale.reshape(-1), out_dtype)


_LIB.impl("qlinear_grad_input", _grad_input, "CompositeExplicitAutograd")
_LIB.impl("qlinear_grad_weight", _grad_weight, "CompositeExplicitAutograd")


@torch.library.register_fake("dqkernels::qlinear_grad_input", lib=_LIB)
def _(
    grad,
    qweight,
    weight_scale,
    group_mult,
    passed,
    bits,
    four_level,
    group_size,
    in_features,
    out_dtype,
    backend="auto",
    strict=False,
):
    return grad.new_empty((*grad.shape[:-1], in_features), dtype=out_dtype)


@torch.library.register_fake("dqkernels::qlinear_grad_weight", lib=_LIB)
def _(grad, q, act_scale, out_dtype, backend="auto", strict=False):
    return grad.new_empty((grad.shape[-1], q.shape[-1]), dtype=out_dtype)


def _no_second_order(name: str):
    def backward(ctx, *grads):
        raise RuntimeError(f"dqkernels::{name} has no gradient: a straight-through estimator is differentiated once")

    return backward


for _name in SCHEMAS:
    torch.library.register_autograd(f"dqkernels::{_name}", _no_second_order(_name), lib=_LIB)

#: grad float [..., N] of the pre-activation, packed weights, `passed` uint8 [M, ceil(K / 8)] (bit k % 8 of byte k // 8
#: is 1 where the clip let x through) or None -> grad_x [..., in_features].
qlinear_grad_input = torch.ops.dqkernels.qlinear_grad_input.default
#: grad float [..., N], the forward's int8 q [..., K] and act_scale fp32 [...] -> grad_w [N, K].
qlinear_grad_weight = torch.ops.dqkernels.qlinear_grad_weight.default
