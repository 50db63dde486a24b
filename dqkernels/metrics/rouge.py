"""ROUGE F-scores in 0..100 by Google's `rouge-score`, with its stemmer, offline.

Means over pairs, without the bootstrap of `rouge_score.scoring`: the same texts give the
same figures every time.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from typing import Any

TYPES = ("rouge1", "rouge2", "rougeL")
#: With ROUGE-Lsum, which is the longest common subsequence sentence by sentence.
SUMMARY_TYPES = (*TYPES, "rougeLsum")

_END = re.compile(r"[.!?…]+[\"'”’)\]]*\s+(?=[\"'“‘(\[]*[A-Z0-9])|[。！？]+\s*")
_NO_END = re.compile(
    r"(?:^|[\s(\[\"'“])(?:(?:[A-Za-z]\.)*[A-Za-z]|mr|mrs|ms|dr|prof|st|jr|sr|vs|etc|al|fig|eq|no|vol|pp|cf|approx|"
    r"dept|gen|col|sgt|lt|gov|sen|rep|jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec)\.$",
    re.I,
)


@cache
def _scorer(types: tuple[str, ...]) -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError("ROUGE needs the package rouge-score: pip install rouge-score") from error
    return RougeScorer(list(types), use_stemmer=True)


def rouge(predictions: Sequence[str], references: Sequence[str], types: Sequence[str] = TYPES) -> dict[str, float]:
    """Mean F of each type, as `{"rouge1": ..., "rouge2": ..., "rougeL": ...}`.

    `types=SUMMARY_TYPES` adds `rougeLsum`: both texts are split into sentences first, at their line ends and by
    `sentences`. The other types do not see where sentences end.
    """
    if isinstance(predictions, str) or isinstance(references, str):
        raise TypeError("predictions and references are sequences of texts, not one text")
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references")
    if not predictions:
        raise ValueError("no pair to score")
    totals = dict.fromkeys(types, 0.0)
    for prediction, reference in zip(predictions, references, strict=True):
        for name, score in rouge_of(prediction, reference, types).items():
            totals[name] += score
    return {name: total / len(predictions) for name, total in totals.items()}


def rouge_of(prediction: str, reference: str, types: Sequence[str] = TYPES) -> dict[str, float]:
    """F of each type for one pair."""
    if unknown := [name for name in types if name not in SUMMARY_TYPES]:
        raise ValueError(f"types must be of {list(SUMMARY_TYPES)}, got {unknown[0]!r}")
    if "rougeLsum" in types:
        prediction, reference = "\n".join(sentences(prediction)), "\n".join(sentences(reference))
    scores = _scorer(tuple(types)).score(reference, prediction)
    return {name: 100.0 * float(scores[name].fmeasure) for name in types}


def rougeL(prediction: str, reference: str) -> float:
    """F of ROUGE-L of one pair."""
    return rouge_of(prediction, reference, ("rougeL",))["rougeL"]


def sentences(text: str) -> list[str]:
    """The sentences of a text: lines, cut behind end marks that a capital, a digit or a quote follows.

    Abbreviations and initials ("Mr.", "e.g.", "J. Smith") end none. A rule and no model: nothing is downloaded, and
    the figures do not change with one.
    """
    found = []
    for line in text.splitlines():
        start = 0
        for match in _END.finditer(line):
            if not _NO_END.search(line[start : match.end()].rstrip()):
                found.append(line[start : match.end()].strip())
                start = match.end()
        found.append(line[start:].strip())
    return [sentence for sentence in found if sentence]


def signature(types: Sequence[str] = TYPES) -> str:
    """What a figure was made with, to stand beside it: `rouge-score:0.1.2|stemmer:yes|mean:F`."""
    parts = [f"rouge-score:{metadata.version('rouge-score')}", "stemmer:yes", "mean:F"]
    return "|".join([*parts, "sentences:dqkernels"] if "rougeLsum" in types else parts)
