"""Greedy search and sampling over a `Step`: the tokens, scores and random draws of transformers' `_sample`."""

from __future__ import annotations

from typing import Any

import torch

from dqkernels.decode.step import Step
from dqkernels.decode.stopping import Stop, processor, silent


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
    process, unheard, stop = processor(processors), silent(processors), Stop(criteria)
    step.wants_best = not config.do_sample
    step.processors = tuple(dict.fromkeys(type(each).__name__ for each in processors))
    keeps_scores = config.return_dict_in_generate and config.output_scores
    keeps_logits = config.return_dict_in_generate and config.output_logits
    scores = () if keeps_scores else None
    raw = () if keeps_logits else None
    pad = None if config._pad_token_tensor is None else config._pad_token_tensor.to(ids.device)
    keeps = keeps_scores or keeps_logits
    if step.finds_best and not config.do_sample and stop.simple and not keeps:
        return _greedy(step, ids, process, unheard, stop, pad, streamer), None, None
    keeps = keeps or len(processors) > 0
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
        logits = step.step(tokens, ids.shape[1] - 1, keeps)
    if streamer is not None:
        streamer.end()
    return ids, scores, raw


def _greedy(step: Step, ids, process, unheard, stop: Stop, pad, streamer) -> torch.Tensor:
    """The same for a step that finds the largest logit itself, and where nobody asks for more than tokens: with as
    little between two steps as possible. `unheard`: of `stopping.silent`."""
    # Behind a step nothing of torch's lies in the processor's caches: a call of it takes many times what it does alone.
    length, running = ids.shape[1], [True] * ids.shape[0]
    ends = {token for each in stop.ends for token in each.reshape(-1).tolist()}
    padding = None if pad is None else int(pad)
    written: list[list[int]] = []  # of each step, behind `ids`

    def so_far() -> torch.Tensor:
        nonlocal ids
        if written:
            ids = torch.cat([ids, torch.tensor(written, dtype=torch.int64).t()], dim=1)
            written.clear()
        return ids

    logits = step.prefill(ids)
    while True:
        tokens = torch.argmax(logits, dim=-1) if step.best is None else step.best
        chosen = tokens.tolist()
        if not unheard(length, chosen):
            tokens = torch.argmax(process(so_far(), logits.clone()), dim=-1)
            chosen = tokens.tolist()
        if stop.pads and not all(running):
            chosen = [token if going else padding for token, going in zip(chosen, running, strict=True)]
            tokens = torch.tensor(chosen, dtype=torch.int64)
        written.append(chosen)
        length += 1
        if streamer is not None:
            streamer.put(tokens.clone())  # the next step writes over them
        if stop.most is not None and length >= stop.most:
            break
        if ends:
            running = [going and token not in ends for going, token in zip(running, chosen, strict=True)]
            if not any(running):
                break
        logits = step.step(tokens, length - 1, keep=False)
    if streamer is not None:
        streamer.end()
    return so_far()
