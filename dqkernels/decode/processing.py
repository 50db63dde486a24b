"""Logits processors of a beam search: those of transformers that summaries use, in place and only where they speak up.

Each of them is a few scores of a row, and as transformers has it a copy of all rows or two. The numbers are the same.
Any other is called as transformers calls it, at every step, and named (`Processing.outside`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from dqkernels.decode.stopping import SPEAKS, is_known, is_plain
from dqkernels.kernels import cpu_beams, native

#: (length, rows, scores), the last one written.
Short = Callable[[int, Callable[[], torch.Tensor], torch.Tensor], None]


class Processing:
    """`LogitsProcessorList` as a function of the length, the rows so far and their scores.

    Args:
        processors: the list.

    Attributes:
        outside: names of the classes that are called themselves.
        hands_out: whether somebody else is called with the scores, who may keep what it was given.
    """

    def __init__(self, processors: Any):
        # A list of the user's, or one member that asks for more: its own errors, and whatever it does.
        self._whole: Any = None if is_plain(processors) else processors
        # Those that are one step, that step, and whether they are transformers'.
        self._members: list[tuple[list[Any], Short | None, bool]] = []
        for each in processors:
            short = None if self._whole is not None else _short(each)
            before = self._members[-1] if self._members else ([], None, False)
            if isinstance(short, _NoEnd) and isinstance(before[1], _NoEnd):
                before[0].append(each)
                before[1].members += short.members
            else:
                self._members.append(([each], short, is_known(each)))
        called = [type(each).__name__ for some, short, _ in self._members if short is None for each in some]
        self.outside = tuple(dict.fromkeys(called))
        self.hands_out = self._whole is not None or bool(called)

    def __call__(self, length: int, rows: Callable[[], torch.Tensor], scores: torch.Tensor) -> torch.Tensor:
        """The processed scores.

        Args:
            length: tokens so far.
            rows: gives them, int64 [rows, length].
            scores: fp32 [rows, vocabulary], of nobody else's: they may be written.
        """
        if self._whole is not None:
            return self._whole(rows(), scores)
        ours = scores.device.type == "cpu"
        for some, short, known in self._members:
            if short is None or scores.device.type != "cpu" or scores.dtype != torch.float32:
                for each in some:
                    scores = each(rows(), scores)
                ours = ours and known  # a user's may keep what it was given, or returns
                continue
            if not ours or not scores.is_contiguous():
                scores, ours = scores.clone(memory_format=torch.contiguous_format), True
            short(length, rows, scores)
        return scores


def _short(each: Any) -> Short | None:
    """What a processor does in place; None where that is not known."""
    make = _SHORT.get(type(each).__name__)
    return make(each) if make is not None and is_known(each) else None


def _force(each: Any, wanted: Any) -> Short:
    speaks = SPEAKS[type(each).__name__]

    def run(length, rows, scores):
        if speaks(each, length):
            scores.fill_(-math.inf)
            scores[:, wanted] = 0

    return run


class _NoEnd:
    """Minimal lengths, one after the other: the ends of sequence that each of them takes away are taken at once."""

    def __init__(self, each: Any):
        self.members = [(SPEAKS[type(each).__name__], each, each.eos_token_id.reshape(-1).tolist())]

    def __call__(self, length: int, rows: Any, scores: torch.Tensor) -> None:
        taken = {token for speaks, each, ends in self.members if speaks(each, length) for token in ends}
        for token in taken:
            if 0 <= token < scores.shape[1]:
                scores.numpy()[:, token] = -math.inf  # quicker than torch's


def _no_repeat(each: Any) -> Short | None:
    if native.native() is None or not hasattr(native.native(), "ban_repeats"):
        return None
    return lambda length, rows, scores: cpu_beams.ban_repeats(rows().to(torch.int64), each.ngram_size, scores)


_SHORT: dict[str, Callable[[Any], Short | None]] = {
    "ForcedBOSTokenLogitsProcessor": lambda each: _force(each, each.bos_token_id),
    "ForcedEOSTokenLogitsProcessor": lambda each: _force(each, each.eos_token_id),
    "MinLengthLogitsProcessor": _NoEnd,
    "MinNewTokensLengthLogitsProcessor": _NoEnd,
    "NoRepeatNGramLogitsProcessor": _no_repeat,
}
