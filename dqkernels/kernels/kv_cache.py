"""Quantizing new keys and values into the int8 caches of decoding, in Triton: both in one launch.

The quantizer is that of attention.py, so that decoding over a cache gives the bits of attention without one.

Importing this file imports Triton; nothing imports it when the package is imported.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .attention import _load_rows, _quantize_tile, _unit_stride, amax_bits, padded_dim
from .launch import Launcher
from .quantize import device_of

BLOCK = 16  # (row, head, token) triples of one program


@triton.jit
def _write(
    x_ptr, stride_b, stride_h, stride_t, cache_ptr, scale_ptr, amax_bits_ptr, position_ptr, clip, count, heads, tokens,
    capacity, head_dim, VALUE: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of rows of K or of V; the parameters are those of the kernel."""
    item = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = item < count
    token, head, row = item % tokens, item // tokens % heads, item // tokens // heads
    at = token
    if position_ptr is not None:
        at += tl.load(position_ptr + row, mask=inside, other=0)
        inside = inside & (at >= 0) & (at < capacity)
    row, head, token = row.to(tl.int64), head.to(tl.int64), token.to(tl.int64)
    x_rows = x_ptr + row * stride_b + head * stride_h + token * stride_t
    codes, scale = _quantize_tile(_load_rows(x_rows, inside, head_dim, 1.0, DIM), amax_bits_ptr, clip)
    if VALUE:
        # The scale 1 of a zero row would become vs_max and round the other keys' c away.
        scale = tl.where((tl.max(tl.abs(codes), 1) == 0) & (scale == scale), 0.0, scale)
    place = (row * heads + head) * capacity + at
    tl.store(scale_ptr + place, scale, mask=inside)
    dims = tl.arange(0, DIM)
    inside = inside[:, None] & (dims < head_dim)[None, :]
    tl.store(cache_ptr + place[:, None] * head_dim + dims[None, :], codes.to(tl.int8), mask=inside)


@triton.jit
def _write_kernel(
    k_ptr,  # float [rows, heads, tokens, head_dim] by strides
    v_ptr,  # float, as k_ptr with strides of its own
    k_cache_ptr,  # int8 [caches, heads, capacity, head_dim] contiguous
    k_scale_ptr,  # fp32 [caches, heads, capacity] contiguous
    v_cache_ptr,  # int8, as k_cache_ptr
    v_scale_ptr,  # fp32, as k_scale_ptr
    position_ptr,  # int32 [rows], or None: from 0 on
    k_amax_bits_ptr,  # int32 [1] for per_tensor, else None
    v_amax_bits_ptr,  # likewise
    clip,  # fp32, +inf for none
    count,  # rows * heads * tokens
    heads,
    tokens,
    capacity,
    head_dim,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_vb,
    stride_vh,
    stride_vt,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block of (row, head, token) of K for programs (i, 0), of V for programs (i, 1)."""
    if tl.program_id(1) == 0:
        _write(k_ptr, stride_kb, stride_kh, stride_kt, k_cache_ptr, k_scale_ptr, k_amax_bits_ptr, position_ptr, clip,
               count, heads, tokens, capacity, head_dim, False, DIM, BLOCK)  # fmt: skip
    else:
        _write(v_ptr, stride_vb, stride_vh, stride_vt, v_cache_ptr, v_scale_ptr, v_amax_bits_ptr, position_ptr, clip,
               count, heads, tokens, capacity, head_dim, True, DIM, BLOCK)  # fmt: skip


_write_both = Launcher(_write_kernel)


def quantize_into_cache(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    k_scale: torch.Tensor,
    v_cache: torch.Tensor,
    v_scale: torch.Tensor,
    position: torch.Tensor | None,
    mode: str,
    clip: float | None,
) -> None:
    """Writes codes and scales of k and v; arguments as in `reference.quantize_into_cache`, k and v in any strides.

    A token whose place lies outside the cache is not written.

    Raises:
        ValueError: for a head_dim above 128.
    """
    rows, heads, tokens, head_dim = k.shape
    dim, count = padded_dim(head_dim), rows * heads * tokens
    if count == 0:
        return
    k, v = _unit_stride(k), _unit_stride(v)
    per_tensor = mode == "per_tensor"
    with device_of(k):
        _write_both(
            (triton.cdiv(count, BLOCK), 2),
            k,
            v,
            k_cache,
            k_scale,
            v_cache,
            v_scale,
            None if position is None else position.contiguous(),
            amax_bits(k, 1.0) if per_tensor else None,
            amax_bits(v, 1.0) if per_tensor else None,
            float("inf") if clip is None else float(clip),
            count,
            heads,
            tokens,
            k_cache.shape[2],
            head_dim,
            *k.stride()[:3],
            *v.stride()[:3],
            DIM=dim,
            BLOCK=BLOCK,
            num_warps=4,
        )
