"""Torch tensors in and out of the compiled core's attention on a CPU, and of what fills its caches. No arithmetic here.

Operands go in with the strides they have; what has no strides that the core reads (a row whose elements are not
adjacent, memory that is not aligned) is copied first.
"""

from __future__ import annotations

import torch

from dqkernels.kernels import native
from dqkernels.kernels.cpu_step import Tape


def qattention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    causal: bool,
    softmax_scale: float,
    mode: str,
    clip: float | None,
) -> torch.Tensor:
    """Attention [batch, heads, queries, head_dim] in q's dtype; arguments as in `reference.qattention`.

    Raises:
        ValueError: for operands that are not on the CPU or of different float types.
        RuntimeError: where the core is absent.
    """
    core = native.require("attention")
    _check(q=q, k=k, v=v, mask=mask, bias=bias)
    batch, heads, queries, head_dim = q.shape
    keys = k.shape[2]
    if not q.dtype == k.dtype == v.dtype:
        wide = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
        return qattention(*(x.to(wide) for x in (q, k, v)), mask, bias, causal, softmax_scale, mode, clip).to(q.dtype)
    scores = (batch, heads, queries, keys)
    out = torch.empty(q.shape, dtype=q.dtype)
    q, k, v = native.adjacent(q), native.adjacent(k), native.adjacent(v)
    mask, bias = _expanded(mask, scores), _expanded(bias, scores)
    core.attention(
        *(_operand(x) for x in (q, k, v)),
        None if mask is None else (mask.data_ptr(), 3, mask.stride()),
        None if bias is None else _operand(bias),
        out.data_ptr(),
        (*scores, head_dim),
        causal,
        softmax_scale,
        native.MODES[mode],
        0.0 if clip is None else clip,
        torch.get_num_threads(),
    )
    return out


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
    into: Tape | None = None,
) -> torch.Tensor:
    """Attention [rows, heads, queries, head_dim] in q's dtype; arguments as in `reference.qattention_decode`.

    Caches and scales may have any strides, as long as the elements of a key are adjacent; else they are copied.
    into: write the call down there.

    Raises:
        ValueError: for operands that are not on the CPU, or lengths or sources outside the caches.
        RuntimeError: where the core is absent.
    """
    core = native.require("attention_decode")
    _check(q=q, k_cache=k_cache, k_scale=k_scale, v_cache=v_cache, v_scale=v_scale, lengths=lengths, source=source,
           bias=bias)  # fmt: skip
    rows, heads, queries, head_dim = q.shape
    capacity = k_cache.shape[2]
    out = (torch if into is None else into).empty(q.shape, dtype=q.dtype)
    q, k_cache, v_cache = native.adjacent(q), native.adjacent(k_cache), native.adjacent(v_cache)
    lengths = lengths.contiguous()
    source = None if source is None else source.contiguous()
    bias = _expanded(bias, (rows, heads, queries, capacity))
    core.attention_decode(
        _operand(q),
        _cache(k_cache, k_scale),
        _cache(v_cache, v_scale),
        k_cache.shape[0],
        lengths.data_ptr(),
        0 if source is None else source.data_ptr(),
        source is not None and source.dim() == 2,
        None if bias is None else _operand(bias),
        out.data_ptr(),
        (rows, heads, queries, capacity, head_dim),
        causal,
        softmax_scale,
        native.MODES[mode],
        0.0 if clip is None else clip,
        torch.get_num_threads(),
        None if into is None else into.core,
    )
    if into is not None:
        into.keep(q, k_cache, k_scale, v_cache, v_scale, lengths, source, bias)
    return out


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
    into: Tape | None = None,
) -> None:
    """Writes codes and scales of k and v into the caches; arguments as in `reference.quantize_into_cache`.

    into: write the call down there.

    Raises:
        ValueError: for operands that are not on the CPU, caches that cannot be written in place, or a position outside.
        RuntimeError: where the core is absent.
    """
    core = native.require("cache_write")
    _check(k=k, v=v, k_cache=k_cache, k_scale=k_scale, v_cache=v_cache, v_scale=v_scale, position=position)
    for name, tensor in (("k_cache", k_cache), ("v_cache", v_cache)):
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{name} is written in place: elements of a key must be adjacent, got {tensor.stride()}")
    k, v = native.adjacent(k), native.adjacent(v)
    position = None if position is None else position.contiguous()
    core.cache_write(
        _operand(k),
        _operand(v),
        _cache(k_cache, k_scale),
        _cache(v_cache, v_scale),
        k_cache.shape[0],
        k_cache.shape[2],
        0 if position is None else position.data_ptr(),
        tuple(k.shape),
        native.MODES[mode],
        0.0 if clip is None else clip,
        torch.get_num_threads(),
        None if into is None else into.core,
    )
    if into is not None:
        into.keep(k, v, k_cache, k_scale, v_cache, v_scale, position)


def _check(**operands: torch.Tensor | None) -> None:
    for name, tensor in operands.items():
        if tensor is not None:
            native.check_device(name, tensor, "cpu")


def _aligned(x: torch.Tensor) -> torch.Tensor:
    # A tensor over a foreign buffer may begin anywhere.
    return x.clone(memory_format=torch.contiguous_format) if x.data_ptr() % x.element_size() else x


def _expanded(x: torch.Tensor | None, shape: tuple[int, ...]) -> torch.Tensor | None:
    """x with stride 0 where it is broadcast."""
    return None if x is None else _aligned(x).expand(shape)


def _operand(x: torch.Tensor) -> tuple:
    strides = x.stride()
    return x.data_ptr(), native.DTYPES[x.dtype], strides if strides[3] == 1 or x.shape[3] != 1 else (*strides[:3], 1)


def _cache(codes: torch.Tensor, scale: torch.Tensor) -> tuple:
    return codes.data_ptr(), codes.stride()[:3], scale.data_ptr(), scale.stride()
