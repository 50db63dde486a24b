"""What only a decode step on a CPU does: torch tensors in and out of `_C.add_position`, `_C.finish_logits`."""

from __future__ import annotations

import torch

from dqkernels.kernels import native
from dqkernels.kernels.cpu_step import Tape


def add_position(
    x: torch.Tensor, factor: float, table: torch.Tensor, positions: torch.Tensor, offset: int, into: Tape | None = None
) -> torch.Tensor:
    """x = x * factor + table[positions + offset], in place: the bits of the two operations of torch.

    Args:
        x: [rows, ..., K] contiguous, fp32, fp16 or bf16; one position per row.
        factor: 1: no step of its own.
        table: [N, K] contiguous, of x's dtype.
        positions: int32 [rows] contiguous.
        offset: of position 0 in the table.
        into: write the call down there instead.

    Returns:
        x.

    Raises:
        ValueError: for operands of another shape, dtype or layout.
        IndexError: for a position that the table has no row for.
        RuntimeError: where the core is absent.
    """
    core = native.require("add_position")
    rows, k = positions.numel(), table.shape[-1]
    if table.dim() != 2 or table.dtype != x.dtype or x.numel() != rows * k or x.shape[-1] != k:
        found = f"{x.dtype} {list(x.shape)}, {table.dtype} {list(table.shape)}, {list(positions.shape)}"
        raise ValueError(f"x must be [rows, ..., K], table [N, K] of its dtype, positions [rows], got {found}")
    if positions.dtype != torch.int32:
        raise ValueError(f"positions must be int32, got {positions.dtype}")
    _check({"x": x, "table": table, "positions": positions})
    core.add_position(
        x=x.data_ptr(),
        dtype=native.DTYPES[x.dtype],
        rows=rows,
        k=k,
        factor=factor,
        table=table.data_ptr(),
        table_rows=table.shape[0],
        position=positions.data_ptr(),
        offset=offset,
        step=None if into is None else into.core,
    )
    if into is not None:
        into.keep(x, table, positions)
    return x


def finish_logits(
    x: torch.Tensor, bias: torch.Tensor | None, rounded: bool, into: Tape | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """x (+ bias) as fp32, and the places of the largest, as `torch.argmax` has them: the first; a NaN is the largest.

    Args:
        x: [rows, ..., N] contiguous, fp32, fp16 or bf16; one row of logits per row.
        bias: [N] contiguous, of a dtype of its own, or None.
        rounded: whether the sum is rounded to x's dtype.
        into: write the call down there instead; it then finds the largest where its `run` is asked for it.

    Returns:
        fp32 [rows, N] and int64 [rows]; the former is x's memory where x is fp32.

    Raises:
        ValueError: for operands of another shape, dtype or layout.
        RuntimeError: where the core is absent.
    """
    core = native.require("finish_logits")
    rows, n = x.numel() // x.shape[-1], x.shape[-1]
    if bias is not None and tuple(bias.shape) != (n,):
        raise ValueError(f"bias must be [{n}], got {list(bias.shape)}")
    _check({"x": x, **({} if bias is None else {"bias": bias})})
    y = x.view(rows, n) if x.dtype == torch.float32 else torch.empty((rows, n), dtype=torch.float32)
    best = torch.zeros(rows, dtype=torch.int64)
    core.finish_logits(
        x=x.data_ptr(),
        dtype=native.DTYPES[x.dtype],
        rows=rows,
        n=n,
        bias=0 if bias is None else bias.data_ptr(),
        bias_dtype=0 if bias is None else native.DTYPES[bias.dtype],
        rounded=rounded,
        y=y.data_ptr(),
        best=best.data_ptr(),
        threads=torch.get_num_threads(),
        step=None if into is None else into.core,
    )
    if into is not None:
        into.keep(x, bias)
        into.keep(best, *([] if x.dtype == torch.float32 else [y]), own=True)
    return y, best


def _check(operands: dict[str, torch.Tensor]) -> None:
    for name, tensor in operands.items():
        native.check_device(name, tensor, "cpu")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {list(tensor.stride())}")
        if name != "positions" and tensor.dtype not in native.DTYPES:
            raise ValueError(f"{name} must be float32, float16 or bfloat16, got {tensor.dtype}")
