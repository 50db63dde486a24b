"""The backward pass: the ops `qlinear_grad_input`, `qlinear_grad_weight` and `qattention_backward`, and the formulas of
the ops in `ops`.

Straight through the quantizers (DQ-BART, section 3; paper.md section 1.5): the gradient of a quantized linear is that
of the float linear whose weight and input are the dequantized ones, and zero where the activation clip saturated; of
attention likewise. `ops.qlinear` calls the first op in its backward pass, `ops.qattention` the third; training calls
the first two. Calls and refusals, no arithmetic.
"""

from __future__ import annotations

import torch

from dqkernels import autocast, backends, checks, reference

_LIB = torch.library.Library("dqkernels", "FRAGMENT")
_WHERE = 'str backend="auto", bool strict=False'

SCHEMAS = {
    "qlinear_grad_input": "(Tensor grad, Tensor qweight, Tensor weight_scale, Tensor? group_mult, Tensor? passed, "
    f"int bits, bool four_level, int group_size, int in_features, ScalarType out_dtype, {_WHERE}) -> Tensor",
    "qlinear_grad_weight": f"(Tensor grad, Tensor q, Tensor act_scale, ScalarType out_dtype, {_WHERE}) -> Tensor",
    "qattention_backward": "(Tensor grad, Tensor q8, Tensor q_scale, Tensor k8, Tensor k_scale, Tensor v8, "
    "Tensor v_scale, Tensor? mask, Tensor? bias, Tensor? q_passed, Tensor? k_passed, Tensor? v_passed, bool causal, "
    f"float softmax_scale, bool want_bias, ScalarType out_dtype, {_WHERE}) -> (Tensor, Tensor, Tensor, Tensor)",
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
    group_mult = checks.given(group_mult)
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


def _attention_backward(
    grad,
    q8,
    q_scale,
    k8,
    k_scale,
    v8,
    v_scale,
    mask,
    bias,
    q_passed,
    k_passed,
    v_passed,
    causal,
    softmax_scale,
    want_bias,
    out_dtype,
    backend="auto",
    strict=False,
):
    passed = q_passed, k_passed, v_passed
    checks.check_attention_backward(
        grad, q8, q_scale, k8, k_scale, v8, v_scale, mask, bias, passed, want_bias, out_dtype
    )
    choice = backends.choose("qattention_backward", grad.device.type, backend, strict, head_dim=grad.shape[-1])
    *grads, grad_bias = choice.module.qattention_backward(
        grad,
        q8,
        q_scale,
        k8,
        k_scale,
        v8,
        v_scale,
        mask,
        bias,
        *passed,
        causal=causal,
        softmax_scale=softmax_scale,
        want_bias=want_bias,
        out_dtype=out_dtype,
    )
    return *grads, q_scale.new_empty(0) if grad_bias is None else grad_bias


_LIB.impl("qattention_backward", _attention_backward, "CompositeExplicitAutograd")
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


@torch.library.register_fake("dqkernels::qattention_backward", lib=_LIB)
def _(
    grad,
    q8,
    q_scale,
    k8,
    k_scale,
    v8,
    v_scale,
    mask,
    bias,
    q_passed,
    k_passed,
    v_passed,
    causal,
    softmax_scale,
    want_bias,
    out_dtype,
    backend="auto",
    strict=False,
):
    grads = (x.new_empty(x.shape, dtype=out_dtype) for x in (q8, k8, v8))
    return *grads, q_scale.new_empty(bias.shape if want_bias else 0)


def _no_second_order(name: str):
    def backward(ctx, *grads):
        raise RuntimeError(f"dqkernels::{name} has no gradient: a straight-through estimator is differentiated once")

    return backward


for _name in SCHEMAS:
    torch.library.register_autograd(f"dqkernels::{_name}", _no_second_order(_name), lib=_LIB)
autocast.shield(_LIB, SCHEMAS)

#: grad float [..., N] of the pre-activation, packed weights, `passed` uint8 [M, ceil(K / 8)] (bit k % 8 of byte k // 8
#: is 1 where the clip let x through) or None -> grad_x [..., in_features].
qlinear_grad_input = torch.ops.dqkernels.qlinear_grad_input.default
#: grad float [..., N], the forward's int8 q [..., K] and act_scale fp32 [...] -> grad_w [N, K].
qlinear_grad_weight = torch.ops.dqkernels.qlinear_grad_weight.default
#: grad of qattention's output, the forward's codes and scales, mask and bias -> dQ, dK, dV in `out_dtype`, d(bias) in
#: fp32 (or [0] without `want_bias`); see `reference.qattention_backward`.
qattention_backward = torch.ops.dqkernels.qattention_backward.default


# ------------------------------------------------------------------------------------------- formulas of the ops


def _qlinear_context(ctx, inputs, output):
    (x, qweight, weight_scale, group_mult, bias, residual, bits, four_level, group_size, out_features) = inputs[:10]
    act_clip, activation = inputs[11], inputs[13]
    ctx.save_for_backward(x, qweight, weight_scale, group_mult, bias)
    ctx.format = (bits, four_level, group_size)
    ctx.rest = inputs[6:]
    ctx.act_clip, ctx.activation = act_clip, activation
    ctx.dtypes = (None if bias is None else bias.dtype, None if residual is None else residual.dtype)


def _qlinear_backward(ctx, grad):
    """Straight through the activation quantizer, zero where the clip saturates (paper.md section 1.5)."""
    x, qweight, weight_scale, group_mult, bias = ctx.saved_tensors
    bias_dtype, residual_dtype = ctx.dtypes
    grad_residual = grad.to(residual_dtype) if residual_dtype is not None else None
    grad_pre = grad.float()
    if ctx.activation != "none":
        # The pre-activation is computed again rather than kept.
        rest = list(ctx.rest)
        rest[7], rest[8] = "none", torch.float32
        with torch.enable_grad():
            pre = torch.ops.dqkernels.qlinear(x.detach(), qweight, weight_scale, group_mult, bias, None, *rest)
            pre = pre.detach().requires_grad_()
            (grad_pre,) = torch.autograd.grad(reference.activate(pre, ctx.activation), pre, grad_pre)
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        clip, k = ctx.act_clip, x.shape[-1]
        passed = None if clip is None else reference.pack_bits((x.abs() < clip).reshape(-1, k))
        incoming = grad if ctx.activation == "none" else grad_pre.to(grad.dtype)
        grad_x = qlinear_grad_input(
            incoming, qweight, weight_scale, group_mult, passed, *ctx.format, k, x.dtype, *ctx.rest[-2:]
        )
    if bias_dtype is not None and ctx.needs_input_grad[4]:
        grad_bias = grad_pre.reshape(-1, grad_pre.shape[-1]).sum(dim=0).to(bias_dtype)
    return grad_x, None, None, None, grad_bias, grad_residual, *([None] * 11)


def _qattention_context(ctx, inputs, output):
    """Keeps codes, scales and, with a clip, a bit per element: half of what 16-bit q, k, v take.

    The op quantizes inside; doing it here once more costs what doing it in the backward pass would, with the same bits.
    """
    q, k, v, mask, bias, ctx.causal, ctx.softmax_scale, mode, clip, backend, strict = inputs
    saved, passed = [], []
    scaled = q.to(torch.float32, copy=True).mul_(ctx.softmax_scale)  # no alias: this runs below autograd
    for x in (scaled, k, v):
        saved += torch.ops.dqkernels.quantize_activation(x, mode, clip, False, None, backend, strict)[:2]
        keep = None if clip is None else x.abs() < clip
        passed.append(None if clip is None else reference.pack_bits(keep.reshape(-1, x.shape[-1])))
    saved[5] = reference.value_scale(*saved[4:])
    ctx.save_for_backward(*saved, mask, bias, *passed)
    ctx.dtypes = (q.dtype, k.dtype, v.dtype)
    ctx.where = (backend, strict)


def _qattention_backward(ctx, grad):
    """Recomputes scores and shares from the codes; straight through the quantizers (design section 3)."""
    saved = ctx.saved_tensors  # once: under gradient checkpointing a second look is an error
    bias = saved[7]
    want_bias = bias is not None and ctx.needs_input_grad[4]
    same = len(set(ctx.dtypes)) == 1
    *grads, grad_bias = qattention_backward(
        grad, *saved, ctx.causal, ctx.softmax_scale, want_bias, ctx.dtypes[0] if same else torch.float32, *ctx.where
    )
    grads = [g.to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True)]
    return *grads, None, grad_bias.to(bias.dtype) if want_bias else None, *([None] * 6)


def _qembedding_context(ctx, inputs, output):
    ctx.position = None if inputs[4] is None else (inputs[4].shape, inputs[4].dtype)


def _qembedding_backward(ctx, grad):
    if ctx.position is None:
        return (None,) * 14
    shape, dtype = ctx.position
    return None, None, None, None, grad.float().sum_to_size(shape).to(dtype), *([None] * 9)


def _inference_only(name: str):
    def backward(ctx, *grads):
        raise RuntimeError(
            f"dqkernels::{name} has no gradient: it is an inference op. Train in float and quantize afterwards, "
            "or run it under torch.no_grad()"
        )

    return backward


def register(library: torch.library.Library, names) -> None:
    """Gives every op of `names` its formula, or a refusal in words; `ops` calls this once."""
    formulas = {
        "qlinear": (_qlinear_backward, _qlinear_context),
        "qattention": (_qattention_backward, _qattention_context),
        "qembedding": (_qembedding_backward, _qembedding_context),
    }
    for name in names:
        backward, context = formulas.get(name, (_inference_only(name), None))
        torch.library.register_autograd(f"dqkernels::{name}", backward, setup_context=context, lib=library)
