"""What the ops refuse at the door: one sentence each, with the argument, the value found and the value wanted."""

from __future__ import annotations

import torch

from dqkernels import packing, qmath, reference
from dqkernels.config import GROUP_SIZES, QUANTIZERS_BY_BITS, WEIGHT_GRANULARITIES

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_float(name: str, tensor: torch.Tensor) -> None:
    if tensor.dtype not in FLOAT_DTYPES:
        raise ValueError(f"{name} must be float32, float16 or bfloat16, got {tensor.dtype}")


def check_clip(clip: float | None) -> None:
    if clip is not None and not 0 < clip < float("inf"):
        raise ValueError(f"clip must be None or a finite number above 0, got {clip!r}")


def check_weight(
    weight: torch.Tensor, bits: int, quantizer: str, granularity: str, group_size: int, clip: float | None
) -> None:
    if not weight.is_floating_point():
        raise ValueError(f"weight must be a float matrix, got {weight.dtype}")
    if bits not in QUANTIZERS_BY_BITS:
        raise ValueError(f"bits must be 2, 4 or 8, got {bits!r}")
    if quantizer not in QUANTIZERS_BY_BITS[bits]:
        raise ValueError(f"quantizer must be one of {list(QUANTIZERS_BY_BITS[bits])} at {bits} bits, got {quantizer!r}")
    if granularity not in WEIGHT_GRANULARITIES:
        raise ValueError(f"granularity must be one of {list(WEIGHT_GRANULARITIES)}, got {granularity!r}")
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size must be one of {list(GROUP_SIZES)}, got {group_size!r}")
    if group_size != -1 and (bits == 8 or granularity != "per_channel"):
        raise ValueError(
            f"group_size={group_size} needs 2 or 4 bits and granularity='per_channel', got {bits} and {granularity!r}"
        )
    check_clip(clip)


def check_activation(x: torch.Tensor, mode: str, act_scale: torch.Tensor | None, clip: float | None = None) -> None:
    check_float("x", x)
    check_clip(clip)
    if x.dim() < 1 or not 0 < x.shape[-1] <= qmath.MAX_K:
        raise ValueError(f"x must be [..., K] with K in 1..{qmath.MAX_K}, got shape {list(x.shape)}")
    if mode not in ("per_token", "per_tensor", "static"):
        raise ValueError(f"mode must be 'per_token', 'per_tensor' or 'static', got {mode!r}")
    if mode == "static" and (act_scale is None or act_scale.numel() != 1 or act_scale.dtype != torch.float32):
        raise ValueError(
            "mode='static' needs act_scale, one fp32 number: run dqkernels.calibrate(model, batches) first"
        )
    # On a GPU reading it would wait for the device; there an uncalibrated scale (NaN) gives rows of NaN.
    if mode == "static" and act_scale.device.type == "cpu":
        low, high = qmath.ACT_SCALE_RANGE
        value = float(act_scale)
        if not low <= value <= high:
            raise ValueError(
                f"act_scale must lie between 2^-126 and 2^126, got {value}: "
                "run dqkernels.calibrate(model, batches) first, it measures one for every layer"
            )


def check_codes(q: torch.Tensor, act_scale: torch.Tensor, row_sum: torch.Tensor | None) -> None:
    if q.dtype != torch.int8:
        raise ValueError(f"q must be int8, got {q.dtype}")
    if q.dim() < 1 or not 0 < q.shape[-1] <= qmath.MAX_K:
        raise ValueError(f"q must be [..., K] with K in 1..{qmath.MAX_K}, got shape {list(q.shape)}")
    rows = tuple(q.shape[:-1])
    if act_scale.dtype != torch.float32 or tuple(act_scale.shape) != rows:
        raise ValueError(
            f"act_scale must be float32 {list(rows)}, one per row of q, got {act_scale.dtype} {list(act_scale.shape)}"
        )
    # [0] is what quantize_activation returns where no sum was wanted.
    if row_sum is not None and tuple(row_sum.shape) != (0,):
        if row_sum.dtype != torch.int32 or tuple(row_sum.shape) != rows:
            raise ValueError(
                f"row_sum must be int32 {list(rows)}, one per row of q, got {row_sum.dtype} {list(row_sum.shape)}"
            )


def check_gemm(
    k: int,
    qweight: torch.Tensor,
    weight_scale: torch.Tensor,
    group_mult: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    group_size: int,
    out_features: int,
    activation: str,
    out_dtype: torch.dtype,
) -> None:
    packing.check_packed(qweight, out_features, k, bits)
    if weight_scale.dtype != torch.float32 or weight_scale.numel() not in (1, out_features):
        raise ValueError(
            f"weight_scale must be float32 with {out_features} values or 1, "
            f"got {weight_scale.dtype} with {weight_scale.numel()}"
        )
    if (group_mult is None) != (group_size == -1):
        raise ValueError(f"group_size={group_size} and group_mult={'None' if group_mult is None else 'given'}")
    if group_mult is not None:
        wanted = (out_features, -(-k // group_size))
        if group_mult.dtype != torch.uint8 or tuple(group_mult.shape) != wanted:
            raise ValueError(
                f"group_mult must be uint8 {list(wanted)}, got {group_mult.dtype} {list(group_mult.shape)}"
            )
    if bias is not None and tuple(bias.shape) != (out_features,):
        raise ValueError(f"bias must be [{out_features}], got {list(bias.shape)}")
    if activation not in reference.ACTIVATIONS:
        raise ValueError(f"activation must be one of {list(reference.ACTIVATIONS)}, got {activation!r}")
    if out_dtype not in FLOAT_DTYPES:
        raise ValueError(f"out_dtype must be float32, float16 or bfloat16, got {out_dtype}")


def check_residual(residual: torch.Tensor | None, out_shape: tuple) -> None:
    if residual is not None and tuple(residual.shape) != tuple(out_shape):
        raise ValueError(f"residual must be {list(out_shape)}, got {list(residual.shape)}")


def check_passed(passed: torch.Tensor | None, m: int, k: int) -> None:
    if passed is not None and (passed.dtype != torch.uint8 or tuple(passed.shape) != (m, -(-k // 8))):
        raise ValueError(
            f"passed must be uint8 [{m}, {-(-k // 8)}], one bit per input, got {passed.dtype} {list(passed.shape)}"
        )


def check_position(position: torch.Tensor | None, out_shape: tuple) -> None:
    if position is None:
        return
    try:
        fits = torch.broadcast_shapes(position.shape, out_shape) == torch.Size(out_shape)
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(f"position must broadcast to {list(out_shape)}, got {list(position.shape)}")


def check_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mode: str) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_float(name, tensor)
        if tensor.dim() != 4:
            raise ValueError(f"{name} must be [batch, heads, length, head_dim], got {list(tensor.shape)}")
    if k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q, k, v do not fit: {list(q.shape)}, {list(k.shape)}, {list(v.shape)}")
    if mode not in ("per_token", "per_tensor"):
        raise ValueError(f"mode must be 'per_token' or 'per_tensor', got {mode!r}")


def check_ids(ids: torch.Tensor, num_embeddings: int) -> None:
    if ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"ids must be int64 or int32, got {ids.dtype}")
    # Rows past num_embeddings exist as padding: an id that reads them must not pass unnoticed.
    if ids.device.type == "cpu" and ids.numel():
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= num_embeddings:
            raise IndexError(f"ids must be in 0..{num_embeddings - 1}, got {low}..{high}")
