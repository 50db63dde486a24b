"""Greedy search and sampling over a `Step`: the tokens, scores and random draws of transformers' `_sample`."""

from __future__ import annotations

from typing import Any

import torch

from dqkernels.decode.step import Step
from dqkernels.decode.stopping import Stop, processor


def sample(step: Step, ids: torch.Tensor, processors: Any, criteria: Any, config: Any, streamer: Any = None):
    """Writes one token per row and step, until every row has ended.

    Args:
        step: over caches in which the sources stand.
        ids: int64 [rows, tokens], the first tokens.
        processors, criteria: lists of transformers.
        config: the call's GenerationConfig.
        streamer: of transformers, or None.

    Returns:
        ids with what was written, int64 [rows, ...]; and per step the scores and the raw logits, fp32
        [rows, vocabulary], as tuples, None where they were not asked for.
    """
    process, stop = processor(processors), Stop(criteria)
    keeps_scores = config.return_dict_in_generate and config.output_scores
    keeps_logits = config.return_dict_in_generate and config.output_logits
    scores = () if keeps_scores else None
    raw = () if keeps_logits else None
    pad = None if config._pad_token_tensor is None else config._pad_token_tensor.to(ids.device)
    running = torch.ones(ids.shape[0], dtype=torch.bool, device=ids.device)
    logits = step.prefill(ids)
    while True:
        chosen = process(ids, logits)
        if keeps_scores:
            scores += (chosen,)
        if keeps_logits:
            raw += (logits,)
        if config.do_sample:
            tokens = torch.multinomial(torch.softmax(chosen, dim=-1), num_samples=1).squeeze(1)
        else:
            tokens = torch.argmax(chosen, dim=-1)
        if stop.pads:
            tokens = torch.where(running, tokens, pad)
        ids = torch.cat([ids, tokens.unsqueeze(1)], dim=1)
        ended = stop.quick(tokens, ids.shape[1]) if stop.simple else stop.criteria(ids, scores)
        running = running & ~ended
        if streamer is not None:
            streamer.put(tokens.cpu())
        if not bool(running.any()):
            break
        logits = step.step(tokens, ids.shape[1] - 1)
    if streamer is not None:
        streamer.end()
    return ids, scores, raw
