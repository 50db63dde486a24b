"""The ops of training: `qlinear_train`, `qembedding_train`, and the quantizer with learned steps.

Their forward pass is the one that serves: codes of the float master weight (`ops.quantize_weight`, or
`quantize_by_step`), then the same integer GEMM or gather. Their backward pass is the straight-through
estimator (DQ-BART, section 3; paper.md section 1.5): the gradient of the float layer whose weight and input are the
dequantized ones, and zero where a clip saturated. What is kept for it are int8 activations, the packed codes and, with
an activation clip, one bit per element. Calls, refusals, and the two formulas that touch weights only.
"""

from __future__ import annotations

import torch

from dqkernels import autocast, backends, checks, ops, packing
from dqkernels.gradients import qlinear_grad_input, qlinear_grad_weight

_LIB = torch.library.Library("dqkernels", "FRAGMENT")
_WHERE = 'str backend="auto", bool strict=False'
_PACKED = "Tensor qweight, Tensor weight_scale, Tensor? group_mult, int bits, bool four_level, int group_size"

SCHEMAS = {
    "quantize_by_step": "(Tensor weight, Tensor step, int bits, str quantizer, float? clip=None, "
    f"{_WHERE}) -> (Tensor, Tensor)",
    "qlinear_train": "(Tensor x, Tensor weight, Tensor? log_step, Tensor? bias, Tensor q, Tensor act_scale, "
    f"Tensor? row_sum, Tensor? passed, {_PACKED}, float? weight_clip, ScalarType out_dtype, {_WHERE}) -> Tensor",
    "qembedding_train": f"(Tensor ids, Tensor weight, Tensor? log_step, {_PACKED}, int padding_idx, "
    f"float embed_scale, float? weight_clip, ScalarType out_dtype, {_WHERE}) -> Tensor",
}
for _name, _schema in SCHEMAS.items():
    _LIB.define(_name + _schema)


def _by_step(weight, step, bits, quantizer, clip=None, backend="auto", strict=False):
    checks.check_weight(weight, bits, quantizer, "per_channel", -1, clip)
    checks.check_step(step, weight)
    choice = backends.choose("quantize_by_step", weight.device.type, backend, strict, bits=bits)
    return choice.module.quantize_by_step(weight, step, bits, quantizer, clip)


def _linear(
    x, weight, log_step, bias, q, act_scale, row_sum, passed, qweight, weight_scale, group_mult, bits, four_level,
    group_size, weight_clip, out_dtype, backend="auto", strict=False,
):  # fmt: skip
    if x.shape != q.shape:
        raise ValueError(f"q must hold the codes of x {list(x.shape)}, got {list(q.shape)}")
    checks.check_passed(passed, q.numel() // q.shape[-1], q.shape[-1])
    checks.check_master(weight, log_step, weight_scale, group_size, q.shape[-1])
    return ops.qgemm(
        q, act_scale, row_sum, qweight, weight_scale, group_mult, bias, None, bits, four_level, group_size,
        weight.shape[0], "none", out_dtype, backend, strict,
    )  # fmt: skip


def _embedding(
    ids, weight, log_step, qweight, weight_scale, group_mult, bits, four_level, group_size, padding_idx, embed_scale,
    weight_clip, out_dtype, backend="auto", strict=False,
):  # fmt: skip
    checks.check_master(weight, log_step, weight_scale, group_size)
    return ops.qembedding(
        ids, qweight, weight_scale, group_mult, None, bits, four_level, group_size, *weight.shape, embed_scale,
        out_dtype, backend, strict,
    )  # fmt: skip


_LIB.impl("quantize_by_step", _by_step, "CompositeExplicitAutograd")
_LIB.impl("qlinear_train", _linear, "CompositeExplicitAutograd")
_LIB.impl("qembedding_train", _embedding, "CompositeExplicitAutograd")


@torch.library.register_fake("dqkernels::quantize_by_step", lib=_LIB)
def _(weight, step, bits, quantizer, clip=None, backend="auto", strict=False):
    return weight.new_empty(packing.packed_shape(*weight.shape, bits), dtype=torch.uint8), step.new_empty(step.shape)


@torch.library.register_fake("dqkernels::qlinear_train", lib=_LIB)
def _(
    x, weight, log_step, bias, q, act_scale, row_sum, passed, qweight, weight_scale, group_mult, bits, four_level,
    group_size, weight_clip, out_dtype, backend="auto", strict=False,
):  # fmt: skip
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=out_dtype)


@torch.library.register_fake("dqkernels::qembedding_train", lib=_LIB)
def _(
    ids, weight, log_step, qweight, weight_scale, group_mult, bits, four_level, group_size, padding_idx, embed_scale,
    weight_clip, out_dtype, backend="auto", strict=False,
):  # fmt: skip
    return weight.new_empty((*ids.shape, weight.shape[1]), dtype=out_dtype)


# ------------------------------------------------------------------------------------------------------ formulas


def _linear_context(ctx, inputs, output):
    x, weight, log_step, bias, q, act_scale, _, passed, qweight, weight_scale, group_mult = inputs[:11]
    clip = inputs[14]
    # The float weight is a parameter, alive anyway; it is read again only where something saturates.
    master = weight if log_step is not None or clip is not None else None
    ctx.save_for_backward(q, act_scale, passed, qweight, weight_scale, group_mult, master)
    ctx.format, ctx.clip, ctx.where = inputs[11:14], clip, inputs[16:]
    ctx.learned = None if log_step is None else log_step.shape
    ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype


def _linear_backward(ctx, grad):
    q, act_scale, passed, qweight, weight_scale, group_mult, master = ctx.saved_tensors
    x_dtype, weight_dtype, bias_dtype = ctx.dtypes
    packed = qweight, weight_scale, group_mult
    k = q.shape[-1]
    grad_x = grad_weight = grad_step = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = qlinear_grad_input(grad, *packed, passed, *ctx.format, k, x_dtype, *ctx.where)
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        exact = torch.float32 if ctx.learned is not None else weight_dtype
        grad_weight = qlinear_grad_weight(grad, q, act_scale, exact, *ctx.where)
        grad_weight, grad_step = _through_quantizer(ctx, grad_weight, master, packed)
    if bias_dtype is not None and ctx.needs_input_grad[3]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(dim=0, dtype=torch.float32).to(bias_dtype)
    if grad_weight is not None:
        grad_weight = grad_weight.to(weight_dtype)
    return grad_x, grad_weight, grad_step, grad_bias, *([None] * 14)


def _embedding_context(ctx, inputs, output):
    ids, weight, log_step, qweight, weight_scale, group_mult = inputs[:6]
    clip = inputs[11]
    master = weight if log_step is not None or clip is not None else None
    ctx.save_for_backward(ids, qweight, weight_scale, group_mult, master)
    ctx.format, ctx.clip, ctx.where = inputs[6:9], clip, inputs[13:]
    ctx.padding_idx, ctx.embed_scale = inputs[9], inputs[10]
    ctx.learned = None if log_step is None else log_step.shape
    ctx.shape, ctx.dtype = weight.shape, weight.dtype


def _embedding_backward(ctx, grad):
    ids, *packed, master = ctx.saved_tensors
    if not (ctx.needs_input_grad[1] or ctx.needs_input_grad[2]):
        return (None,) * 15
    grad = grad.float() * ctx.embed_scale
    grad_weight = torch.ops.aten.embedding_dense_backward(grad, ids, ctx.shape[0], ctx.padding_idx, False)
    grad_weight, grad_step = _through_quantizer(ctx, grad_weight, master, packed)
    return None, grad_weight.to(ctx.dtype), grad_step, *([None] * 12)


def _through_quantizer(ctx, grad, master, packed) -> tuple[torch.Tensor, torch.Tensor | None]:
    """From the gradient of the dequantized weight W^ to those of the master weight and of the log of the step.

    Fixed rules: straight through, zero where |w| >= clip; no gradient through the scale (paper.md section 1.5). Learned
    steps (LSQ): zero outside the levels, and `d W^ / d log s = W^ - w` inside them, `W^` outside (W^ = level * s; w is
    the clipped one).
    """
    if master is None:
        return grad, None
    value, grad_step = master.float(), None
    inside = None if ctx.clip is None else value.abs() < ctx.clip
    if ctx.learned is not None:
        bits, four_level, _ = ctx.format
        dequantized = ops.dequantize_weight(*packed, *ctx.format, *master.shape, *ctx.where)
        value = value if ctx.clip is None else value.clamp(-ctx.clip, ctx.clip)  # what the step divided
        # In factors of an integer level: the last level of four_level is 3 half steps, and its range ends at 4.
        reach = 4 if four_level else (1 << (bits - 1)) - 1
        within = value.abs() < reach * packed[1].reshape(-1, 1)
        slope = dequantized - torch.where(within, value, 0.0)
        grad_step = (grad * slope).sum(dim=1).sum_to_size(ctx.learned)
        inside = within if inside is None else inside & within
    return torch.where(inside, grad, 0.0), grad_step


torch.library.register_autograd("dqkernels::qlinear_train", _linear_backward, setup_context=_linear_context, lib=_LIB)
torch.library.register_autograd(
    "dqkernels::qembedding_train", _embedding_backward, setup_context=_embedding_context, lib=_LIB
)


def _no_gradient(ctx, *grads):
    raise RuntimeError(
        "dqkernels::quantize_by_step has no gradient of its own: qlinear_train and qembedding_train carry it"
    )


torch.library.register_autograd("dqkernels::quantize_by_step", _no_gradient, lib=_LIB)
autocast.shield(_LIB, SCHEMAS)

#: Float master weight [N, K] and learned steps fp32 [N] or [1] -> qweight (packed v1), scale of step's shape; see
#: `qmath.quantize_by_step`.
quantize_by_step = torch.ops.dqkernels.quantize_by_step.default
#: x float [..., K] and its codes q int8, act_scale, row_sum (for four_level without groups; None: summed again), passed
#: (`pack_bits(|x| < clip)` or None); master weight float [N, K], log of the learned steps fp32 [N] or [1] or None, and
#: the codes of both; bias [N] -> y [..., N] in out_dtype, `qlinear`'s bits. Gradients of x, weight, log_step, bias.
qlinear_train = torch.ops.dqkernels.qlinear_train.default
#: ids int [...], master weight [V, D], log of the learned steps or None, the codes of both -> [..., D] in out_dtype,
#: the bits of `qembedding`. Gradients of weight (none for padding_idx; -1: no such row) and log_step.
qembedding_train = torch.ops.dqkernels.qembedding_train.default
