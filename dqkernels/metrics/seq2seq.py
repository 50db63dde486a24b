"""Scores of generated ids, in the form in which `Seq2SeqTrainer` asks for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from dqkernels.metrics import bleu as bleu_scores
from dqkernels.metrics import rouge as rouge_scores

KINDS = ("rouge", "bleu")
#: The scores of each kind; the best model is the one of the highest.
SCORES = {"rouge": rouge_scores.SUMMARY_TYPES, "bleu": ("bleu", "chrf")}


def compute_metrics_for(tokenizer, kind: str = "rouge") -> Callable[[Any], dict[str, float]]:
    """A `compute_metrics` for `predict_with_generate`.

    Args:
        tokenizer: turns ids into texts; special tokens, padding and -100 are left out.
        kind: `rouge` gives rouge1, rouge2, rougeL and rougeLsum; `bleu` gives bleu and chrf (0..100 all).

    Returns:
        a function of `(predictions, label_ids)`, integer arrays `[pairs, length]`, that adds `gen_len`: the mean
        number of generated tokens, without the start token and padding. Its attribute `signature` says what the
        figures are made with.

    Raises:
        ValueError: for an unknown kind, or predictions that are no ids (`predict_with_generate` is off).
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {list(KINDS)}, got {kind!r}")

    def compute_metrics(prediction: Any) -> dict[str, float]:
        predictions, labels = _unpacked(prediction)
        texts, references = decode(tokenizer, predictions), decode(tokenizer, labels)
        if kind == "rouge":
            scores = dict(rouge_scores.rouge(texts, references, rouge_scores.SUMMARY_TYPES))
        else:
            found = bleu_scores.bleu(texts, references)
            scores = {name: found[name] for name in SCORES[kind]}
        return {**scores, "gen_len": generated_length(predictions, tokenizer.pad_token_id, tokenizer.eos_token_id)}

    compute_metrics.signature = (
        rouge_scores.signature(rouge_scores.SUMMARY_TYPES)
        if kind == "rouge"
        else bleu_scores.bleu(["a"], ["a"])["bleu_signature"]
    )
    return compute_metrics


def _unpacked(prediction: Any) -> tuple[np.ndarray, np.ndarray]:
    if hasattr(prediction, "predictions"):
        predictions, labels = prediction.predictions, prediction.label_ids
    else:
        predictions, labels = prediction
    predictions, labels = (np.asarray(one[0] if isinstance(one, tuple) else one) for one in (predictions, labels))
    if predictions.ndim != 2 or not np.issubdtype(predictions.dtype, np.integer):
        raise ValueError(
            f"predictions must be ids of generated texts, got {predictions.dtype} of shape {predictions.shape}: "
            "predict_with_generate must be on"
        )
    return predictions, labels


def decode(tokenizer, ids: np.ndarray) -> list[str]:
    """Texts of rows of ids; -100 counts as padding."""
    ids = np.where(ids < 0, tokenizer.pad_token_id, ids)
    return [text.strip() for text in tokenizer.batch_decode(ids.tolist(), skip_special_tokens=True)]


def generated_length(ids: np.ndarray, pad: int, eos: int | None) -> float:
    """Mean number of generated tokens, end token included; the first column is the decoder's start token."""
    rows = np.asarray(ids)[:, 1:]
    kept = (rows >= 0) & (rows != pad)
    if pad == eos and rows.shape[1]:
        # The first of the trailing ones is the end that was generated.
        kept |= (rows == eos) & (np.cumsum(rows == eos, axis=1) == 1)
    return float(kept.sum(axis=1).mean())
