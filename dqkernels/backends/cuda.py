"""The compiled CUDA kernels (`_C`) for CUDA tensors."""

from __future__ import annotations

import torch

from dqkernels.kernels import cuda_attention, measured, native, skinny


def available(device_type: str) -> tuple[bool, str]:
    """True for CUDA tensors when the core was built with CUDA."""
    if device_type != "cuda":
        return False, f"takes cuda tensors, not {device_type}"
    core = native.native()
    if core is None:
        return False, native.why_absent()
    if not hasattr(core, "cuda_quantize_rows"):
        return False, f"the compiled core has {native.why_no_cuda(native.build_info())}"
    if not torch.cuda.is_available():
        return False, "no CUDA device"
    archs, capability = core.build_info()["cuda_archs"], torch.cuda.get_device_capability()
    if native.code_for(archs, capability) is None:
        return False, f"compiled for {archs}, which does not run on compute capability {capability[0]}.{capability[1]}"
    return True, "compiled CUDA kernels"


_GROUP_SIZES = (-1, 32, 64, 128)


def supports(
    op: str,
    *,
    bits: int = 8,
    group_size: int = -1,
    prologue: bool = True,
    norm: bool | None = None,
    uniform: bool = True,
    parts: int = 1,
    head_dim: int | None = None,
    **facts,
) -> str | None:
    """Everything that the formats have; a LayerNorm inside the GEMM for few rows and in the dtype of x only; three
    linears in a launch at most; heads of 4, 8 ... 128 dimensions."""
    if parts > skinny.PARTS:
        return f"has up to {skinny.PARTS} linears in a launch, not {parts}"
    if head_dim is not None and (head_dim > cuda_attention.MAX_HEAD_DIM or head_dim % cuda_attention.DIM_STEP):
        step, most = cuda_attention.DIM_STEP, cuda_attention.MAX_HEAD_DIM
        return f"has no {op} of head_dim={head_dim}, only multiples of {step} up to {most}"
    if norm is not None and not prologue:
        return f"normalizes inside the GEMM for up to {skinny.PROLOGUE_ROWS} rows only"
    if norm is False or not uniform:
        return "takes one dtype of biases, one kind of weight scales, and a norm in the dtype of x"
    if group_size not in _GROUP_SIZES or (group_size != -1 and bits == 8):
        return f"has no {op} with group_size={group_size} at {bits} bits, only -1, and 32, 64 or 128 at 2 and 4 bits"
    return None


def defers(
    op: str, *, many_rows: bool = False, where: tuple | None = None, bits: int = 8, group_size: int = -1, **facts
) -> str | None:
    """The GEMM reads its weights again for every 64 rows, so that larger tiles win above; below, what was measured.

    Decode attention is Triton's until a measurement says otherwise: no GPU has run the CUDA kernel.
    where: (index of the device, rows, out_features, in_features), given above `plans.FASTER_ROWS` rows of `qgemm` and
    above those whose input `qlinear_multi` quantizes itself: one launch in place of four, not measured against them.
    """
    if op == "qattention_decode":
        return "no measurement says that its decode attention is faster"
    if op not in ("qgemm", "qlinear_multi"):
        return None
    if many_rows:
        return f"it is made for up to {skinny.ROWS} rows"
    if where is None:
        return None
    device, *sizes = where
    return measured.triton_is_faster(*sizes, bits, group_size, device)


def quantize_activation(
    x: torch.Tensor, mode: str, clip: float | None = None, act_scale: torch.Tensor | None = None, want_sum: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `qmath.quantize_activation`; the same bits."""
    return native.cuda_quantize_rows(x, mode, clip, act_scale, want_sum)


def qgemm(
    xq,
    act_scale,
    row_sum,
    qweight,
    weight_scale,
    group_mult,
    bias,
    residual,
    *,
    bits,
    four_level,
    group_size,
    out_features,
    activation,
    out_dtype,
):
    """int8 xq [..., K] times packed weights, with the epilogue -> [..., out_features]. Needs no row sums."""
    rows = xq.reshape(-1, xq.shape[-1])
    (y,) = skinny.gemm(
        rows if rows.stride(1) == 1 else rows.contiguous(),
        [_part(qweight, weight_scale, group_mult, bias, residual, out_features)],
        bits=bits,
        four_level=four_level,
        group_size=group_size,
        activation=activation,
        out_dtype=out_dtype,
        act_scale=act_scale.reshape(-1).contiguous(),
    )
    return y.reshape(*xq.shape[:-1], out_features)


def qlinear(
    x,
    qweight,
    weight_scale,
    group_mult,
    bias,
    residual,
    *,
    bits,
    four_level,
    group_size,
    out_features,
    act_mode,
    act_clip,
    act_scale,
    activation,
    out_dtype,
):
    """Quantizes x [..., K], then `qgemm` -> [..., out_features]; in one launch for up to 16 rows."""
    rows, act_scale, act_mode, act_clip = _rows(x, act_mode, act_clip, act_scale)
    (y,) = skinny.gemm(
        rows,
        [_part(qweight, weight_scale, group_mult, bias, residual, out_features)],
        bits=bits,
        four_level=four_level,
        group_size=group_size,
        activation=activation,
        out_dtype=out_dtype,
        act_scale=act_scale,
        mode=act_mode,
        clip=act_clip,
    )
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], out_features)


def qattention_decode(
    q, k_cache, k_scale, v_cache, v_scale, lengths, source, bias, *, causal, softmax_scale, mode, clip
):
    """A few queries per row over an int8 cache, as `reference.qattention_decode`; one launch, two under `per_tensor`
    or for long caches that would leave most of the GPU idle."""
    return cuda_attention.qattention_decode(
        q, k_cache, k_scale, v_cache, v_scale, lengths, source, bias, causal, softmax_scale, mode, clip
    )


def qlinear_multi(
    x, norm, parts, *, bits, four_level, group_size, act_mode, act_clip, act_scale, activation, out_dtype
):
    """`qlinear` of each (qweight, weight_scale, group_mult, bias, out_features) on one x [..., K], in one launch (and
    one of the quantizer for more than 16 rows). norm: (weight, bias or None, eps), for up to 16 rows."""
    rows, act_scale, act_mode, act_clip = _rows(x, act_mode, act_clip, act_scale)
    outputs = skinny.gemm(
        rows,
        [_part(*part[:4], None, part[4]) for part in parts],
        bits=bits,
        four_level=four_level,
        group_size=group_size,
        activation=activation,
        out_dtype=out_dtype,
        act_scale=act_scale,
        mode=act_mode,
        clip=act_clip,
        norm=None
        if norm is None
        else skinny.Norm(*(t.contiguous() if t is not None else t for t in norm[:2]), norm[2]),
    )
    return [y.reshape(*x.shape[:-1], y.shape[1]) for y in outputs]


def _rows(x, mode, clip, act_scale):
    """x as rows that the GEMM can read: of floats for up to 16, else of codes with their scales."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if rows.stride(1) != 1 or rows.data_ptr() % rows.element_size():
        rows = rows.clone(memory_format=torch.contiguous_format)
    if rows.shape[0] <= skinny.PROLOGUE_ROWS:
        return rows, act_scale, mode, clip
    rows, act_scale, _ = native.cuda_quantize_rows(rows, mode, clip, act_scale, False)
    return rows, act_scale, "per_token", None


def _part(qweight, weight_scale, group_mult, bias, residual, out_features) -> skinny.Part:
    return skinny.Part(
        qweight.contiguous(),
        weight_scale.contiguous(),
        None if group_mult is None else group_mult.contiguous(),
        None if bias is None else bias.contiguous(),
        None if residual is None else residual.reshape(-1, out_features).contiguous(),
        out_features,
    )
