"""Corpus BLEU and chrF in 0..100 by sacrebleu, each with the signature that makes the figure comparable.

Texts are scored as they are. Published English-Romanian figures often come from normalized text without diacritics
and are some ten BLEU higher; they do not compare with these.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any


def _sacrebleu() -> Any:
    try:
        import sacrebleu.metrics
    except ImportError as error:
        raise ImportError("BLEU and chrF need the package sacrebleu: pip install 'dqkernels[train]'") from error
    return sacrebleu.metrics


def bleu(
    predictions: Sequence[str], references: Sequence[str] | Sequence[Sequence[str]], tokenize: str = "13a"
) -> dict[str, float | str]:
    """`{"bleu": ..., "chrf": ..., "bleu_signature": ..., "chrf_signature": ...}` of a corpus.

    Args:
        predictions: one text per pair.
        references: one text per pair, or a list of as many texts for each pair.
        tokenize: sacrebleu's tokenizer for BLEU: `13a`, `intl`, `char`, `zh`, `ja-mecab`, ...

    Raises:
        ValueError: for no pair, unequal numbers, or a tokenizer that sacrebleu has not.
    """
    metrics = _sacrebleu()
    if isinstance(predictions, str) or isinstance(references, str):
        raise TypeError("predictions and references are sequences of texts, not one text")
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references")
    if not predictions:
        raise ValueError("no pair to score")
    several = [[one] if isinstance(one, str) else list(one) for one in references]
    if len({len(one) for one in several}) != 1 or not several[0]:
        raise ValueError("every prediction must have the same number of references, at least one")
    if tokenize not in metrics.BLEU.TOKENIZERS:
        raise ValueError(f"tokenize must be one of {', '.join(metrics.BLEU.TOKENIZERS)}, got {tokenize!r}")
    streams = [list(stream) for stream in zip(*several, strict=True)]
    by_words, by_letters = metrics.BLEU(tokenize=tokenize), metrics.CHRF()
    scores = {
        "bleu": float(by_words.corpus_score(list(predictions), streams).score),
        "chrf": float(by_letters.corpus_score(list(predictions), streams).score),
    }
    # A signature knows the number of references, so it is asked for after the scores.
    signatures = {"bleu_signature": str(by_words.get_signature()), "chrf_signature": str(by_letters.get_signature())}
    return {**scores, **signatures}


@cache
def _chrf() -> Any:
    return _sacrebleu().CHRF()


def chrf(prediction: str, reference: str) -> float:
    """chrF of one pair: a closeness that is above 0 even where no four words match."""
    return float(_chrf().sentence_score(prediction, [reference]).score)
