"""BLEU and chrF against figures worked out by hand, and the signatures that say what they are."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("sacrebleu")

import sacrebleu

from dqkernels.metrics.bleu import bleu, chrf


def test_by_hand():
    """7 of 8 words, 5 of 7 pairs, 3 of 6 triples, 2 of 5 fours match, over the whole corpus; equal lengths."""
    scores = bleu(["the cat sat on the mat today now"], ["the cat sat on a mat today now"])
    # words: the(1 of 2) cat sat on mat today now = 7; pairs: the-cat cat-sat sat-on mat-today today-now = 5
    # triples: the-cat-sat cat-sat-on mat-today-now = 3; fours: the-cat-sat-on = 1
    by_hand = 100 * math.exp((math.log(7 / 8) + math.log(5 / 7) + math.log(3 / 6) + math.log(1 / 5)) / 4)
    assert scores["bleu"] == pytest.approx(by_hand)


def test_short_output_pays_the_brevity_penalty():
    scores = bleu(["one two three four"], ["one two three four five six"])
    assert scores["bleu"] == pytest.approx(100 * math.exp(1 - 6 / 4))


def test_a_corpus_is_not_a_mean_of_sentences():
    predictions, references = ["one two three four five", "x"], ["one two three four five", "y"]
    scores = bleu(predictions, references)
    assert scores["bleu"] == pytest.approx(100 * (5 / 6) ** 0.25) and 0 < scores["chrf"] < 100


def test_perfect_and_hopeless():
    assert bleu(["a b c d e"], ["a b c d e"])["bleu"] == pytest.approx(100)
    assert bleu(["a b c d e"], ["a b c d e"])["chrf"] == pytest.approx(100)
    assert bleu(["q"], ["a b c d e"])["bleu"] == 0 == bleu(["q"], ["a b c d e"])["chrf"]
    assert bleu([""], ["a"])["bleu"] == 0


def test_signatures():
    scores = bleu(["a b"], ["a b"])
    assert scores["bleu_signature"] == f"nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:{sacrebleu.__version__}"
    assert scores["chrf_signature"].startswith("nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:")
    assert "tok:char" in bleu(["a b"], ["a b"], tokenize="char")["bleu_signature"]
    assert "nrefs:2" in bleu(["a b"], [["a b", "a c"]])["bleu_signature"]


def test_several_references():
    predictions = ["one two three four"]
    assert bleu(predictions, [["none of these words", "one two three four"]])["bleu"] == pytest.approx(100)


def test_closeness_of_one_pair():
    assert chrf("abcdef", "abcdef") == pytest.approx(100)
    assert chrf("abcdef", "abcdex") > chrf("abcdef", "abxxxx") > 0


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ((["a", "b"], ["a"]), ValueError, "2 predictions for 1 references"),
        (([], []), ValueError, "no pair"),
        (("a", ["a"]), TypeError, "not one text"),
        ((["a", "b"], [["a"], ["a", "b"]]), ValueError, "same number of references"),
        ((["a"], [[]]), ValueError, "at least one"),
        ((["a"], ["a"], "words"), ValueError, "tokenize must be one of .*13a.*, got 'words'"),
    ],
)
def test_wrong_use_is_named(arguments, kind, message):
    with pytest.raises(kind, match=message):
        bleu(*arguments)


def test_without_the_package_the_extra_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(ImportError, match=r"pip install 'dqkernels\[train\]'"):
        bleu(["a"], ["a"])
