"""Calls of the compiled core that are written down instead of made, to be run together later: a decode step on a CPU.

With `into=tape`, `cpu_gemm.gemm` and `embedding`, `cpu_norm.layernorm_quantize`, `cpu_attention.qattention_decode` and
`quantize_into_cache`, and those of `cpu_token` check their operands, return the tensors that will hold their results,
and append themselves. `run` then makes all the calls over whatever stands in the operands, with the bits of the calls
made one by one.
"""

from __future__ import annotations

import torch

from dqkernels.kernels import native


class Tape:
    """Calls in their order, and the memory that they read and write.

    Results of a layer lie where those of the layer before the last one lay: only the next layer reads them.

    Attributes:
        core: `_C.CpuStep`.

    Raises:
        RuntimeError: where the core is absent.
    """

    def __init__(self):
        self.core = native.require("CpuStep").CpuStep()
        self._kept: list[torch.Tensor] = []
        self._own_bytes = 0
        self._results: list[list[torch.Tensor]] = [[], []]
        self._layer, self._next = 0, 0
        self._rows = 0

    def next_layer(self) -> None:
        """What follows belongs to another layer."""
        self._layer, self._next = self._layer + 1, 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A contiguous tensor for a result of the layer that is written down."""
        results, at = self._results[self._layer % 2], self._next
        self._next += 1
        if at < len(results) and results[at].dtype == dtype and results[at].numel() == torch.Size(shape).numel():
            return results[at].view(shape)
        made = torch.empty(shape, dtype=dtype)
        if at < len(results):
            self.keep(results[at], own=True)  # of an earlier layer that is made otherwise
            results[at] = made
        else:
            results.append(made)
        return made

    def keep(self, *tensors: torch.Tensor | None, own: bool = False) -> None:
        """Operands, whose memory must outlive the tape. own: nobody else has them, so that they count in its bytes."""
        for tensor in tensors:
            if tensor is not None:
                self._kept.append(tensor.detach())  # a parameter's memory may be exchanged under it
                self._own_bytes += tensor.nbytes if own else 0

    @property
    def pool_bytes(self) -> int:
        """Of the results, and what lies between two calls."""
        return self._own_bytes + sum(each.nbytes for results in self._results for each in results)

    def set_rows(
        self, tokens: torch.Tensor, positions: torch.Tensor, lengths: torch.Tensor, ancestors: torch.Tensor | None
    ) -> None:
        """What `run` writes where it is given tokens: int64 [rows], int32 [rows] twice, int32 [rows, capacity] or None,
        all contiguous.

        Raises:
            ValueError: for another dtype, shape or layout.
        """
        rows, capacity = tokens.numel(), (1 << 31) - 1 if ancestors is None else ancestors.shape[-1]
        wanted = {"tokens": (tokens, torch.int64, (rows,)), "positions": (positions, torch.int32, (rows,))}
        wanted |= {"lengths": (lengths, torch.int32, (rows,))}
        if ancestors is not None:
            wanted["ancestors"] = (ancestors, torch.int32, (rows, capacity))
        for name, (tensor, dtype, shape) in wanted.items():
            if tensor.dtype != dtype or tuple(tensor.shape) != shape or not tensor.is_contiguous():
                found = f"{tensor.dtype} {list(tensor.shape)} of strides {list(tensor.stride())}"
                raise ValueError(f"{name} must be {dtype} {list(shape)}, contiguous, got {found}")
        self.keep(*(tensor for tensor, _, _ in wanted.values()))
        addresses = (tokens.data_ptr(), positions.data_ptr(), lengths.data_ptr())
        self._rows = rows
        self.core.set_rows(rows, capacity, *addresses, 0 if ancestors is None else ancestors.data_ptr())

    def run(self, tokens: torch.Tensor | None = None, position: int = 0, wants_best: bool = False) -> None:
        """Makes all calls, with as many threads as torch would take.

        Args:
            tokens: int64 [rows] contiguous, all at `position`: written with it into what `set_rows` was given, first.
            wants_best: whether `finish_logits` finds the largest.

        Raises:
            ValueError: for tokens of another dtype, shape or layout; a length, position or ancestor outside the caches.
            IndexError: for a token or position that an embedding has no row for.
        """
        if tokens is None:
            self.core.run(torch.get_num_threads(), 0, 0, wants_best)
        else:
            if tokens.dtype != torch.int64 or tokens.shape != (self._rows,) or not tokens.is_contiguous():
                found = f"{tokens.dtype} {list(tokens.shape)} of strides {list(tokens.stride())}"
                raise ValueError(f"tokens must be torch.int64 [{self._rows}], contiguous, got {found}")
            self.core.run(torch.get_num_threads(), tokens.data_ptr(), position, wants_best)
