"""Beam search behind the scores of a step, in the compiled core: torch tensors in and out of `_C.CpuBeams`."""

from __future__ import annotations

import functools

import torch

from dqkernels.kernels import native


def top_k(x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of x [N] fp32 contiguous and their places: values and int64 indices as `torch.topk` gives them.

    Raises:
        ValueError: for another dtype or layout, or k outside 1..N.
        RuntimeError: where the core is absent.
    """
    core = native.require("top_k")
    _check("x", x, torch.float32, (x.numel(),))
    values, index = torch.empty(max(k, 0)), torch.empty(max(k, 0), dtype=torch.int64)
    core.top_k(x=x.data_ptr(), n=x.numel(), k=k, value=values.data_ptr(), index=index.data_ptr())
    return values, index


@functools.cache
def orders_as_torch() -> bool:
    """Whether equal numbers come in torch's order: it is that of the C++ library that torch was built with, and of the
    algorithm in this torch. Asked once, of rows full of ties, short ones and long ones."""
    if native.native() is None or not hasattr(native.native(), "top_k"):
        return False
    generator = torch.Generator().manual_seed(0)
    for n, k in ((12, 4), (24, 8), (90, 30), (400, 8), (512, 8), (5000, 8), (5000, 60)):
        for levels in (2, 5, 1000):
            x = torch.randint(0, levels, (n,), generator=generator).float()
            if not all(map(torch.equal, top_k(x, k), torch.topk(x, k))):
                return False
    return True


def ban_repeats(tokens: torch.Tensor, size: int, scores: torch.Tensor) -> None:
    """Scores of what would repeat `size` tokens that stand in a row of `tokens` become -inf.

    Args:
        tokens: int64 [rows, length], elements of a row adjacent.
        size: at least 1.
        scores: fp32 [rows, N] contiguous, written.

    Raises:
        ValueError: for operands of another shape, dtype or layout.
        RuntimeError: where the core is absent.
    """
    core = native.require("ban_repeats")
    rows, length = tokens.shape
    if tokens.dtype != torch.int64 or tokens.stride(1) != 1 and length > 1:
        found = f"{tokens.dtype} of strides {list(tokens.stride())}"
        raise ValueError(f"tokens must be torch.int64, elements of a row adjacent, got {found}")
    _check("scores", scores, torch.float32, (rows, scores.shape[-1]))
    native.check_device("tokens", tokens, "cpu")
    stride = tokens.stride(0) if rows > 1 else length
    where = {"tokens": tokens.data_ptr(), "rows": rows, "row_stride": stride, "length": length, "size": size}
    core.ban_repeats(**where, scores=scores.data_ptr(), n=scores.shape[-1])


class Beams:
    """Running and finished hypotheses of all sources, and the candidates of a step.

    Args:
        ids: int64 [sources * beams, tokens], the first tokens, the same for all beams of a source.
        beams: of a source.
        kept: candidates of a source, at least `beams`.
        most: tokens that a hypothesis may come to, more than the first ones.
        filling: what stands behind the end of a finished one.
        end_tokens: those that end one.
        tracks: whether the row is kept that each token was taken from.

    Attributes:
        length: tokens of the running ones.
        running, finished: int64 [sources, beams, most].
        came_from, finished_from: int32 [sources, beams, most - tokens], the latter -1 behind the end; None where
            `tracks` is not set.
        scores, finished_scores: fp32 [sources, beams].
        finished_lengths: int64 [sources, beams], tokens behind the first ones.
        is_finished: bool [sources, beams].
        improvable: bool [sources], whether a running one might still beat a finished one.
        value, beam, token: fp32, int64 and int64 [sources, kept], the candidates.
        parents, tokens: int64 [sources * beams], written by `extend`.

    Raises:
        RuntimeError: where the core is absent.
    """

    def __init__(
        self, ids: torch.Tensor, beams: int, kept: int, most: int, filling: int, end_tokens: list[int], tracks: bool
    ):
        self.core = native.require("CpuBeams")
        rows, start = ids.shape
        shape = sources, _ = rows // beams, beams
        if rows != sources * beams or not start < most or kept < beams:
            found = f"{rows} rows, {start} tokens, beams {beams}, kept {kept}, most {most}"
            raise ValueError(
                f"rows must be sources * beams, kept at least beams, most above the first tokens, got {found}"
            )
        self.kept, self.length = kept, start
        self.running = torch.full((*shape, most), filling, dtype=torch.int64)
        self.running[:, :, :start] = ids.view(*shape, start)
        self.finished = self.running.clone()
        self.came_from = self.finished_from = None
        if tracks:
            self.came_from = torch.full((*shape, most - start), -1, dtype=torch.int32)
            self.finished_from = self.came_from.clone()
        self.scores, self.finished_scores = torch.zeros(shape), torch.zeros(shape)
        self.finished_lengths = torch.zeros(shape, dtype=torch.int64)
        self.is_finished = torch.zeros(shape, dtype=torch.bool)
        self.improvable = torch.ones(sources, dtype=torch.bool)
        self.value = torch.empty((sources, kept))
        self.beam, self.token = (torch.empty((sources, kept), dtype=torch.int64) for _ in range(2))
        self.parents, self.tokens = (torch.empty(rows, dtype=torch.int64) for _ in range(2))
        arrays = ("running", "came_from", "scores", "finished", "finished_from", "finished_scores")
        arrays += ("finished_lengths", "is_finished", "improvable")
        places = {name: _address(getattr(self, name)) for name in arrays}
        sizes = {"sources": sources, "beams": beams, "start": start, "most": most, "filling": filling}
        self.state = self.core.CpuBeams(**sizes, end_tokens=end_tokens, **places)
        self._candidates = (self.value.data_ptr(), self.beam.data_ptr(), self.token.data_ptr())
        self._next = (self.parents.data_ptr(), self.tokens.data_ptr())

    def choose(self, scores: torch.Tensor) -> None:
        """The best continuations of every source become its candidates: the largest of scores [rows, N] fp32
        contiguous, each added to its running one's."""
        sources, beams = self.scores.shape
        _check("scores", scores, torch.float32, (sources * beams, scores.shape[-1]))
        value, beam, token = self._candidates
        self.core.beam_candidates(
            scores=scores.data_ptr(), running=self.scores.data_ptr(), sources=sources, beams=beams,
            n=scores.shape[-1], kept=self.kept, value=value, beam=beam, token=token, threads=torch.get_num_threads(),
        )  # fmt: skip

    def extend(
        self, ends: torch.Tensor | None, all_end: bool, divisor: float, best_divisor: float, early: bool
    ) -> bool:
        """Takes every source one token further, by the arithmetic of transformers; whether the search goes on.

        Args:
            ends: bool [sources, kept] contiguous, which candidates end here; None: those with an end token.
            all_end: all of them do.
            divisor: of the score of one that ends now.
            best_divisor: of the best score that may still come.
            early: a source is done when all its beams have finished.

        Raises:
            ValueError: for `ends` of another dtype, shape or layout; where there is no room for a token more.
            IndexError: for a candidate of a beam that there is not.
        """
        if ends is not None:
            _check("ends", ends, torch.bool, tuple(self.value.shape))
        goes_on = self.state.extend(
            self.length,
            self.kept,
            *self._candidates,
            _address(ends),
            all_end,
            divisor,
            best_divisor,
            early,
            *self._next,
        )
        self.length += 1
        return goes_on


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _check(name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    native.check_device(name, tensor, "cpu")
    if tensor.dtype != dtype or tuple(tensor.shape) != shape or not tensor.is_contiguous():
        found = f"{tensor.dtype} {list(tensor.shape)} of strides {list(tensor.stride())}"
        raise ValueError(f"{name} must be {dtype} {list(shape)}, contiguous, got {found}")
