"""The hypotheses of a beam search in plain torch, on any device: what `native_hypotheses` is compared with.

A hypothesis is a row of tokens. Running ones are re-gathered by their parents once per step; candidates, of which there
are two or more times as many, are never written out, unless somebody's stopping criterion reads them. Scores follow
transformers' arithmetic operation by operation: a hypothesis that must not win is lowered by 1e9, and which one wins
where all are that low depends on the rounding.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from dqkernels.decode.stopping import Stop

#: What lowers a score out of reach.
LOW = -1e9


@functools.cache
def _sorts_what_it_draws() -> bool:
    """Whether this transformers puts sampled candidates in order before the first of them may end; since 5.24."""
    import transformers

    return tuple(int(part) for part in transformers.__version__.split(".")[:2]) >= (5, 24)


@dataclass(frozen=True)
class Rules:
    """What a call's GenerationConfig says about its hypotheses.

    Attributes:
        beams: of a source.
        kept: candidates of a source.
        most: tokens that a hypothesis may come to.
        filling: what stands behind the end of one.
        early, penalty: `early_stopping` and `length_penalty`.
        samples: whether candidates are drawn.
        tracks: whether somebody wants to know the row that each token was taken from.
    """

    beams: int
    kept: int
    most: int
    filling: int
    early: bool | str
    penalty: float
    samples: bool
    tracks: bool

    @classmethod
    def of(cls, config: Any) -> Rules:
        ends = config._eos_token_tensor
        return cls(
            beams=config.num_beams,
            # Enough that `beams` go on even if every best one of each end of sequence does not.
            kept=max(2, 1 + (0 if ends is None else ends.shape[0])) * config.num_beams,
            most=config.max_length,
            filling=-1 if ends is None else int(config._pad_token_tensor or ends[0]),
            early=config.early_stopping,
            penalty=config.length_penalty,
            samples=config.do_sample,
            tracks=config.return_dict_in_generate,
        )

    def divisor(self, new: int) -> float:
        """Of the score of a hypothesis that ends with `new` tokens."""
        return new**self.penalty

    def best_divisor(self, new: int, start: int) -> float:
        """Of the best score that may still come, behind `new` tokens and `start` first ones."""
        if self.early == "never" and self.penalty > 0.0:
            new = self.most - start
        return new**self.penalty


def draw(total: torch.Tensor, kept: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`kept` of total [sources, n], by their probabilities and without replacement: values and places."""
    index = torch.multinomial(torch.softmax(total, dim=-1), num_samples=kept)
    values = total.gather(1, index)
    if _sorts_what_it_draws():
        values, order = values.sort(dim=-1, descending=True)
        index = index.gather(1, order)
    return values, index


class Hypotheses:
    """Running and finished hypotheses of all sources.

    Attributes:
        length: tokens of the running ones.
        ended: whether the search is over.
    """

    def __init__(self, ids: torch.Tensor, rules: Rules, stop: Stop):
        beams, device = rules.beams, ids.device
        sources = ids.shape[0] // beams
        self.rules, self.stop = rules, stop
        self.start, self.length = ids.shape[1], ids.shape[1]

        self.running = ids.reshape(sources, beams, -1)
        # Of each token the row that it was taken from; only where the caller wants to know.
        self.came_from = None
        if rules.tracks:
            self.came_from = torch.empty((sources, beams, 0), dtype=torch.int64, device=device)
        # All beams of a source are the same at first: one is the best, the others stand aside.
        self.scores = torch.zeros((sources, beams), device=device)
        self.scores[:, 1:] = LOW

        self.finished = torch.full((sources, beams, rules.most), rules.filling, dtype=torch.int64, device=device)
        self.finished[:, :, : self.start] = self.running
        self.finished_from = None
        if self.came_from is not None:
            self.finished_from = torch.full((sources, beams, rules.most - self.start), -1, device=device)
        self.finished_scores = torch.full((sources, beams), LOW, device=device)
        self.is_finished = torch.zeros((sources, beams), dtype=torch.bool, device=device)
        self.finished_lengths = torch.zeros((sources, beams), dtype=torch.int64, device=device)
        self.improvable = torch.ones((sources, 1), dtype=torch.bool, device=device)

        self.first_rows = torch.arange(sources, device=device).unsqueeze(1) * beams
        self.may_finish = torch.arange(rules.kept, device=device) < beams
        self.ended = False

    def rows(self) -> torch.Tensor:
        """The running ones, int64 [rows, length]."""
        return self.running.reshape(-1, self.length)

    def extend(self, scores: torch.Tensor, step_scores: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes one token further.

        Args:
            scores: fp32 [rows, vocabulary], log-probabilities of the next token.
            step_scores: what stopping criteria are told.

        Returns:
            The row that each new running one goes on from, and its last token; int64 [rows].
        """
        values, beam, token = self._candidates(scores)
        self.length += 1
        ends = self._ends(beam, token, step_scores)

        # Those that end cannot go on, as long as there are enough others.
        open_scores = values + ends.to(torch.float32) * LOW
        chosen = torch.topk(open_scores, k=self.rules.beams)[1]
        before, before_from = self.running, self.came_from
        parent, last = beam.gather(1, chosen), token.gather(1, chosen)
        self.scores = open_scores.gather(1, chosen)
        self.running = torch.cat([pick(before, parent), last.unsqueeze(2)], dim=2)
        rows = parent + self.first_rows
        if before_from is not None:
            self.came_from = torch.cat([pick(before_from, parent), rows.unsqueeze(2)], dim=2)

        self._finish(values, ends, beam, token, before, before_from)
        self.improvable &= self._may_improve()
        going = self.improvable.any() & ~ends.all()
        if self.rules.early is True:
            going &= ~self.is_finished.all()
        self.ended = not bool(going)
        return rows.view(-1), last.view(-1)

    def best(self, wanted: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """sequences, scores and origins of the best `wanted` ones of each source, cut at the longest."""
        longest = int(self.finished_lengths[:, :wanted].max())
        sequences = self.finished[:, :wanted, : self.start + longest].flatten(0, 1)
        came_from = self.finished_from
        if came_from is not None:
            came_from = came_from[:, :wanted, :longest].flatten(0, 1).to(torch.int32)
        return sequences, self.finished_scores[:, :wanted].flatten(), came_from

    # ---- inside ---------------------------------------------------------------------------------------------

    def _candidates(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The best, or drawn, continuations over all beams of a source: scores, beams and tokens [sources, kept]."""
        vocabulary, kept = scores.shape[-1], self.rules.kept
        total = (scores.view(-1, self.rules.beams, vocabulary) + self.scores.unsqueeze(2)).flatten(1)
        values, index = draw(total, kept) if self.rules.samples else torch.topk(total, k=kept)
        return values, index // vocabulary, index % vocabulary

    def _ends(self, beam: torch.Tensor, token: torch.Tensor, step_scores: Any) -> torch.Tensor:
        """Which candidates end here: bool [sources, kept]."""
        if self.stop.simple:
            return self.stop.quick(token, self.length)
        written = torch.cat([pick(self.running, beam), token.unsqueeze(2)], dim=2)
        return self.stop.criteria(written.flatten(0, 1), step_scores).view(token.shape)

    def _finish(self, values, ends, beam, token, before, before_from) -> None:
        """Puts candidates that end among the finished ones, where they are better. before: what they extend."""
        new = self.length - self.start
        finishing = ends & self.may_finish
        values = values / self.rules.divisor(new)
        if self.rules.early is True:
            values += self.is_finished.all(dim=-1, keepdim=True).to(torch.float32) * LOW
        values += (~self.improvable).to(torch.float32) * LOW
        values += (~finishing).to(torch.float32) * LOW
        all_scores = torch.cat([self.finished_scores, values], dim=1)
        chosen = torch.topk(all_scores, k=self.rules.beams)[1]
        self.finished_scores = all_scores.gather(1, chosen)
        # Number `beams + i` is candidate i: beam[i] of the running ones, with one token more.
        is_new = chosen >= self.rules.beams
        if self.running.device.type == "cpu" and not bool(is_new.any()):
            if torch.equal(chosen, torch.arange(self.rules.beams).expand_as(chosen)):
                return
        candidate = (chosen - self.rules.beams).clamp_(min=0)
        index = torch.where(is_new, self.rules.beams + beam.gather(1, candidate), chosen)
        self.is_finished = torch.cat([self.is_finished, finishing], dim=1).gather(1, chosen)
        lengths = self.finished_lengths.gather(1, chosen.clamp(max=self.rules.beams - 1))
        self.finished_lengths = torch.where(is_new, new, lengths)
        self.finished = self._merged(self.finished, before, index, is_new, token.gather(1, candidate))
        if before_from is not None:
            row = beam.gather(1, candidate) + self.first_rows
            self.finished_from = self._merged(self.finished_from, before_from, index, is_new, row)

    @staticmethod
    def _merged(finished, running, index, is_new, last) -> torch.Tensor:
        """[sources, beams, most]: of `finished` [.., most] and `running` [.., length] the ones that `index` names, with
        `last` behind those that are new."""
        at = running.shape[2]
        # What stands behind the end of a new one is what stands behind that of the first finished one: nothing yet.
        padded = torch.cat([running, finished[:, :, at:]], dim=2)
        out = pick(torch.cat([finished, padded], dim=1), index)
        if at < out.shape[2]:
            out[:, :, at] = torch.where(is_new, last, out[:, :, at])
        return out

    def _may_improve(self) -> torch.Tensor:
        """Whether the best running one could still beat the worst finished one; bool [sources, 1]."""
        divisor = self.rules.best_divisor(self.length - self.start, self.start)
        possible = self.scores[:, :1] / divisor
        worst = self.finished_scores.min(dim=1, keepdim=True)[0]
        worst = torch.where(self.is_finished, worst, LOW)
        return (possible > worst).any(dim=-1, keepdim=True)


def pick(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """x [sources, n, ...], index [sources, m] -> [sources, m, ...]."""
    return x.gather(1, index.unsqueeze(2).expand(-1, -1, x.shape[2]))
