"""The CPU GEMM and embedding: torch tensors in and out of `_C.CpuPlan` and `_C.cpu_embedding`. No arithmetic here.

A plan holds the options of one kind of linear and is kept; a call then allocates its outputs and hands over addresses.
The core shares long calls among the threads that torch uses (csrc/cpu/threads.cpp), always as many as torch would take.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from . import native
from .cpu_step import Tape

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int8: 3}
_ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2}


class Part(NamedTuple):
    """One linear of a call; several share the input.

    qweight uint8 packed v1, weight_scale fp32 [N] or [1], group_mult uint8 [N, G] or None, bias [N] or None,
    residual [M, N] or None; out_features N. All contiguous, biases and residuals in a float dtype of up to 32 bits.
    """

    qweight: torch.Tensor
    weight_scale: torch.Tensor
    group_mult: torch.Tensor | None
    bias: torch.Tensor | None
    residual: torch.Tensor | None
    out_features: int


def part(qweight, weight_scale, group_mult, bias, residual, out_features: int) -> Part:
    """A `Part` of tensors of any layout; residual [..., N]."""
    if residual is not None and residual.dim() != 2:
        residual = residual.reshape(-1, out_features)
    return Part(_ready(qweight), _ready(weight_scale), _ready(group_mult), _ready(bias), _ready(residual), out_features)


def _ready(tensor: torch.Tensor | None) -> torch.Tensor | None:
    if tensor is None:
        return None
    if tensor.dtype == torch.float64:
        tensor = tensor.float()
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def gemm(
    x: torch.Tensor,
    parts: Sequence[Part],
    *,
    bits: int,
    four_level: bool,
    group_size: int,
    activation: str,
    out_dtype: torch.dtype,
    act_scale: torch.Tensor | float | None = None,
    mode: str = "per_token",
    clip: float | None = None,
    kernel: str | None = None,
    into: Tape | None = None,
) -> list[torch.Tensor]:
    """`x . W^T` of each part, with the epilogue; a float x is quantized once for all of them.

    Args:
        x: [..., K] of int8 codes within -127..127, or of fp32, fp16 or bf16.
        parts: one to 64 linears of K in_features; up to three with `into`.
        bits, four_level, group_size: the format of the weights, -1 for no groups.
        activation: `none`, `relu` or `gelu`.
        out_dtype: fp32, fp16 or bf16.
        act_scale: fp32 [...] of an int8 x; one number for a float x under `static`.
        mode, clip: how a float x is quantized.
        kernel: a name of `_C.cpu_gemm_kernels()` in place of the instruction set's own, for tests.
        into: write the call down there instead.

    Returns:
        A tensor [..., N] per part.

    Raises:
        ValueError: for what the core refuses.
        RuntimeError: where the core is absent.
    """
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    m, k = rows.shape
    row_stride, stride = rows.stride()
    if stride != 1 and k > 1:
        rows = rows.contiguous()
        row_stride = k
    address, given, static_scale = rows.data_ptr(), 0, 0.0
    if x.dtype == torch.int8:
        act_scale = act_scale.reshape(-1)
        act_scale = act_scale if act_scale.is_contiguous() else act_scale.contiguous()
        given = act_scale.data_ptr()
    else:
        if mode == "static":
            static_scale = float(act_scale)
        if address % x.element_size():  # a tensor over a foreign buffer
            rows = rows.clone(memory_format=torch.contiguous_format)
            address, row_stride = rows.data_ptr(), k
    facts = (k, x.dtype, mode, clip, bits, four_level, group_size, activation, out_dtype, kernel)
    plan = _plan(facts, *[_shape(one) for one in parts])
    outputs, pointers = [], []
    lead = x.shape[:-1]
    empty, step = (torch.empty, None) if into is None else (into.empty, into.core)
    for one in parts:
        y = empty((*lead, one.out_features), dtype=out_dtype)
        outputs.append(y)
        pointers.append(_pointers(one, y.data_ptr()))
    plan.run(m, row_stride, address, given, static_scale, torch.get_num_threads(), pointers, step)
    if into is not None:
        into.keep(rows, act_scale if given else None, *(tensor for one in parts for tensor in one[:5]))
    return outputs


def kept(
    k: int,
    x_dtype: torch.dtype,
    parts: Sequence[Part],
    *,
    bits: int,
    four_level: bool,
    group_size: int,
    activation: str,
    out_dtype: torch.dtype,
    act_scale: torch.Tensor | float | None = None,
    mode: str = "per_token",
    clip: float | None = None,
) -> tuple:
    """What `_C.CpuEncoderLayer` takes of linears on one input [..., k]: the plan, the static scale, the addresses.

    Arguments as of `gemm`; x_dtype int8 for codes. The parts' memory must stay; their residuals are not read.
    """
    facts = (k, x_dtype, mode, clip, bits, four_level, group_size, activation, out_dtype, None)
    plan = _plan(facts, *[_shape(one) for one in parts])
    static_scale = float(act_scale) if mode == "static" and x_dtype != torch.int8 else 0.0
    return plan, static_scale, [_pointers(one, 0) for one in parts]


def _pointers(one: Part, y: int) -> tuple[int, ...]:
    return (
        one.qweight.data_ptr(),
        one.weight_scale.data_ptr(),
        0 if one.group_mult is None else one.group_mult.data_ptr(),
        0 if one.bias is None else one.bias.data_ptr(),
        0 if one.residual is None else one.residual.data_ptr(),
        y,
    )


def _shape(one: Part) -> tuple:
    return (
        one.out_features,
        one.weight_scale.numel() == 1,
        None if one.bias is None else one.bias.dtype,
        None if one.residual is None else one.residual.dtype,
    )


@functools.lru_cache(maxsize=4096)
def _plan(facts: tuple, *shapes: tuple):
    k, x_dtype, mode, clip, bits, four_level, group_size, activation, out_dtype, kernel = facts
    core = native.require("CpuPlan")
    return core.CpuPlan(
        k=k,
        x_dtype=_code("x", x_dtype),
        mode=native.MODES[mode],
        clip=0.0 if clip is None else clip,
        bits=bits,
        four_level=four_level,
        group_size=0 if group_size == -1 else group_size,
        activation=_ACTIVATIONS[activation],
        y_dtype=_code("out_dtype", out_dtype),
        n=[shape[0] for shape in shapes],
        tensor_scale=[shape[1] for shape in shapes],
        bias_dtype=[0 if shape[2] is None else _code("bias", shape[2]) for shape in shapes],
        residual_dtype=[0 if shape[3] is None else _code("residual", shape[3]) for shape in shapes],
        kernel=0 if kernel is None else 1 + core.cpu_gemm_kernels().index(kernel),
    )


def _code(name: str, dtype: torch.dtype) -> int:
    if dtype not in _DTYPES:
        raise ValueError(f"{name} must be float32, float16 or bfloat16, got {dtype}")
    return _DTYPES[dtype]


def embedding(
    ids: torch.Tensor,
    qweight: torch.Tensor,
    weight_scale: torch.Tensor,
    group_mult: torch.Tensor | None,
    position: torch.Tensor | None,
    *,
    bits: int,
    four_level: bool,
    group_size: int,
    embedding_dim: int,
    embed_scale: float,
    out_dtype: torch.dtype,
    kernel: str | None = None,
    into: Tape | None = None,
) -> torch.Tensor:
    """Rows of a packed table -> [..., embedding_dim]; the arguments as in `reference.qembedding`.

    into: write the call down there.

    Raises:
        IndexError: for an id without a row: of `weight_scale` where it has one number per row, else of `qweight`.
        RuntimeError: where the core is absent.
    """
    core = native.require("cpu_embedding")
    shape = (*ids.shape, embedding_dim)
    flat = ids if ids.is_contiguous() else ids.contiguous()
    y = (torch if into is None else into).empty(shape, dtype=out_dtype)
    address, position_dtype = 0, torch.float32
    if position is not None:
        position = _ready(position.expand(shape))
        address, position_dtype = position.data_ptr(), position.dtype
    qweight, weight_scale, group_mult = _ready(qweight), _ready(weight_scale), _ready(group_mult)
    # One scale for all rows says nothing of how many there are: padding rows are then zeros, as in the reference.
    rows = weight_scale.numel() if weight_scale.numel() > 1 else qweight.shape[0]
    if group_mult is not None:
        rows = min(rows, group_mult.shape[0])
    core.cpu_embedding(
        ids=flat.data_ptr(),
        ids32=flat.dtype == torch.int32,
        count=flat.numel(),
        qweight=qweight.data_ptr(),
        weight_scale=weight_scale.data_ptr(),
        tensor_scale=weight_scale.numel() == 1,
        group_mult=0 if group_mult is None else group_mult.data_ptr(),
        rows=rows,
        k=embedding_dim,
        bits=bits,
        four_level=four_level,
        group_size=0 if group_size == -1 else group_size,
        embed_scale=embed_scale,
        position=address,
        position_dtype=_code("position", position_dtype),
        position_stride=embedding_dim,
        y=y.data_ptr(),
        y_dtype=_code("out_dtype", out_dtype),
        threads=torch.get_num_threads(),
        kernel=0 if kernel is None else 1 + core.cpu_gemm_kernels().index(kernel),
        step=None if into is None else into.core,
    )
    if into is not None:
        into.keep(flat, qweight, weight_scale, group_mult, position)
    return y
