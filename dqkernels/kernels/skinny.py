"""The skinny CUDA GEMM: torch tensors in and out of `_C.SkinnyPlan`. No arithmetic here.

A plan (sizes, options, how the work is cut up) is made once per kind of call and kept; a call then only allocates its
outputs and hands over addresses, so that it can stand in a CUDA graph. Where K is split over blocks, a call also gets a
workspace of its own from torch's allocator, which knows the stream, and counters that are zero: on the default stream
those of the device, which the kernel leaves at zero; on any other, and so under capture, fresh ones.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from dqkernels import packing

from . import measured, native
from .counters import zeros

#: Rows up to which a float input is quantized inside the GEMM.
PROLOGUE_ROWS = 16
#: Rows of one slice: up to here the weights are read once.
ROWS = 64
#: Linears of one launch.
PARTS = 3
#: Code compiled for this or later waits for the kernel before it, and so may be launched while that one ends.
OVERLAP_CODE = 90
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int8: 3}
_ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2}
_HERE = contextlib.nullcontext()
_local = threading.local()


class Part(NamedTuple):
    """One linear of a launch; several share the input.

    qweight uint8 packed v1, weight_scale fp32 [N] or [1], group_mult uint8 [N, G] or None, bias [N] or None,
    residual [M, N] or None; out_features N.
    """

    qweight: torch.Tensor
    weight_scale: torch.Tensor
    group_mult: torch.Tensor | None
    bias: torch.Tensor | None
    residual: torch.Tensor | None
    out_features: int


class Norm(NamedTuple):
    """A LayerNorm on the way in: weight and bias (or None) [K] in x's dtype."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    eps: float


@contextlib.contextmanager
def settled_weights() -> Iterator[None]:
    """Promises that no kernel launched in this thread within the context, nor the last one before it on the stream,
    writes packed weights.

    Where `can_overlap`, a GEMM then starts while the kernel before it ends and reads its weights meanwhile
    (programmatic dependent launch). Without the promise it waits, since that kernel might be the one that packs them.
    """
    before = getattr(_local, "settled", False)
    _local.settled = True
    try:
        yield
    finally:
        _local.settled = before


def can_overlap(capability: tuple[int, int]) -> bool:
    """Whether `settled_weights` has an effect on such a GPU.

    The build decides, not the card: PTX for 8.0 runs on a 9.0 too, but has no instruction there that would wait.
    """
    archs = native.require("SkinnyPlan").build_info()["cuda_archs"]
    return (native.code_for(archs, capability) or 0) >= OVERLAP_CODE


def refresh() -> None:
    """Forgets the plans that were made; for `tune`, whose table changed."""
    _plan.cache_clear()


def gemm(
    x: torch.Tensor,
    parts: Sequence[Part],
    *,
    bits: int,
    four_level: bool,
    group_size: int,
    activation: str,
    out_dtype: torch.dtype,
    act_scale: torch.Tensor | None = None,
    mode: str = "per_token",
    clip: float | None = None,
    norm: Norm | None = None,
    out_scale: torch.Tensor | None = None,
    warps_n: int = 0,
    splits: int = 0,
) -> list[torch.Tensor]:
    """Y = epilogue(quantize(norm(X)) . W^T) for each part, in one launch on the current stream.

    Args:
        x: int8 [M, K] with its `act_scale` fp32 [M]; or float [M, K] of at most 16 rows, quantized by `mode` and
            `clip` (`static`: with `act_scale` fp32 [1]). Elements of a row adjacent, any row stride.
        parts: 1 to 3, of one width and granularity.
        group_size: -1 for none.
        out_dtype: float, or int8 with `out_scale` fp32 [1].
        norm: LayerNorm before the quantizer, for a float x.
        warps_n, splits: how the work is cut up; with 0 for both, as measured on this GPU, else by the rule, which also
            chooses what alone is 0. Results do not depend on it.

    Returns:
        Y [M, N] of each part; with a norm the normalized rows [M, K] first.

    Raises:
        ValueError: for tensors that the kernel cannot read, naming the argument.
    """
    device = _device_of(x)
    with torch.cuda.device(device) if device != torch.cuda.current_device() else _HERE:
        if x.dim() != 2 or (x.shape[1] > 1 and x.stride(1) != 1):
            raise ValueError(f"x must be [M, K] with adjacent elements, got {list(x.shape)} with strides {x.stride()}")
        if not 1 <= len(parts) <= PARTS:
            raise ValueError(f"parts must be 1 to {PARTS}, got {len(parts)}")
        one_scale = _one_scale(parts)
        _check(x, parts, act_scale, norm, out_scale, bits, group_size, mode, out_dtype, one_scale)
        m, k = x.shape
        plan = _plan(
            (m, k, x.stride(0) if m > 1 else k, x.dtype, mode, 0.0 if clip is None else clip),
            0.0 if norm is None else norm.eps,
            (bits, four_level, max(group_size, 0), one_scale),
            _dtype_of(parts, "bias"),
            _dtype_of(parts, "residual"),
            activation,
            out_dtype,
            tuple([part.out_features for part in parts]),
            (warps_n, splits),
            device,
            getattr(_local, "settled", False),
        )
        outputs = [x.new_empty((m, part.out_features), dtype=out_dtype) for part in parts]
        normalized = None if norm is None else x.new_empty((m, k))
        stream = torch._C._cuda_getCurrentRawStream(device)
        workspace, counters = 0, 0
        if plan.workspace_bytes:
            room = torch.empty(plan.workspace_bytes, dtype=torch.uint8, device=x.device)  # lives until this is queued
            arrivals = zeros(x.device, stream, plan.counter_bytes)
            workspace, counters = room.data_ptr(), arrivals.data_ptr()
        plan.run(
            x.data_ptr(),
            _address(act_scale),
            *((0, 0, 0) if norm is None else (norm.weight.data_ptr(), _address(norm.bias), normalized.data_ptr())),
            _address(out_scale),
            [
                (
                    part.qweight.data_ptr(),
                    part.weight_scale.data_ptr(),
                    _address(part.group_mult),
                    _address(part.bias),
                    _address(part.residual),
                    y.data_ptr(),
                )
                for part, y in zip(parts, outputs, strict=True)
            ],
            workspace,
            counters,
            stream,
        )
    return outputs if norm is None else [normalized, *outputs]


def _device_of(x: torch.Tensor) -> int:
    device = x.get_device()
    if device < 0:
        raise ValueError(f"x must be on cuda, got {x.device}")
    return device


def _dtype_of(parts: Sequence[Part], name: str) -> torch.dtype:
    """Of the bias or residual of the parts that have one; `_check` has seen that they agree."""
    for part in parts:
        tensor = getattr(part, name)
        if tensor is not None:
            return tensor.dtype
    return torch.float32


def _one_scale(parts: Sequence[Part]) -> bool:
    """One weight scale for a whole matrix, and not because it has a single row."""
    for part in parts:
        if part.weight_scale.numel() == 1 and part.out_features > 1:
            return True
    return False


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@functools.lru_cache(maxsize=4096)
def _plan(x, eps, weight, bias_dtype, residual_dtype, activation, out_dtype, sizes, cut, device, settled):
    m, k, stride, x_dtype, mode, clip = x
    bits, four_level, group_size, tensor_scale = weight
    for name, value, known in (("mode", mode, native.MODES), ("activation", activation, _ACTIVATIONS)):
        if value not in known:
            raise ValueError(f"{name} must be one of {list(known)}, got {value!r}")
    for name, dtype in (("x", x_dtype), ("out_dtype", out_dtype), ("bias", bias_dtype), ("residual", residual_dtype)):
        if dtype not in _DTYPES or (dtype == torch.int8 and name in ("bias", "residual")):
            raise ValueError(f"{name} must be float32, float16 or bfloat16, got {dtype}")
    properties = torch.cuda.get_device_properties(device)
    if cut == (0, 0):
        kind = "int8" if x_dtype == torch.int8 else "float"
        cut = measured.plan(m, sum(sizes), k, bits, group_size or -1, kind, device)
    return native.require("SkinnyPlan").SkinnyPlan(
        m=m,
        k=k,
        row_stride=stride,
        x_dtype=_DTYPES[x_dtype],
        mode=native.MODES[mode],
        clip=clip,
        norm_eps=eps,
        bits=bits,
        four_level=four_level,
        group_size=group_size,
        tensor_scale=tensor_scale,
        bias_dtype=_DTYPES[bias_dtype],
        residual_dtype=_DTYPES[residual_dtype],
        activation=_ACTIVATIONS[activation],
        y_dtype=_DTYPES[out_dtype],
        n=list(sizes),
        warps_n=cut[0],
        splits=cut[1],
        sms=properties.multi_processor_count,
        overlap=settled and can_overlap((properties.major, properties.minor)),
    )


def _check(x, parts, act_scale, norm, out_scale, bits, group_size, mode, out_dtype, one_scale) -> None:
    """What the addresses alone would not tell: device, dtype, shape and memory layout of every tensor."""
    m, k = x.shape
    named = [("act_scale", act_scale, torch.float32), ("out_scale", out_scale, torch.float32)]
    if norm is not None:
        named += [("norm weight", norm.weight, x.dtype), ("norm bias", norm.bias, x.dtype)]
        for name, tensor in (("norm weight", norm.weight), ("norm bias", norm.bias)):
            if tensor is not None and tensor.numel() != k:
                raise ValueError(f"{name} must have {k} elements, got {list(tensor.shape)}")
    for part in parts:
        named += [
            ("qweight", part.qweight, torch.uint8),
            ("weight_scale", part.weight_scale, torch.float32),
            ("group_mult", part.group_mult, torch.uint8),
            ("bias", part.bias, None),
            ("residual", part.residual, None),
        ]
        if part.residual is not None and part.residual.shape != (m, part.out_features):
            raise ValueError(f"residual must be {[m, part.out_features]}, got {list(part.residual.shape)}")
        packed = packing.packed_shape(part.out_features, k, bits)
        if part.qweight.shape != packed:
            raise ValueError(f"qweight must be {list(packed)}, got {list(part.qweight.shape)}")
        if group_size > 0 and (
            part.group_mult is None or part.group_mult.shape != (part.out_features, -(-k // group_size))
        ):
            wanted = [part.out_features, -(-k // group_size)]
            raise ValueError(f"group_mult must be {wanted}, got {_shape(part.group_mult)}")
        if part.bias is not None and part.bias.numel() != part.out_features:
            raise ValueError(f"bias must hold {part.out_features} elements, got {list(part.bias.shape)}")
        if part.qweight.data_ptr() % 16:
            raise ValueError("qweight must start on a 16-byte boundary: the kernel reads 16 bytes at a time")
        scales = 1 if one_scale else part.out_features
        if part.weight_scale.numel() != scales:
            raise ValueError(f"weight_scale must hold {scales} elements, got {list(part.weight_scale.shape)}")
    for name in ("bias", "residual") if len(parts) > 1 else ():
        found = {getattr(part, name).dtype for part in parts if getattr(part, name) is not None}
        if len(found) > 1:
            raise ValueError(f"the parts' {name} must have one dtype, got {sorted(map(str, found))}")
    if x.dtype == torch.int8 and (act_scale is None or act_scale.numel() != m):
        raise ValueError(f"act_scale must hold {m} elements for int8 rows, got {_shape(act_scale)}")
    if x.dtype != torch.int8 and mode == "static" and (act_scale is None or act_scale.numel() != 1):
        raise ValueError(f"act_scale must hold 1 element for mode='static', got {_shape(act_scale)}")
    if (out_dtype == torch.int8) != (out_scale is not None and out_scale.numel() == 1):
        raise ValueError(f"out_scale must hold 1 element for int8 and be None otherwise, got {_shape(out_scale)}")
    device = x.get_device()
    for name, tensor, dtype in named:
        if tensor is None:
            continue
        if tensor.get_device() != device:
            raise ValueError(f"{name} must be on {x.device} like x, got {tensor.device}")
        if dtype is not None and tensor.dtype != dtype:
            raise ValueError(f"{name} must be {dtype}, got {tensor.dtype}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")


def _shape(tensor: torch.Tensor | None) -> str:
    return "None" if tensor is None else str(list(tensor.shape))
