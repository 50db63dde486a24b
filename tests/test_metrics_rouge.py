"""ROUGE against values worked out by hand, and the same in every process."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("rouge_score")

from dqkernels.metrics.rouge import rouge, rougeL

# prediction, reference, ROUGE-1, -2, -L
BY_HAND = [
    # 4 of 4 words match; 0 of 3 pairs; the longest common subsequence of abcd and badc has 2 words
    ("alpha beta gamma delta", "beta alpha delta gamma", 100.0, 0.0, 50.0),
    # 5 of 6 words after stemming (cats -> cat); bigrams: the-cat, cat-sat, sat-on = 3 of 5; sequence 5
    ("the cat sat on the mat", "the cats sat on a mat", 500 / 6, 60.0, 500 / 6),
    # 2 of 2 and 2 of 4 words: F = 2 * 1 * 0.5 / 1.5; 1 of 1 and 1 of 3 pairs: F = 0.5
    ("sort list", "sort list in place", 200 / 3, 50.0, 200 / 3),
    ("nothing", "shared here", 0.0, 0.0, 0.0),
    ("", "an empty prediction", 0.0, 0.0, 0.0),
]


@pytest.mark.parametrize(("prediction", "reference", "one", "two", "longest"), BY_HAND)
def test_by_hand(prediction, reference, one, two, longest):
    scores = rouge([prediction], [reference])
    assert scores == pytest.approx({"rouge1": one, "rouge2": two, "rougeL": longest})
    assert rougeL(prediction, reference) == pytest.approx(longest)


def test_precision_and_recall_are_not_the_same_pair():
    """F is symmetric, so a swapped call shows only where the texts are split differently: case and marks."""
    assert rouge(["Sort, list!"], ["sort LIST"])["rouge1"] == pytest.approx(100.0)


def test_mean_over_pairs():
    predictions, references = [row[0] for row in BY_HAND], [row[1] for row in BY_HAND]
    scores = rouge(predictions, references)
    for name, column in (("rouge1", 2), ("rouge2", 3), ("rougeL", 4)):
        assert scores[name] == pytest.approx(sum(row[column] for row in BY_HAND) / len(BY_HAND))


def test_wrong_use_is_named():
    with pytest.raises(ValueError, match="2 predictions for 1 references"):
        rouge(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="no pair"):
        rouge([], [])
    with pytest.raises(TypeError, match="not one text"):
        rouge("a", ["a"])


def test_same_in_every_process():
    program = (
        "from dqkernels.metrics.rouge import rouge\n"
        "words = [f'word{i * i % 17} other{i % 5} runs running' for i in range(40)]\n"
        "print({k: v.hex() for k, v in sorted(rouge(words, words[7:] + words[:7]).items())})\n"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(printed) == 1 and "0x" in printed.pop()
