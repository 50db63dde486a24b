"""Decode attention in CUDA: torch tensors in and out of `_C.AttentionPlan`. No arithmetic here.

A plan (sizes, strides, options, how the work is cut up) is made once per kind of call and kept; a call then allocates
its output, and where the plan asks for it a workspace, and hands over addresses, so that it can stand in a CUDA graph.
"""

from __future__ import annotations

import contextlib
import functools

import torch

from . import native
from .counters import zeros

MAX_HEAD_DIM = 128
#: Rows of a cache are read four bytes at a time at least.
DIM_STEP = 4
_FORMS = {"rule": 0, "keep": 1, "redo": 2}
_HERE = contextlib.nullcontext()


def qattention_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    k_scale: torch.Tensor,
    v_cache: torch.Tensor,
    v_scale: torch.Tensor,
    lengths: torch.Tensor,
    source: torch.Tensor | None,
    bias: torch.Tensor | None,
    causal: bool,
    softmax_scale: float,
    mode: str,
    clip: float | None,
    *,
    form: str = "rule",
    splits: int = 0,
    warps: int = 0,
) -> torch.Tensor:
    """Attention [rows, heads, queries, head_dim] in q's dtype; arguments as in `reference.qattention_decode`.

    A length above the capacity counts as the capacity; a row whose `source` is no cache becomes NaN, and so does a
    query that sees a key whose `source` is none. Caches and scales that are not contiguous are copied.

    Args:
        form, splits, warps: how the work is cut up (attention_shape.h); by its rule where they are left. Results do
            not depend on it.

    Raises:
        ValueError: for a head_dim that `supports` refuses, tensors on other devices, or a cut that is not to be had.
    """
    if q.numel() == 0 or k_cache.numel() == 0:
        return q.new_zeros(q.shape)
    device = _device_of(q)
    named = {"k_cache": k_cache, "k_scale": k_scale, "v_cache": v_cache, "v_scale": v_scale, "lengths": lengths,
             "source": source, "bias": bias}  # fmt: skip
    for name, tensor in named.items():
        if tensor is not None and tensor.get_device() != device:
            raise ValueError(f"{name} must be on {q.device} like q, got {tensor.device}")
    rows, heads, queries, head_dim = q.shape
    caches, _, capacity, _ = k_cache.shape
    with torch.cuda.device(device) if device != torch.cuda.current_device() else _HERE:
        if q.stride(3) != 1 and head_dim > 1:
            q = q.contiguous()
        k_cache, v_cache = _rows(k_cache), _rows(v_cache)
        k_scale, v_scale, lengths = k_scale.contiguous(), v_scale.contiguous(), lengths.contiguous()
        source = None if source is None else source.contiguous()
        bias_dtype, bias_stride = torch.float32, (0, 0, 0, 0)
        if bias is not None:
            bias_dtype, bias_stride = bias.dtype, bias.expand(rows, heads, queries, capacity).stride()
        plan = _plan(
            (rows, heads, queries, head_dim, caches, capacity),
            (q.dtype, q.stride()[:3], (k_cache.data_ptr() | v_cache.data_ptr()) % 16 == 0),
            0 if source is None else source.dim(),
            (bias_dtype, bias_stride),
            (causal, softmax_scale, mode, 0.0 if clip is None else clip),
            (form, splits, warps),
            device,
        )
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        stream = torch._C._cuda_getCurrentRawStream(device)
        workspace = counters = 0
        if plan.workspace_bytes:
            room = torch.empty(plan.workspace_bytes, dtype=torch.uint8, device=q.device)  # lives until this is queued
            workspace = room.data_ptr()
        if plan.counter_bytes:
            arrivals = zeros(q.device, stream, plan.counter_bytes)
            counters = arrivals.data_ptr()
        plan.run(
            q.data_ptr(),
            k_cache.data_ptr(),
            k_scale.data_ptr(),
            v_cache.data_ptr(),
            v_scale.data_ptr(),
            lengths.data_ptr(),
            0 if source is None else source.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            out.data_ptr(),
            workspace,
            counters,
            stream,
        )
    return out


def _device_of(q: torch.Tensor) -> int:
    device = q.get_device()
    if device < 0:
        raise ValueError(f"q must be on cuda, got {q.device}")
    return device


def _rows(cache: torch.Tensor) -> torch.Tensor:
    """Contiguous, and on 4 bytes."""
    cache = cache.contiguous()
    return cache if cache.data_ptr() % DIM_STEP == 0 else cache.clone()


@functools.lru_cache(maxsize=4096)
def _plan(sizes, q, source_dim, bias, options, cut, device):
    rows, heads, queries, head_dim, caches, capacity = sizes
    dtype, q_stride, aligned = q
    causal, softmax_scale, mode, clip = options
    return native.require("AttentionPlan").AttentionPlan(
        dtype=native.DTYPES[dtype],
        rows=rows,
        heads=heads,
        queries=queries,
        head_dim=head_dim,
        caches=caches,
        capacity=capacity,
        q_stride=list(q_stride),
        aligned=aligned,
        shared=source_dim == 1,
        by_key=source_dim == 2,
        bias_dtype=native.DTYPES[bias[0]],
        bias_stride=list(bias[1]),
        causal=causal,
        softmax_scale=softmax_scale,
        mode=native.MODES[mode],
        clip=clip,
        form=_FORMS[cut[0]],
        splits=cut[1],
        warps=cut[2],
        sms=torch.cuda.get_device_properties(device).multi_processor_count,
    )
