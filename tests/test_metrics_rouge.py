"""ROUGE against values worked out by hand, and the same in every process."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("rouge_score")
pytest.importorskip("sacrebleu")

from dqkernels.metrics.rouge import SUMMARY_TYPES, rouge, rouge_of, rougeL, sentences, signature

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


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("One here. Two there! Is it three?", ["One here.", "Two there!", "Is it three?"]),
        ("Mr. Smith met J. R. Brown. He left at 5 p.m. on Jan. 3.", ["Mr. Smith met J. R. Brown.",
         "He left at 5 p.m. on Jan. 3."]),
        ("It costs 3.50 now. 20 more came.", ["It costs 3.50 now.", "20 more came."]),
        ('He said "go." Then (quietly) "stay."', ['He said "go."', 'Then (quietly) "stay."']),
        ("see e.g. Python or etc. Then stop... And so on", ["see e.g. Python or etc. Then stop...", "And so on"]),
        ("first line\nsecond line. Third\n\n", ["first line", "second line.", "Third"]),
        ("version 1.2.3 of a.b.c is out", ["version 1.2.3 of a.b.c is out"]),
        ("她来了。他走了！", ["她来了。", "他走了！"]),
        ("", []),
    ],
)  # fmt: skip
def test_sentences(text, parts):
    assert sentences(text) == parts


def test_sentence_by_sentence():
    """Two sentences in the other order: the longest sequence of the whole has 3 of 6 words, of the sentences all."""
    prediction, reference = "Alpha beta gamma. Delta epsilon zeta.", "Delta epsilon zeta. Alpha beta gamma."
    scores = rouge_of(prediction, reference, SUMMARY_TYPES)
    assert scores["rougeLsum"] == pytest.approx(100.0) and scores["rougeL"] == pytest.approx(50.0)
    assert scores == pytest.approx(rouge([prediction], [reference], SUMMARY_TYPES))
    lines = rouge_of(prediction.replace(". ", ".\n"), reference.replace(". ", ".\n"), SUMMARY_TYPES)
    assert lines == scores, "lines of the text are sentences too, and change nothing else"
    assert {name: scores[name] for name in ("rouge1", "rouge2", "rougeL")} == rouge_of(prediction, reference)


def test_signature_names_the_version_and_the_split():
    from importlib.metadata import version

    assert signature() == f"rouge-score:{version('rouge-score')}|stemmer:yes|mean:F"
    assert signature(SUMMARY_TYPES) == signature() + "|sentences:dqkernels"


def test_wrong_use_is_named():
    with pytest.raises(ValueError, match="types must be of .*, got 'rouge9'"):
        rouge(["a"], ["a"], ("rouge9",))
    with pytest.raises(ValueError, match="2 predictions for 1 references"):
        rouge(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="no pair"):
        rouge([], [])
    with pytest.raises(TypeError, match="not one text"):
        rouge("a", ["a"])


def test_same_in_every_process():
    program = (
        "from dqkernels.metrics.rouge import SUMMARY_TYPES, rouge\n"
        "from dqkernels.metrics.bleu import bleu\n"
        "words = [f'Word{i * i % 17} other{i % 5}. Runs running {i % 3}' for i in range(40)]\n"
        "other = words[7:] + words[:7]\n"
        "scores = {**rouge(words, other, SUMMARY_TYPES), **bleu(words, other)}\n"
        "print({k: v if isinstance(v, str) else v.hex() for k, v in sorted(scores.items())})\n"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(printed) == 1 and "0x" in printed.pop()
