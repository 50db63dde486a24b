"""The hypotheses of a beam search on a CPU, in the compiled core: those of `hypotheses`, bit by bit.

The core finds the candidates in the scores without writing their sums down, in the order of `torch.topk`, and takes all
sources one token further in a second call. Neither takes as long as one call of torch.
"""

from __future__ import annotations

from typing import Any

import torch

from dqkernels.decode.hypotheses import LOW, Rules, draw, pick
from dqkernels.decode.stopping import Stop
from dqkernels.kernels import cpu_beams, native

#: Up to here a whole number is the same as a float.
_EXACT = 2**53


def why_not() -> str | None:
    """Why no search of this process is the core's, in words; None where they are."""
    if native.native() is None:
        return native.why_absent()
    if not hasattr(native.native(), "CpuBeams"):
        return "dqkernels._C was built without CpuBeams"
    if not cpu_beams.orders_as_torch():
        return "this torch orders equal scores in another way"
    return None


def why_not_this(ids: torch.Tensor, scores: torch.Tensor, rules: Rules, stop: Stop) -> str | None:
    """Why this search is not the core's where others are, in words: it needs scores in fp32, a limit, and a penalty
    that gives floats. scores: the first ones, on a CPU."""
    start, penalty = ids.shape[1], rules.penalty
    if scores.dtype != torch.float32:
        return f"a processor made the scores {str(scores.dtype).removeprefix('torch.')}"
    if stop.most is None or not start < stop.most <= rules.most:
        return "the stopping criteria give no limit of the length, or one that max_length does not allow"
    if isinstance(penalty, float) or type(penalty) is int and (penalty < 1 or rules.most**penalty < _EXACT):
        return None
    return f"length_penalty is {penalty!r}"


class NativeHypotheses:
    """As `hypotheses.Hypotheses`."""

    def __init__(self, ids: torch.Tensor, rules: Rules, stop: Stop):
        self.rules, self.stop, self.start = rules, stop, ids.shape[1]
        ends = [token for each in stop.ends for token in each.reshape(-1).tolist()] if stop.simple else []
        sizes = (rules.beams, rules.kept, rules.most, rules.filling)
        self.found = found = cpu_beams.Beams(ids.to(torch.int64).contiguous(), *sizes, ends, rules.tracks)
        # All beams of a source are the same at first: one is the best, the others stand aside.
        found.scores[:, 1:] = LOW
        found.finished_scores.fill_(LOW)
        self.ended = False

    @property
    def length(self) -> int:
        """Tokens of the running ones."""
        return self.found.length

    def rows(self) -> torch.Tensor:
        """The running ones, int64 [rows, length]."""
        return self.found.running[:, :, : self.length].flatten(0, 1).contiguous()

    def extend(self, scores: torch.Tensor, step_scores: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes one token further.

        Args:
            scores: fp32 [rows, vocabulary], log-probabilities of the next token.
            step_scores: what stopping criteria are told.

        Returns:
            The row that each new running one goes on from, and its last token; int64 [rows], written over by the next
            call.
        """
        rules, found = self.rules, self.found
        if rules.samples:
            n = scores.shape[-1]
            total = (scores.view(-1, rules.beams, n) + found.scores.unsqueeze(2)).flatten(1)
            values, index = draw(total, rules.kept)
            found.value.copy_(values), found.beam.copy_(index // n), found.token.copy_(index % n)
        else:
            found.choose(scores.contiguous())
        ends, length = None, self.length + 1
        if not self.stop.simple:
            written = pick(found.running[:, :, : length - 1], found.beam)
            written = torch.cat([written, found.token.unsqueeze(2)], dim=2)
            ends = self.stop.criteria(written.flatten(0, 1), step_scores).view(found.token.shape).contiguous()
        new = length - self.start
        divisors = rules.divisor(new), rules.best_divisor(new, self.start)
        all_end = self.stop.simple and length >= self.stop.most
        self.ended = not found.extend(ends, all_end, *divisors, rules.early is True)
        return found.parents, found.tokens

    def best(self, wanted: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """sequences, scores and origins of the best `wanted` ones of each source, cut at the longest."""
        found = self.found
        longest = int(found.finished_lengths[:, :wanted].max())
        sequences = found.finished[:, :wanted, : self.start + longest].flatten(0, 1)
        came_from = found.finished_from
        if came_from is not None:
            came_from = came_from[:, :wanted, :longest].flatten(0, 1)
        return sequences, found.finished_scores[:, :wanted].flatten(), came_from
