"""ROUGE F-scores in 0..100 by Google's `rouge-score`, with its stemmer, offline.

Means over pairs, without the bootstrap of `rouge_score.scoring`: the same texts give the
same figures every time.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

TYPES = ("rouge1", "rouge2", "rougeL")


@cache
def _scorer(types: tuple[str, ...]) -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError("ROUGE needs the package rouge-score: pip install rouge-score") from error
    return RougeScorer(list(types), use_stemmer=True)


def rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Mean F of ROUGE-1, ROUGE-2 and ROUGE-L, as `{"rouge1": ..., "rouge2": ..., "rougeL": ...}`."""
    if isinstance(predictions, str) or isinstance(references, str):
        raise TypeError("predictions and references are sequences of texts, not one text")
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references")
    if not predictions:
        raise ValueError("no pair to score")
    totals = dict.fromkeys(TYPES, 0.0)
    for prediction, reference in zip(predictions, references, strict=True):
        for name, score in _scorer(TYPES).score(reference, prediction).items():
            totals[name] += score.fmeasure
    return {name: 100.0 * total / len(predictions) for name, total in totals.items()}


def rougeL(prediction: str, reference: str) -> float:
    """F of ROUGE-L of one pair."""
    return 100.0 * float(_scorer(("rougeL",)).score(reference, prediction)["rougeL"].fmeasure)
