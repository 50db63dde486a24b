"""Beam search over a `Step`: the hypotheses, scores and random draws of transformers' `_beam_search`.

Hypotheses are kept by the compiled core where a step runs there (`native_hypotheses`), else by torch (`hypotheses`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dqkernels.decode import native_hypotheses
from dqkernels.decode.hypotheses import Hypotheses, Rules
from dqkernels.decode.native_hypotheses import NativeHypotheses
from dqkernels.decode.processing import Processing
from dqkernels.decode.step import Step
from dqkernels.decode.stopping import Stop


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
    process, stop = Processing(processors), Stop(criteria)
    step.processors = process.outside
    keeps_scores = config.return_dict_in_generate and config.output_scores
    keeps_logits = config.return_dict_in_generate and config.output_logits
    step_scores = () if keeps_scores else None
    raw = () if keeps_logits else None
    length, rows, hypotheses = ids.shape[1], lambda: ids, None
    logits = step.prefill(ids)
    while True:
        if keeps_logits:
            raw += (logits.clone(),)
        # In place, where nobody is given what the next step writes over: fresh memory would be twice as much for the
        # caches of a CPU.
        place = logits if logits.device.type == "cpu" and not process.hands_out else None
        scores = process(length, rows, torch.log_softmax(logits, dim=-1, out=place))
        if keeps_scores:
            step_scores += (scores.clone(),)
        if hypotheses is None:
            hypotheses = _hypotheses(step, ids, scores, Rules.of(config), stop)
            rows = hypotheses.rows
        parents, tokens = hypotheses.extend(scores, step_scores)
        if hypotheses.ended:
            break
        length = hypotheses.length
        step.reorder(parents)
        logits = step.step(tokens, length - 1, keep=False)
    return Found(*hypotheses.best(config.num_return_sequences), step_scores, raw)


def _hypotheses(
    step: Step, ids: torch.Tensor, scores: torch.Tensor, rules: Rules, stop: Stop
) -> Hypotheses | NativeHypotheses:
    """Those that keep up with this step. scores: the first ones; a processor may have made float64 of them."""
    if not step.on_core or native_hypotheses.why_not() is not None:
        return Hypotheses(ids, rules, stop)
    step.beams_by_torch = native_hypotheses.why_not_this(ids, scores, rules, stop) or ""
    return (Hypotheses if step.beams_by_torch else NativeHypotheses)(ids, rules, stop)
