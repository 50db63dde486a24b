"""Rows of a packed table as floats, in Triton: the embedding gather, and the whole matrix.

Importing this file imports Triton; nothing imports it when the package is imported.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from .launch import Launcher
from .quantize import device_of
from .rounding import _add, _round_to

_TILE_BYTES = 2048  # packed bytes of a program: 16 for each thread of 4 warps


@triton.jit
def _gather_kernel(
    ids_ptr,  # int [rows], or None: row i of the table is row i of the output
    qweight_ptr,  # uint8 [>= table_rows, row_bytes]
    weight_scale_ptr,  # fp32 [table_rows], or [1] with TENSOR_SCALE
    mult_ptr,  # uint8 [table_rows, groups], or None
    position_ptr,  # float [position_rows, K] contiguous, or None; output row i takes row i % position_rows
    out_ptr,  # float [rows, K] contiguous
    embed_scale,  # fp32
    rows,
    table_rows,
    row_bytes,
    k,
    groups,
    position_rows,
    BITS: tl.constexpr,
    FOUR_LEVEL: tl.constexpr,
    TENSOR_SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BYTES: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    """out = float32(level * multiplier) * weight_scale * embed_scale + position, each step rounded on its own."""
    RUN: tl.constexpr = 16 * BITS  # bytes of a 128-block, and consecutive codes of a plane
    out_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    wanted = out_row < rows
    if ids_ptr is None:
        row = out_row
    else:
        row = tl.load(ids_ptr + out_row, mask=wanted, other=0).to(tl.int64)
    # Eager indexing would stop the device at an id outside the table; here it becomes a row of NaN, read nowhere.
    known = wanted & (row >= 0) & (row < table_rows)
    byte = tl.program_id(1) * BYTES + tl.arange(0, BYTES)
    in_row = known[:, None] & (byte < row_bytes)[None, :]
    packed = tl.load(qweight_ptr + row[:, None] * row_bytes + byte[None, :], mask=in_row, other=0).to(tl.int32)
    if TENSOR_SCALE:
        scale = tl.load(weight_scale_ptr)
    else:
        scale = tl.load(weight_scale_ptr + row, mask=known, other=0.0)[:, None]

    first = byte // RUN * 128 + byte % RUN
    for plane in tl.static_range(8 // BITS):
        col = first + plane * RUN
        inside = known[:, None] & (col < k)[None, :]
        # Into the top bits and back: the arithmetic shift extends the sign.
        level = (packed << (32 - BITS - BITS * plane)) >> (32 - BITS)
        if FOUR_LEVEL:
            level = 2 * level + 1
        if mult_ptr is not None:
            at = row[:, None] * groups + (col // GROUP)[None, :]
            level = level * tl.load(mult_ptr + at, mask=inside, other=0).to(tl.int32)
        t = level.to(tl.float32) * scale
        t = t * embed_scale
        if position_ptr is not None:
            at = (out_row % position_rows)[:, None] * k + col[None, :]
            t = _add(t, tl.load(position_ptr + at, mask=inside, other=0.0).to(tl.float32), USE_ASM)
        t = tl.where(known[:, None], t, float("nan"))
        stored = wanted[:, None] & (col < k)[None, :]
        tl.store(
            out_ptr + out_row[:, None] * k + col[None, :], _round_to(t, out_ptr.dtype.element_ty, USE_ASM), mask=stored
        )


_gather = Launcher(_gather_kernel)


def tile(row_bytes: int) -> dict:
    """ROWS and BYTES of a program for packed rows of row_bytes."""
    byte_count = min(triton.next_power_of_2(row_bytes), _TILE_BYTES)
    return {"ROWS": _TILE_BYTES // byte_count, "BYTES": byte_count}


def _rows(
    ids: torch.Tensor | None,
    qweight: torch.Tensor,
    weight_scale: torch.Tensor,
    group_mult: torch.Tensor | None,
    position: torch.Tensor | None,
    out: torch.Tensor,
    bits: int,
    four_level: bool,
    group_size: int,
    embed_scale: float,
) -> None:
    """Fills out [rows, K] with the rows `ids` of the table, or with its first rows."""
    rows, k = out.shape
    if rows == 0:
        return
    qweight = qweight.contiguous()
    weight_scale = weight_scale.contiguous()
    table_rows, row_bytes = qweight.shape
    if weight_scale.numel() > 1:
        table_rows = min(table_rows, weight_scale.numel())  # the packed table is padded to 16 rows
    shape = tile(row_bytes)
    with device_of(qweight):
        _gather(
            (-(-rows // shape["ROWS"]), -(-row_bytes // shape["BYTES"])),
            ids,
            qweight,
            weight_scale,
            None if group_mult is None else group_mult.contiguous(),
            position,
            out,
            float(embed_scale),
            rows,
            table_rows,
            row_bytes,
            k,
            0 if group_mult is None else group_mult.shape[1],
            0 if position is None else position.shape[0],
            BITS=bits,
            FOUR_LEVEL=four_level,
            TENSOR_SCALE=weight_scale.numel() == 1,
            GROUP=group_size,
            USE_ASM=not _gather.interpreted,
            **shape,
        )


def _position_rows(position: torch.Tensor | None, lead: torch.Size, k: int) -> torch.Tensor | None:
    """position, which broadcasts to [*lead, K], as [rows, K] to be read in turns: only an inner axis costs a copy."""
    if position is None:
        return None
    shape = list(position.shape)
    while shape and len(shape) > 1 and shape[0] == 1:
        shape.pop(0)
    if shape != [*lead, k][-len(shape) :]:
        return position.expand(*lead, k).reshape(-1, k).contiguous()
    return position.reshape(-1, k).contiguous()


def qembedding(
    ids: torch.Tensor,
    qweight: torch.Tensor,
    weight_scale: torch.Tensor,
    group_mult: torch.Tensor | None,
    position: torch.Tensor | None,
    bits: int,
    four_level: bool,
    group_size: int,
    embedding_dim: int,
    embed_scale: float = 1.0,
    out_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Rows of the packed table: `float32(level) * weight_scale`, `* embed_scale`, `+ position`, one rounding.

    Args:
        ids: int [...], any integer type. An id outside the table gives a row of NaN.
        qweight: uint8 [ceil16(V), ceil128(K) * bits / 8]. weight_scale: fp32 [V] or [1].
        group_mult: uint8 [V, ceil(K / group_size)], or None with group_size -1.
        position: float, broadcastable to [..., embedding_dim], or None.

    Returns:
        [..., embedding_dim] in `out_dtype`.
    """
    out = torch.empty(*ids.shape, embedding_dim, dtype=out_dtype, device=ids.device)
    if out.numel():
        added = _position_rows(position, ids.shape, embedding_dim)
        flat = ids.reshape(-1).contiguous()
        rows = out.view(math.prod(ids.shape), embedding_dim)
        _rows(flat, qweight, weight_scale, group_mult, added, rows, bits, four_level, group_size, embed_scale)
    return out


def dequantize_weight(
    qweight: torch.Tensor,
    weight_scale: torch.Tensor,
    group_mult: torch.Tensor | None,
    bits: int,
    four_level: bool,
    group_size: int,
    out_features: int,
    in_features: int,
) -> torch.Tensor:
    """The float matrix of packed weights: fp32 [out_features, in_features]; the arguments as in `qembedding`."""
    out = torch.empty(out_features, in_features, dtype=torch.float32, device=qweight.device)
    _rows(None, qweight, weight_scale, group_mult, None, out, bits, four_level, group_size, 1.0)
    return out
