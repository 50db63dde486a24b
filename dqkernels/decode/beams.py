"""Beam search over a `Step`: the hypotheses, scores and random draws of transformers' `_beam_search`.

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

from dqkernels.decode.step import Step
from dqkernels.decode.stopping import Stop, processor

#: What lowers a score out of reach.
_LOW = -1e9


@dataclass
class Found:
    """The outcome of a search.

    Attributes:
        sequences: int64 [sources * wanted, tokens], with the first tokens.
        scores: fp32 [sources * wanted], of whole hypotheses.
        beams: int32 [sources * wanted, new tokens], the row that each token was taken from, -1 behind the end; None
            where it was not asked for.
        step_scores, logits: per step fp32 [rows, vocabulary], as tuples, or None.
    """

    sequences: torch.Tensor
    scores: torch.Tensor
    beams: torch.Tensor | None
    step_scores: tuple[torch.Tensor, ...] | None
    logits: tuple[torch.Tensor, ...] | None


def search(step: Step, ids: torch.Tensor, processors: Any, criteria: Any, config: Any) -> Found:
    """The `config.num_return_sequences` best hypotheses of each source.

    Args:
        step: over caches in which the sources stand, made for beams.
        ids: int64 [sources * num_beams, tokens], the first tokens, the same for all beams of a source.
        processors, criteria: lists of transformers.
        config: the call's GenerationConfig.
    """
    process, stop = processor(processors), Stop(criteria)
    keeps_scores = config.return_dict_in_generate and config.output_scores
    keeps_logits = config.return_dict_in_generate and config.output_logits
    step_scores = () if keeps_scores else None
    raw = () if keeps_logits else None
    hypotheses = _Hypotheses(ids, config)
    logits = step.prefill(ids)
    while True:
        if keeps_logits:
            raw += (logits.clone(),)
        scores = process(hypotheses.rows(), torch.log_softmax(logits, dim=-1))
        if keeps_scores:
            step_scores += (scores.clone(),)
        parents, tokens = hypotheses.extend(scores, stop, step_scores)
        if hypotheses.ended:
            break
        step.reorder(parents)
        logits = step.step(tokens, hypotheses.length - 1, keep=False)
    return Found(*hypotheses.best(config.num_return_sequences), step_scores, raw)


@functools.cache
def _sorts_what_it_draws() -> bool:
    """Whether this transformers puts sampled candidates in order before the first of them may end; since 5.24."""
    import transformers

    return tuple(int(part) for part in transformers.__version__.split(".")[:2]) >= (5, 24)


class _Hypotheses:
    """Running and finished hypotheses of all sources.

    Attributes:
        length: tokens of the running ones.
        ended: whether the search is over.
    """

    def __init__(self, ids: torch.Tensor, config: Any):
        beams, device = config.num_beams, ids.device
        sources = ids.shape[0] // beams
        self.beams, self.start, self.length = beams, ids.shape[1], ids.shape[1]
        self.early, self.penalty = config.early_stopping, config.length_penalty
        self.most, self.samples = config.max_length, config.do_sample
        self.sorts = _sorts_what_it_draws()
        ends = config._eos_token_tensor
        # Enough that `beams` go on even if every best one of each end of sequence does not.
        self.kept = max(2, 1 + (0 if ends is None else ends.shape[0])) * beams
        filling = -1 if ends is None else int(config._pad_token_tensor or ends[0])

        self.running = ids.reshape(sources, beams, -1)
        # Of each token the row that it was taken from; only where the caller wants to know.
        self.came_from = None
        if config.return_dict_in_generate:
            self.came_from = torch.empty((sources, beams, 0), dtype=torch.int64, device=device)
        # All beams of a source are the same at first: one is the best, the others stand aside.
        self.scores = torch.zeros((sources, beams), device=device)
        self.scores[:, 1:] = _LOW

        self.finished = torch.full((sources, beams, self.most), filling, dtype=torch.int64, device=device)
        self.finished[:, :, : self.start] = self.running
        self.finished_from = None
        if self.came_from is not None:
            self.finished_from = torch.full((sources, beams, self.most - self.start), -1, device=device)
        self.finished_scores = torch.full((sources, beams), _LOW, device=device)
        self.is_finished = torch.zeros((sources, beams), dtype=torch.bool, device=device)
        self.finished_lengths = torch.zeros((sources, beams), dtype=torch.int64, device=device)
        self.improvable = torch.ones((sources, 1), dtype=torch.bool, device=device)

        self.first_rows = torch.arange(sources, device=device).unsqueeze(1) * beams
        self.may_finish = torch.arange(self.kept, device=device) < beams
        self.ended = False

    def rows(self) -> torch.Tensor:
        """The running ones, int64 [rows, length]."""
        return self.running.reshape(-1, self.length)

    def extend(self, scores: torch.Tensor, stop: Stop, step_scores: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes one token further.

        Args:
            scores: fp32 [rows, vocabulary], log-probabilities of the next token.
            step_scores: what stopping criteria are told.

        Returns:
            The row that each new running one goes on from, and its last token; int64 [rows].
        """
        values, beam, token = self._candidates(scores)
        self.length += 1
        ends = self._ends(beam, token, stop, step_scores)

        # Those that end cannot go on, as long as there are enough others.
        open_scores = values + ends.to(torch.float32) * _LOW
        chosen = torch.topk(open_scores, k=self.beams)[1]
        before, before_from = self.running, self.came_from
        parent, last = beam.gather(1, chosen), token.gather(1, chosen)
        self.scores = open_scores.gather(1, chosen)
        self.running = torch.cat([_pick(before, parent), last.unsqueeze(2)], dim=2)
        rows = parent + self.first_rows
        if before_from is not None:
            self.came_from = torch.cat([_pick(before_from, parent), rows.unsqueeze(2)], dim=2)

        self._finish(values, ends, beam, token, before, before_from)
        self.improvable &= self._may_improve()
        going = self.improvable.any() & ~ends.all()
        if self.early is True:
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
        vocabulary = scores.shape[-1]
        total = (scores.view(-1, self.beams, vocabulary) + self.scores.unsqueeze(2)).flatten(1)
        if self.samples:
            index = torch.multinomial(torch.softmax(total, dim=-1), num_samples=self.kept)
            values = total.gather(1, index)
            if self.sorts:
                values, order = values.sort(dim=-1, descending=True)
                index = index.gather(1, order)
        else:
            values, index = torch.topk(total, k=self.kept)
        return values, index // vocabulary, index % vocabulary

    def _ends(self, beam: torch.Tensor, token: torch.Tensor, stop: Stop, step_scores: Any) -> torch.Tensor:
        """Which candidates end here: bool [sources, kept]."""
        if stop.simple:
            return stop.quick(token, self.length)
        written = torch.cat([_pick(self.running, beam), token.unsqueeze(2)], dim=2)
        return stop.criteria(written.flatten(0, 1), step_scores).view(token.shape)

    def _finish(self, values, ends, beam, token, before, before_from) -> None:
        """Puts candidates that end among the finished ones, where they are better. before: what they extend."""
        new = self.length - self.start
        finishing = ends & self.may_finish
        values = values / (new**self.penalty)
        if self.early is True:
            values += self.is_finished.all(dim=-1, keepdim=True).to(torch.float32) * _LOW
        values += (~self.improvable).to(torch.float32) * _LOW
        values += (~finishing).to(torch.float32) * _LOW
        all_scores = torch.cat([self.finished_scores, values], dim=1)
        chosen = torch.topk(all_scores, k=self.beams)[1]
        self.finished_scores = all_scores.gather(1, chosen)
        # Number `beams + i` is candidate i: beam[i] of the running ones, with one token more.
        is_new = chosen >= self.beams
        if self.running.device.type == "cpu" and not bool(is_new.any()):
            if torch.equal(chosen, torch.arange(self.beams).expand_as(chosen)):
                return
        candidate = (chosen - self.beams).clamp_(min=0)
        index = torch.where(is_new, self.beams + beam.gather(1, candidate), chosen)
        self.is_finished = torch.cat([self.is_finished, finishing], dim=1).gather(1, chosen)
        lengths = self.finished_lengths.gather(1, chosen.clamp(max=self.beams - 1))
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
        out = _pick(torch.cat([finished, padded], dim=1), index)
        if at < out.shape[2]:
            out[:, :, at] = torch.where(is_new, last, out[:, :, at])
        return out

    def _may_improve(self) -> torch.Tensor:
        """Whether the best running one could still beat the worst finished one; bool [sources, 1]."""
        new = self.length - self.start
        if self.early == "never" and self.penalty > 0.0:
            new = self.most - self.start
        possible = self.scores[:, :1] / (new**self.penalty)
        worst = self.finished_scores.min(dim=1, keepdim=True)[0]
        worst = torch.where(self.is_finished, worst, _LOW)
        return (possible > worst).any(dim=-1, keepdim=True)


def _pick(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """x [sources, n, ...], index [sources, m] -> [sources, m, ...]."""
    return x.gather(1, index.unsqueeze(2).expand(-1, -1, x.shape[2]))
