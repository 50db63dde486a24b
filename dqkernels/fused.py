"""Ops that put several steps of a decoder layer into one launch: `qlinear_multi`.

Where no backend has the launch as one kernel, the same steps run one after another through `ops`, with the same bits
but for LayerNorm, whose bound the contract states (docs/design.md, section 3).
"""

from __future__ import annotations

import torch

from dqkernels import autocast, backends, checks, direct, gradients

_LIB = torch.library.Library("dqkernels", "FRAGMENT")

SCHEMAS = {
    "qlinear_multi": "(Tensor x, Tensor? norm_weight, Tensor? norm_bias, float norm_eps, Tensor[] qweight, "
    "Tensor[] weight_scale, Tensor?[] group_mult, Tensor?[] bias, int bits, bool four_level, int group_size, "
    "int[] out_features, str act_mode, float? act_clip, Tensor? act_scale, str activation, ScalarType out_dtype, "
    'str backend="auto", bool strict=False) -> Tensor[]'
}
#: Linears of one call, whatever launches it takes: K and V of 32 layers. `kMaxCpuParts` of the core.
MAX_PARTS = 64
#: Rows up to which a launch quantizes, and normalizes, its own input.
PROLOGUE_ROWS = 16
_LIB.define("qlinear_multi" + SCHEMAS["qlinear_multi"])


def _qlinear_multi(
    x,
    norm_weight,
    norm_bias,
    norm_eps,
    qweight,
    weight_scale,
    group_mult,
    bias,
    bits,
    four_level,
    group_size,
    out_features,
    act_mode,
    act_clip,
    act_scale,
    activation,
    out_dtype,
    backend="auto",
    strict=False,
):
    checks.check_activation(x, act_mode, act_scale, act_clip)
    counts = {
        "qweight": len(qweight), "weight_scale": len(weight_scale), "group_mult": len(group_mult), "bias": len(bias),
        "out_features": len(out_features),
    }  # fmt: skip
    if not 1 <= len(qweight) <= MAX_PARTS or len(set(counts.values())) != 1:
        raise ValueError(f"qlinear_multi takes lists of one length, 1 to {MAX_PARTS}, got {counts}")
    parts = list(zip(qweight, weight_scale, map(checks.given, group_mult), bias, out_features, strict=True))
    for packed, scale, mult, added, n in parts:
        checks.check_gemm(x.shape[-1], packed, scale, mult, added, bits, group_size, n, activation, out_dtype)
    if norm_weight is not None:
        checks.check_norm(norm_weight, norm_bias, x.shape[-1])
    elif norm_bias is not None:
        raise ValueError("norm_bias needs norm_weight")
    options = {"bits": bits, "four_level": four_level, "group_size": group_size, "activation": activation}
    rows = x.numel() // x.shape[-1]
    one_scale = {scale.numel() == 1 for _, scale, _, _, n in parts if n > 1}
    facts = {
        "parts": len(parts),
        # Up to 16 rows all of this is one launch, which no single GEMM was measured against.
        **backends.gemm_facts(x, sum(out_features), bits, group_size, own=PROLOGUE_ROWS),
        "prologue": rows <= PROLOGUE_ROWS,
        # One kernel for all parts reads one kind of bias and of scale, and norms in the type of x.
        "uniform": len(one_scale) < 2 and len({b.dtype for b in bias if b is not None}) < 2,
        "norm": None if norm_weight is None else all(t is None or t.dtype == x.dtype for t in (norm_weight, norm_bias)),
    }
    choice = backends.one_kernel("qlinear_multi", x.device.type, backend, **facts)
    if choice is not None:
        return choice.module.qlinear_multi(
            x,
            None if norm_weight is None else (norm_weight, norm_bias, norm_eps),
            parts,
            **options,
            act_mode=act_mode,
            act_clip=act_clip,
            act_scale=act_scale,
            out_dtype=out_dtype,
        )
    # The backends' own functions: an op per step would check every operand once more.
    where = (x.device.type, backend, strict)
    want_sum = four_level and group_size == -1
    if norm_weight is None:
        first = []
        quantizer = backends.choose("quantize_activation", *where, mode=act_mode).module
        q, scale, row_sum = quantizer.quantize_activation(x, act_mode, act_clip, act_scale, want_sum)
    else:
        quantizer = backends.choose("layernorm_quantize", *where, mode=act_mode).module
        how = {"mode": act_mode, "clip": act_clip, "act_scale": act_scale, "want_sum": want_sum}
        y, q, scale, row_sum = quantizer.layernorm_quantize(x, None, norm_weight, norm_bias, eps=norm_eps, **how)
        first = [y]
    sums = row_sum if want_sum else None
    for packed, steps, mult, added, n in parts:
        gemm = backends.choose("qgemm", *where, **backends.gemm_facts(q, n, bits, group_size)).module
        first.append(
            gemm.qgemm(q, scale, sums, packed, steps, mult, added, None, **options, out_features=n, out_dtype=out_dtype)
        )
    return first


_LIB.impl("qlinear_multi", _qlinear_multi, "CompositeExplicitAutograd")


@torch.library.register_fake("dqkernels::qlinear_multi", lib=_LIB)
def _(
    x,
    norm_weight,
    norm_bias,
    norm_eps,
    qweight,
    weight_scale,
    group_mult,
    bias,
    bits,
    four_level,
    group_size,
    out_features,
    act_mode,
    act_clip,
    act_scale,
    activation,
    out_dtype,
    backend="auto",
    strict=False,
):
    first = [] if norm_weight is None else [torch.empty_like(x, memory_format=torch.contiguous_format)]
    return first + [x.new_empty((*x.shape[:-1], n), dtype=out_dtype) for n in out_features]


gradients.register(_LIB, SCHEMAS)
autocast.shield(_LIB, SCHEMAS)

#: `qlinear` of several packed weights on one input, after a LayerNorm where `norm_weight` is given: Q, K and V of a
#: layer, K and V of a cross-attention (of several layers, too), or a projection behind its norm. One call of the core
#: on a CPU; on a GPU one launch for few rows and up to three weights, else one of the quantizer and one per weight.
#: x [..., K]; returns Y [..., N] of each weight, preceded by the normalized rows [..., K] in x's dtype (the next
#: residual) with a norm.
qlinear_multi = torch.ops.dqkernels.qlinear_multi.default


def linears(x: torch.Tensor, *rest) -> list[torch.Tensor]:
    """`qlinear_multi` of positional arguments, past the dispatcher where nobody would notice. Not differentiable."""
    if direct.unwatched(x, *rest[:2]):  # the norm
        return _qlinear_multi(x, *rest)
    return qlinear_multi(x, *rest)
