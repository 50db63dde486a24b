"""What a candidate of `bench generate` owes before it is timed: that it computes the model's function."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dqkernels.bench.generate_candidates import Candidate, Engine

#: Sources and new tokens of a proof: enough for every layer, cache and step.
ROWS, TOKENS = 4, 8
#: Without logits: how far below the best token a chosen one may lie, in standard deviations of the logits there.
MARGIN = 0.3
#: Beams: mean log-probability per token by which a search may be worse than its twin's: the rounding of a logit, as
#: both run the same blocks. Random weights put many texts close together, so more would let in beams that are not
#: reordered.
SCORE_SLACK = {"fp32": 1e-4, "fp16": 3e-3, "bf16": 0.02}
#: A masked logit: what some loops write in place of -inf.
_MASKED = -1e30


def function(
    one: Candidate, inputs: dict, new_tokens: int, reference: Callable[[dict, torch.Tensor], torch.Tensor]
) -> tuple[str | None, float | None]:
    """Why a candidate does not compute the model's function, or None; and the error of its logits.

    It generates greedily; the reference then gives its logits along these very tokens, so that near ties decide
    nothing. Without logits of its own each of its tokens has to be the best there, or as good as.

    Args:
        one: the candidate.
        inputs: `input_ids` and `attention_mask` int64 [batch, source_tokens]; some rows are taken.
        new_tokens: of the work that is to be timed; the proof takes fewer.
        reference: (inputs, tokens [batch, n]) -> logits [batch, n, vocab] of the float32 model.
    """
    part = {name: tensor[:ROWS] for name, tensor in inputs.items()}
    count = min(new_tokens, TOKENS)
    tokens, logits = one.logits(part, count)
    if tokens.shape[1] != count:
        return f"generated {tokens.shape[1]} new tokens, wanted {count}", None
    wanted = one.reference(part, tokens)
    wanted = (reference(part, tokens) if wanted is None else wanted).double()
    if logits is None:
        return margin(tokens, wanted, one.end()), None
    found = logits.to(wanted.device).double()
    if found.shape != wanted.shape:
        return f"logits have shape {list(found.shape)}, the reference's {list(wanted.shape)}", None
    there = ~(found <= _MASKED)  # a NaN is there, and spoils the proof
    if not torch.isfinite(found[there]).all() or int(there.sum()) < 0.9 * there.numel():
        return "logits are not finite", None
    error = float((found - wanted)[there].norm() / wanted[there].norm())
    if not error <= one.bound:
        return f"logits differ from the reference's by {error:.2g}, allowed {one.bound:g}", error
    return None, float(f"{error:.3g}")


def margin(tokens: torch.Tensor, wanted: torch.Tensor, end: int | None) -> str | None:
    """Why greedy tokens [batch, n] are not the best of the logits [batch, n, vocab], or None.

    `end`: the token that no loop may take before the last.
    """
    wanted = wanted.clone()
    if end is not None:
        wanted[..., end] = float("-inf")
    chosen = wanted.gather(-1, tokens.to(wanted.device).unsqueeze(-1)).squeeze(-1)
    spread = wanted.masked_fill(wanted.isinf(), 0).std(dim=-1)
    worst = float(((wanted.amax(dim=-1) - chosen) / spread).max())
    if not worst <= MARGIN:
        return f"a token lies {worst:.2g} deviations of the logits below the reference's best"
    return None


def search(
    one: Engine, inputs: dict, num_beams: int, tokens: torch.Tensor, wanted: torch.Tensor
) -> tuple[str | None, float]:
    """Why an engine's search is not its twin's, or None; and the share of tokens that are equal.

    Where tokens differ it must be a tie that fell the other way: greedy tokens are the reference's best all the same,
    and what a beam search finds is as probable as what the twin's found.

    Args:
        one: the engine.
        inputs: of the timed work.
        num_beams: of the timed work.
        tokens, wanted: its own and its twin's new tokens [batch, new_tokens].
    """
    if tokens.shape != wanted.shape:
        return f"gives tokens {list(tokens.shape)}, Hugging Face's loop {list(wanted.shape)}", 0.0
    tokens = tokens.to(wanted.device)
    share = float((tokens == wanted).double().mean())
    rows = (tokens != wanted).any(dim=1).nonzero().squeeze(1)[:ROWS]
    if len(rows) == 0:
        return None, 1.0
    part = {name: tensor[rows] for name, tensor in inputs.items()}
    mine = one.reference(part, tokens[rows]).double()
    if num_beams == 1:
        reason = margin(tokens[rows], mine, one.end())
    else:
        theirs = one.reference(part, wanted[rows]).double()
        worst = float((_score(theirs, wanted[rows]) - _score(mine, tokens[rows])).max())
        reason = None if worst <= SCORE_SLACK[one.dtype] else f"what it finds is {worst:.2g} per token less probable"
    if reason is not None:
        reason = f"{1 - share:.0%} of the tokens are not those of Hugging Face's loop: {reason}"
    return reason, float(f"{share:.4g}")


def _score(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Mean log-probability per token [batch]."""
    return logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1).mean(dim=1)
