"""What the ops refuse at the door: one sentence each, with the argument, the value found and the value wanted."""

from __future__ import annotations

import torch

from dqkernels import packing, qmath, reference
from dqkernels.config import GROUP_SIZES, QUANTIZERS_BY_BITS, WEIGHT_GRANULARITIES

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: 127 * 127 * 1040 < 2^24: up to here the reference's fp32 product of two int8 vectors is an exact integer.
MAX_HEAD_DIM = 1040


def given(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """None for an empty tensor: what an op returns in place of nothing is taken as nothing."""
    return None if tensor is None or tensor.numel() == 0 else tensor


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
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size must be one of {list(GROUP_SIZES)}, got {group_size!r}")
    if bias is not None:
        check_float("bias", bias)
        if tuple(bias.shape) != (out_features,):
            raise ValueError(f"bias must be [{out_features}], got {list(bias.shape)}")
    if activation not in reference.ACTIVATIONS:
        raise ValueError(f"activation must be one of {list(reference.ACTIVATIONS)}, got {activation!r}")
    if out_dtype not in FLOAT_DTYPES:
        raise ValueError(f"out_dtype must be float32, float16 or bfloat16, got {out_dtype}")


def check_width(x: torch.Tensor, in_features: int) -> None:
    """What the op cannot see: K stands there padded to a multiple of 128, and a few values more or less would fit."""
    if x.shape[-1:] != (in_features,):
        raise ValueError(f"input must be [..., in_features={in_features}], got {list(x.shape)}")


def check_norm(weight: torch.Tensor, bias: torch.Tensor | None, k: int) -> None:
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        check_float(name, tensor)
        if tuple(tensor.shape) != (k,):
            raise ValueError(f"{name} must be [{k}], got {list(tensor.shape)}")


def check_residual(residual: torch.Tensor | None, out_shape: tuple) -> None:
    if residual is not None:
        check_float("residual", residual)
        if tuple(residual.shape) != tuple(out_shape):
            raise ValueError(f"residual must be {list(out_shape)}, got {list(residual.shape)}")


def check_passed(passed: torch.Tensor | None, m: int, k: int) -> None:
    if passed is not None and (passed.dtype != torch.uint8 or tuple(passed.shape) != (m, -(-k // 8))):
        raise ValueError(
            f"passed must be uint8 [{m}, {-(-k // 8)}], one bit per input, got {passed.dtype} {list(passed.shape)}"
        )


def check_step(step: torch.Tensor, weight: torch.Tensor) -> None:
    rows = weight.shape[0]
    if weight.dim() != 2 or step.dtype != torch.float32 or step.dim() != 1 or step.numel() not in (1, rows):
        raise ValueError(
            f"step must be float32 [{rows}], one per row of weight, or [1], got {step.dtype} {list(step.shape)} for "
            f"weight {list(weight.shape)}"
        )


def check_master(
    weight: torch.Tensor,
    log_step: torch.Tensor | None,
    weight_scale: torch.Tensor,
    group_size: int,
    k: int | None = None,
) -> None:
    """The float weight and the learned steps that packed codes were made of; `k` of its columns where that is known."""
    check_float("weight", weight)
    if weight.dim() != 2 or (k is not None and weight.shape[1] != k):
        raise ValueError(
            f"weight must be the master matrix [N, {'K' if k is None else k}] of the codes, got shape "
            f"{list(weight.shape)}"
        )
    if log_step is None:
        return
    if group_size != -1:
        raise ValueError(f"log_step needs group_size=-1, got {group_size}: learned steps are per row or per matrix")
    if log_step.dtype != torch.float32 or log_step.shape != weight_scale.shape:
        raise ValueError(
            f"log_step must be float32 {list(weight_scale.shape)}, as weight_scale, got {log_step.dtype} "
            f"{list(log_step.shape)}"
        )


def check_position(position: torch.Tensor | None, out_shape: tuple) -> None:
    if position is not None:
        check_float("position", position)
        check_broadcast("position", position, out_shape)


def check_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    mode: str,
    clip: float | None,
) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_float(name, tensor)
        if tensor.dim() != 4:
            raise ValueError(f"{name} must be [batch, heads, length, head_dim], got {list(tensor.shape)}")
    if k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q, k, v do not fit: {list(q.shape)}, {list(k.shape)}, {list(v.shape)}")
    _check_attention_sizes(q, k.shape[2], mode, clip)
    scores = (*q.shape[:3], k.shape[2])
    check_mask(mask, scores)
    check_bias(bias, scores)


def check_attention_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    k_scale: torch.Tensor,
    v_cache: torch.Tensor,
    v_scale: torch.Tensor,
    lengths: torch.Tensor,
    source: torch.Tensor | None,
    bias: torch.Tensor | None,
    mode: str,
    clip: float | None,
) -> None:
    check_float("q", q)
    if q.dim() != 4:
        raise ValueError(f"q must be [rows, heads, queries, head_dim], got {list(q.shape)}")
    rows, heads, queries, head_dim = q.shape
    _check_caches(heads, head_dim, k_cache, k_scale, v_cache, v_scale)
    caches, capacity = k_cache.shape[0], k_cache.shape[2]
    _check_attention_sizes(q, capacity, mode, clip)
    if lengths.dtype != torch.int32 or tuple(lengths.shape) != (rows,):
        raise ValueError(f"lengths must be int32 [{rows}], got {lengths.dtype} {list(lengths.shape)}")
    if source is None and caches != rows:
        raise ValueError(f"source must name the cache of each row: q has {rows} rows, k_cache {caches} caches")
    if source is not None and (source.dtype != torch.int32 or tuple(source.shape) not in ((rows,), (rows, capacity))):
        raise ValueError(
            f"source must be int32 [{rows}], or [{rows}, {capacity}] with a cache per key, "
            f"got {source.dtype} {list(source.shape)}"
        )
    # On a GPU a look at the values would wait for it; there a length counts as capacity at most.
    if lengths.device.type == "cpu" and rows and (int(lengths.min()) < 0 or int(lengths.max()) > capacity):
        raise ValueError(f"lengths must be in 0..{capacity}, got {int(lengths.min())}..{int(lengths.max())}")
    if source is not None and source.device.type == "cpu" and rows:
        # Of a row of keys, what is not visible yet may hold anything.
        named = source if source.dim() == 1 else source[torch.arange(capacity) < lengths.unsqueeze(1)]
        if named.numel() and (int(named.min()) < 0 or int(named.max()) >= caches):
            raise IndexError(f"source must be in 0..{caches - 1}, got {int(named.min())}..{int(named.max())}")
    check_bias(bias, (*q.shape[:3], capacity))


def _check_caches(
    heads: int,
    head_dim: int,
    k_cache: torch.Tensor,
    k_scale: torch.Tensor,
    v_cache: torch.Tensor,
    v_scale: torch.Tensor,
) -> None:
    for name, cache, scale in (("k", k_cache, k_scale), ("v", v_cache, v_scale)):
        if cache.dtype != torch.int8 or cache.dim() != 4 or (cache.shape[1], cache.shape[3]) != (heads, head_dim):
            raise ValueError(
                f"{name}_cache must be int8 [caches, {heads}, capacity, {head_dim}], "
                f"got {cache.dtype} {list(cache.shape)}"
            )
        if cache.shape != k_cache.shape:
            raise ValueError(f"k_cache and v_cache differ: {list(k_cache.shape)}, {list(v_cache.shape)}")
        if scale.dtype != torch.float32 or scale.shape != cache.shape[:3]:
            raise ValueError(
                f"{name}_scale must be float32 {list(cache.shape[:3])}, got {scale.dtype} {list(scale.shape)}"
            )


def check_cache_write(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    k_scale: torch.Tensor,
    v_cache: torch.Tensor,
    v_scale: torch.Tensor,
    position: torch.Tensor | None,
    act_mode: str,
    clip: float | None,
) -> None:
    for name, x in (("k", k), ("v", v)):
        check_float(name, x)
        if x.dim() != 4:
            raise ValueError(f"{name} must be [rows, heads, tokens, head_dim], got {list(x.shape)}")
    if k.shape != v.shape or k.dtype != v.dtype:
        raise ValueError(f"k and v differ: {k.dtype} {list(k.shape)}, {v.dtype} {list(v.shape)}")
    rows, heads, tokens, head_dim = k.shape
    _check_caches(heads, head_dim, k_cache, k_scale, v_cache, v_scale)
    caches, capacity = k_cache.shape[0], k_cache.shape[2]
    _check_attention_sizes(k, capacity, act_mode, clip, "act_mode")
    for name, tensor in (("k_cache", k_cache), ("k_scale", k_scale), ("v_cache", v_cache), ("v_scale", v_scale)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, it is written in place: got strides {list(tensor.stride())}")
    if caches < rows or capacity < tokens:
        raise ValueError(
            f"k_cache must have a cache for each of {rows} rows and room for {tokens} tokens, got {list(k_cache.shape)}"
        )
    if position is None:
        return
    if act_mode == "per_tensor":
        raise ValueError(
            "act_mode='per_tensor' needs position=None: its one scale is that of all keys, and adding some changes it"
        )
    if position.dtype != torch.int32 or tuple(position.shape) != (rows,):
        raise ValueError(f"position must be int32 [{rows}], got {position.dtype} {list(position.shape)}")
    # On a GPU a look at the values would wait for it; there nothing is written outside.
    if position.device.type == "cpu" and rows:
        low, high, last = int(position.min()), int(position.max()), capacity - tokens
        if low < 0 or high > last:
            raise IndexError(
                f"position must be in 0..{last} for {tokens} tokens in {capacity} places, got {low}..{high}"
            )


def check_attention_backward(
    grad: torch.Tensor,
    q8: torch.Tensor,
    q_scale: torch.Tensor,
    k8: torch.Tensor,
    k_scale: torch.Tensor,
    v8: torch.Tensor,
    v_scale: torch.Tensor,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    passed: tuple[torch.Tensor | None, ...],
    want_bias: bool,
    out_dtype: torch.dtype,
) -> None:
    check_float("grad", grad)
    if grad.dim() != 4 or q8.shape != grad.shape:
        raise ValueError(
            f"grad and q8 must be [batch, heads, queries, head_dim], got {list(grad.shape)} and {list(q8.shape)}"
        )
    batch, heads, queries, head_dim = grad.shape
    for name, codes, scale in (("q", q8, q_scale), ("k", k8, k_scale), ("v", v8, v_scale)):
        fits = codes.dim() == 4 and (*codes.shape[:2], codes.shape[3]) == (batch, heads, head_dim)
        if codes.dtype != torch.int8 or not fits:
            raise ValueError(
                f"{name}8 must be int8 [{batch}, {heads}, length, {head_dim}], got {codes.dtype} {list(codes.shape)}"
            )
        if scale.dtype != torch.float32 or scale.shape != codes.shape[:3]:
            raise ValueError(
                f"{name}_scale must be float32 {list(codes.shape[:3])}, got {scale.dtype} {list(scale.shape)}"
            )
    if k8.shape != v8.shape:
        raise ValueError(f"k8 and v8 differ: {list(k8.shape)}, {list(v8.shape)}")
    keys = k8.shape[2]
    _check_attention_sizes(grad, keys, "per_token", None)
    check_mask(mask, (batch, heads, queries, keys))
    check_bias(bias, (batch, heads, queries, keys))
    if want_bias and bias is None:
        raise ValueError("want_bias=True needs the bias whose gradient is wanted, got bias=None")
    for bits, codes in zip(passed, (q8, k8, v8), strict=True):
        check_passed(bits, codes.shape[:3].numel(), head_dim)
    if out_dtype not in FLOAT_DTYPES:
        raise ValueError(f"out_dtype must be float32, float16 or bfloat16, got {out_dtype}")


def _check_attention_sizes(q: torch.Tensor, keys: int, mode: str, clip: float | None, name: str = "mode") -> None:
    if not 0 < q.shape[3] <= MAX_HEAD_DIM:
        raise ValueError(f"head_dim must be 1..{MAX_HEAD_DIM}, where q . k is exact in fp32, got {q.shape[3]}")
    if keys > qmath.MAX_K:
        raise ValueError(f"at most {qmath.MAX_K} keys keep the int32 sums exact, got {keys}")
    if mode not in ("per_token", "per_tensor"):
        raise ValueError(f"{name} must be 'per_token' or 'per_tensor', got {mode!r}")
    check_clip(clip)


def check_mask(mask: torch.Tensor | None, shape: tuple) -> None:
    if mask is not None:
        if mask.dtype != torch.bool:
            raise ValueError(f"mask must be bool, True where a key is visible, got {mask.dtype}")
        check_broadcast("mask", mask, shape)


def check_bias(bias: torch.Tensor | None, shape: tuple) -> None:
    if bias is not None:
        check_float("bias", bias)
        check_broadcast("bias", bias, shape)


def check_broadcast(name: str, tensor: torch.Tensor, shape: tuple) -> None:
    try:
        fits = torch.broadcast_shapes(tensor.shape, shape) == torch.Size(shape)
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(f"{name} must broadcast to {list(shape)}, got {list(tensor.shape)}")


def check_ids(ids: torch.Tensor, num_embeddings: int) -> None:
    if ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"ids must be int64 or int32, got {ids.dtype}")
    # Rows past num_embeddings exist as padding: an id that reads them must not pass unnoticed.
    if ids.device.type == "cpu" and ids.numel():
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= num_embeddings:
            raise IndexError(f"ids must be in 0..{num_embeddings - 1}, got {low}..{high}")
