"""The table of contents: every op, its shapes, its refusals. No arithmetic lives here.

Each op is `torch.ops.dqkernels.<name>`; the functions below are the same call. `backend` is `auto` or a forced one,
`strict` refuses a slow path (see `dqkernels.backends`). Ops are functional: no input changes or shares storage.
"""

from __future__ import annotations

import torch

from dqkernels import autocast, backends, checks, direct, gradients, packing
from dqkernels.config import LayerConfig

_LIB = torch.library.Library("dqkernels", "DEF")
_WHERE = 'str backend="auto", bool strict=False'
_WEIGHT = "Tensor qweight, Tensor weight_scale, Tensor? group_mult"
_FORMAT = "int bits, bool four_level, int group_size"

SCHEMAS = {
    "quantize_weight": "(Tensor weight, int bits, str quantizer, str granularity, int group_size=-1, "
    f"float? clip=None, {_WHERE}) -> (Tensor, Tensor, Tensor)",
    "quantize_activation": "(Tensor x, str mode, float? clip=None, bool want_sum=False, Tensor? act_scale=None, "
    f"{_WHERE}) -> (Tensor, Tensor, Tensor)",
    "dequantize_weight": f"({_WEIGHT}, {_FORMAT}, int out_features, int in_features, {_WHERE}) -> Tensor",
    "qgemm": f"(Tensor q, Tensor act_scale, Tensor? row_sum, {_WEIGHT}, Tensor? bias, Tensor? residual, "
    f"{_FORMAT}, int out_features, str activation, ScalarType out_dtype, {_WHERE}) -> Tensor",
    "qlinear": f"(Tensor x, {_WEIGHT}, Tensor? bias, Tensor? residual, {_FORMAT}, int out_features, "
    "str act_mode, float? act_clip, Tensor? act_scale, str activation, ScalarType out_dtype, "
    f"{_WHERE}) -> Tensor",
    "qembedding": f"(Tensor ids, {_WEIGHT}, Tensor? position, {_FORMAT}, int num_embeddings, "
    f"int embedding_dim, float embed_scale, ScalarType out_dtype, {_WHERE}) -> Tensor",
    "layernorm_quantize": "(Tensor x, Tensor? residual, Tensor weight, Tensor? bias, float eps, str mode, "
    f"float? clip=None, bool want_sum=False, Tensor? act_scale=None, {_WHERE}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    "gelu_quantize": "(Tensor x, str mode, float? clip=None, bool want_sum=False, Tensor? act_scale=None, "
    f"{_WHERE}) -> (Tensor, Tensor, Tensor)",
    "qattention": "(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? bias, bool causal, float softmax_scale, "
    f'str mode="per_token", float? clip=None, {_WHERE}) -> Tensor',
    "qattention_decode": "(Tensor q, Tensor k_cache, Tensor k_scale, Tensor v_cache, Tensor v_scale, Tensor lengths, "
    "Tensor? source, Tensor? bias, bool causal, float softmax_scale, "
    f'str mode="per_token", float? clip=None, {_WHERE}) -> Tensor',
}
FEW_ROWS = backends.FEW_ROWS

for _name, _schema in SCHEMAS.items():
    _LIB.define(_name + _schema)


def _implement(name: str):
    """Registers the decorated function as the op's kernel on every device."""

    def register(function):
        _LIB.impl(name, function, "CompositeExplicitAutograd")
        return function

    return register


def _fake(name: str):
    """Registers shape inference: what the op returns, without computing it."""
    return torch.library.register_fake(f"dqkernels::{name}", lib=_LIB)


# ------------------------------------------------------------------------------------------------------- ops


@_implement("quantize_weight")
def _quantize_weight(weight, bits, quantizer, granularity, group_size=-1, clip=None, backend="auto", strict=False):
    checks.check_weight(weight, bits, quantizer, granularity, group_size, clip)
    layer = LayerConfig(bits, quantizer, granularity, group_size, weight_clip=clip)
    facts = {"bits": bits, "quantizer": quantizer, "granularity": granularity, "group_size": group_size}
    module = backends.choose("quantize_weight", weight.device.type, backend, strict, **facts).module
    qweight, scale, group_mult = module.quantize_weight(weight, layer)
    return qweight, scale, scale.new_empty(0, dtype=torch.uint8) if group_mult is None else group_mult


@_fake("quantize_weight")
def _(weight, bits, quantizer, granularity, group_size=-1, clip=None, backend="auto", strict=False):
    n, k = weight.shape
    groups = (0,) if group_size == -1 else (n, -(-k // group_size))
    return (
        weight.new_empty(packing.packed_shape(n, k, bits), dtype=torch.uint8),
        weight.new_empty(1 if granularity == "per_tensor" else n, dtype=torch.float32),
        weight.new_empty(groups, dtype=torch.uint8),
    )


@_implement("quantize_activation")
def _quantize_activation(x, mode, clip=None, want_sum=False, act_scale=None, backend="auto", strict=False):
    checks.check_activation(x, mode, act_scale, clip)
    module = backends.choose("quantize_activation", x.device.type, backend, strict, mode=mode).module
    return module.quantize_activation(x, mode, clip, act_scale, want_sum)


def _fake_quantized(x, want_sum):
    rows = x.shape[:-1]
    return (
        x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty(rows, dtype=torch.float32),
        x.new_empty(rows if want_sum else (0,), dtype=torch.int32),
    )


@_fake("quantize_activation")
def _(x, mode, clip=None, want_sum=False, act_scale=None, backend="auto", strict=False):
    return _fake_quantized(x, want_sum)


@_implement("dequantize_weight")
def _dequantize_weight(
    qweight,
    weight_scale,
    group_mult,
    bits,
    four_level,
    group_size,
    out_features,
    in_features,
    backend="auto",
    strict=False,
):
    group_mult = checks.given(group_mult)
    checks.check_gemm(
        in_features, qweight, weight_scale, group_mult, None, bits, group_size, out_features, "none", torch.float32
    )
    facts = {"bits": bits, "group_size": group_size}
    module = backends.choose("dequantize_weight", qweight.device.type, backend, strict, **facts).module
    return module.dequantize_weight(
        qweight,
        weight_scale,
        group_mult,
        bits=bits,
        four_level=four_level,
        group_size=group_size,
        out_features=out_features,
        in_features=in_features,
    )


@_fake("dequantize_weight")
def _(
    qweight,
    weight_scale,
    group_mult,
    bits,
    four_level,
    group_size,
    out_features,
    in_features,
    backend="auto",
    strict=False,
):
    return weight_scale.new_empty(out_features, in_features)


@_implement("qgemm")
def _qgemm(
    q,
    act_scale,
    row_sum,
    qweight,
    weight_scale,
    group_mult,
    bias,
    residual,
    bits,
    four_level,
    group_size,
    out_features,
    activation,
    out_dtype,
    backend="auto",
    strict=False,
):
    group_mult = checks.given(group_mult)
    checks.check_codes(q, act_scale, row_sum)
    checks.check_gemm(
        q.shape[-1], qweight, weight_scale, group_mult, bias, bits, group_size, out_features, activation, out_dtype
    )
    checks.check_residual(residual, (*q.shape[:-1], out_features))
    facts = backends.gemm_facts(q, out_features, bits, group_size)
    choice = backends.choose("qgemm", q.device.type, backend, strict, **facts)
    return choice.module.qgemm(
        q,
        act_scale,
        row_sum,
        qweight,
        weight_scale,
        group_mult,
        bias,
        residual,
        bits=bits,
        four_level=four_level,
        group_size=group_size,
        out_features=out_features,
        activation=activation,
        out_dtype=out_dtype,
    )


@_fake("qgemm")
def _(
    q,
    act_scale,
    row_sum,
    qweight,
    weight_scale,
    group_mult,
    bias,
    residual,
    bits,
    four_level,
    group_size,
    out_features,
    activation,
    out_dtype,
    backend="auto",
    strict=False,
):
    return q.new_empty((*q.shape[:-1], out_features), dtype=out_dtype)


@_implement("qlinear")
def _qlinear(
    x,
    qweight,
    weight_scale,
    group_mult,
    bias,
    residual,
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
    group_mult = checks.given(group_mult)
    checks.check_activation(x, act_mode, act_scale, act_clip)
    checks.check_gemm(
        x.shape[-1], qweight, weight_scale, group_mult, bias, bits, group_size, out_features, activation, out_dtype
    )
    checks.check_residual(residual, (*x.shape[:-1], out_features))
    format_ = {"bits": bits, "four_level": four_level, "group_size": group_size, "out_features": out_features}
    facts = backends.gemm_facts(x, out_features, bits, group_size)
    gemm, quantizer = choose_qlinear(x.device.type, act_mode=act_mode, backend=backend, strict=strict, **facts)
    if quantizer is None:
        return gemm.module.qlinear(
            x,
            qweight,
            weight_scale,
            group_mult,
            bias,
            residual,
            **format_,
            act_mode=act_mode,
            act_clip=act_clip,
            act_scale=act_scale,
            activation=activation,
            out_dtype=out_dtype,
        )
    want_sum = four_level and group_mult is None
    q, scale, row_sum = quantizer.module.quantize_activation(x, act_mode, act_clip, act_scale, want_sum)
    return gemm.module.qgemm(
        q,
        scale,
        row_sum if want_sum else None,
        qweight,
        weight_scale,
        group_mult,
        bias,
        residual,
        **format_,
        activation=activation,
        out_dtype=out_dtype,
    )


def choose_qlinear(
    device_type: str,
    bits: int,
    group_size: int,
    act_mode: str,
    backend: str = "auto",
    strict: bool = False,
    many_rows: bool = False,
    where: tuple[int, int, int, int] | None = None,
) -> tuple[backends.Choice, backends.Choice | None]:
    """The backend of a quantized linear's GEMM, and that of its quantizer (None when the GEMM has it inside).

    many_rows: for more than `FEW_ROWS` rows of input. where: see `backends.gemm_facts`.
    """
    facts = {"bits": bits, "group_size": group_size, "many_rows": many_rows, "where": where}
    gemm = backends.choose("qgemm", device_type, backend, strict, **facts)
    if hasattr(gemm.module, "qlinear"):
        return gemm, None
    return gemm, backends.choose("quantize_activation", device_type, backend, strict, mode=act_mode)


@_fake("qlinear")
def _(
    x,
    qweight,
    weight_scale,
    group_mult,
    bias,
    residual,
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
    return x.new_empty((*x.shape[:-1], out_features), dtype=out_dtype)


@_implement("qembedding")
def _qembedding(
    ids,
    qweight,
    weight_scale,
    group_mult,
    position,
    bits,
    four_level,
    group_size,
    num_embeddings,
    embedding_dim,
    embed_scale,
    out_dtype,
    backend="auto",
    strict=False,
):
    group_mult = checks.given(group_mult)
    checks.check_ids(ids, num_embeddings)
    checks.check_gemm(
        embedding_dim, qweight, weight_scale, group_mult, None, bits, group_size, num_embeddings, "none", out_dtype
    )
    checks.check_position(position, (*ids.shape, embedding_dim))
    module = backends.choose("qembedding", ids.device.type, backend, strict, bits=bits).module
    return module.qembedding(
        ids,
        qweight,
        weight_scale,
        group_mult,
        position,
        bits=bits,
        four_level=four_level,
        group_size=group_size,
        embedding_dim=embedding_dim,
        embed_scale=embed_scale,
        out_dtype=out_dtype,
    )


@_fake("qembedding")
def _(
    ids,
    qweight,
    weight_scale,
    group_mult,
    position,
    bits,
    four_level,
    group_size,
    num_embeddings,
    embedding_dim,
    embed_scale,
    out_dtype,
    backend="auto",
    strict=False,
):
    return ids.new_empty((*ids.shape, embedding_dim), dtype=out_dtype)


@_implement("layernorm_quantize")
def _layernorm_quantize(
    x, residual, weight, bias, eps, mode, clip=None, want_sum=False, act_scale=None, backend="auto", strict=False
):
    checks.check_activation(x, mode, act_scale, clip)
    checks.check_norm(weight, bias, x.shape[-1])
    checks.check_residual(residual, x.shape)
    module = backends.choose("layernorm_quantize", x.device.type, backend, strict, mode=mode).module
    return module.layernorm_quantize(
        x, residual, weight, bias, eps=eps, mode=mode, clip=clip, act_scale=act_scale, want_sum=want_sum
    )


@_fake("layernorm_quantize")
def _(x, residual, weight, bias, eps, mode, clip=None, want_sum=False, act_scale=None, backend="auto", strict=False):
    return torch.empty_like(x, memory_format=torch.contiguous_format), *_fake_quantized(x, want_sum)


@_implement("gelu_quantize")
def _gelu_quantize(x, mode, clip=None, want_sum=False, act_scale=None, backend="auto", strict=False):
    checks.check_activation(x, mode, act_scale, clip)
    module = backends.choose("gelu_quantize", x.device.type, backend, strict, mode=mode).module
    return module.gelu_quantize(x, mode=mode, clip=clip, act_scale=act_scale, want_sum=want_sum)


@_fake("gelu_quantize")
def _(x, mode, clip=None, want_sum=False, act_scale=None, backend="auto", strict=False):
    return _fake_quantized(x, want_sum)


@_implement("qattention")
def _qattention(q, k, v, mask, bias, causal, softmax_scale, mode="per_token", clip=None, backend="auto", strict=False):
    checks.check_attention(q, k, v, mask, bias, mode, clip)
    choice = backends.choose("qattention", q.device.type, backend, strict, mode=mode, head_dim=q.shape[-1])
    facts = {"causal": causal, "softmax_scale": softmax_scale, "mode": mode, "clip": clip}
    if choice.backend == "eager":  # plain torch around a quantizer, which the CPU has a kernel for
        quantizer = backends.choose("quantize_activation", q.device.type, backend, mode=mode)
        facts["quantize"] = quantizer.module.quantize_activation
    return choice.module.qattention(q, k, v, mask, bias, **facts)


@_fake("qattention")
def _(q, k, v, mask, bias, causal, softmax_scale, mode="per_token", clip=None, backend="auto", strict=False):
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@_implement("qattention_decode")
def _qattention_decode(
    q, k_cache, k_scale, v_cache, v_scale, lengths, source, bias, causal, softmax_scale, mode="per_token", clip=None,
    backend="auto", strict=False,
):  # fmt: skip
    checks.check_attention_decode(q, k_cache, k_scale, v_cache, v_scale, lengths, source, bias, mode, clip)
    facts = {"mode": mode, "head_dim": q.shape[-1], "by_key": source is not None and source.dim() == 2}
    module = backends.choose("qattention_decode", q.device.type, backend, strict, **facts).module
    return module.qattention_decode(
        q, k_cache, k_scale, v_cache, v_scale, lengths, source, bias,
        causal=causal, softmax_scale=softmax_scale, mode=mode, clip=clip,
    )  # fmt: skip


@_fake("qattention_decode")
def _(
    q, k_cache, k_scale, v_cache, v_scale, lengths, source, bias, causal, softmax_scale, mode="per_token", clip=None,
    backend="auto", strict=False,
):  # fmt: skip
    return torch.empty_like(q, memory_format=torch.contiguous_format)


gradients.register(_LIB, SCHEMAS)
autocast.shield(_LIB, SCHEMAS)


# ------------------------------------------------------------------------------------------- the Python spelling

quantize_weight = torch.ops.dqkernels.quantize_weight.default
quantize_activation = torch.ops.dqkernels.quantize_activation.default
dequantize_weight = torch.ops.dqkernels.dequantize_weight.default
qgemm = torch.ops.dqkernels.qgemm.default
qlinear = torch.ops.dqkernels.qlinear.default
qembedding = torch.ops.dqkernels.qembedding.default
layernorm_quantize = torch.ops.dqkernels.layernorm_quantize.default
gelu_quantize = torch.ops.dqkernels.gelu_quantize.default
qattention = torch.ops.dqkernels.qattention.default
qattention_decode = torch.ops.dqkernels.qattention_decode.default


def linear(x: torch.Tensor, *rest) -> torch.Tensor:
    """`qlinear` of positional arguments, past the dispatcher where nobody would notice: for modules that compute."""
    if direct.unwatched(x, rest[3], rest[4]):  # bias and residual
        return _qlinear(x, *rest)
    return qlinear(x, *rest)
