"""Scores from ids, as Seq2SeqTrainer hands them over."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("rouge_score")
pytest.importorskip("sacrebleu")

from test_text import make_tokenizer

from dqkernels.metrics.bleu import bleu
from dqkernels.metrics.rouge import SUMMARY_TYPES, rouge, signature
from dqkernels.metrics.seq2seq import compute_metrics_for, generated_length

PREDICTIONS = ["hello world a b c", "a b", ""]
REFERENCES = ["hello world a c b", "a b c. Hello a", "c"]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def ids_of(tokenizer, texts, start=(), padding=1):
    rows = [[*start, *tokenizer(text)["input_ids"]] for text in texts]
    width = max(map(len, rows)) + 2
    return np.array([row + [padding] * (width - len(row)) for row in rows])


@pytest.mark.parametrize("padding", [1, -100])
@pytest.mark.parametrize("kind", ["rouge", "bleu"])
def test_ids_score_as_their_texts(tokenizer, kind, padding):
    compute_metrics = compute_metrics_for(tokenizer, kind)
    predictions = ids_of(tokenizer, PREDICTIONS, start=[2], padding=padding)
    labels = ids_of(tokenizer, REFERENCES, padding=-100)
    scores = compute_metrics((predictions, labels))
    if kind == "rouge":
        expected = rouge(PREDICTIONS, REFERENCES, SUMMARY_TYPES)
        assert compute_metrics.signature == signature(SUMMARY_TYPES)
    else:
        expected = {name: value for name, value in bleu(PREDICTIONS, REFERENCES).items() if "signature" not in name}
        assert compute_metrics.signature == bleu(PREDICTIONS, REFERENCES)["bleu_signature"]
    length = np.mean([len(tokenizer(text)["input_ids"]) for text in PREDICTIONS])
    assert scores == pytest.approx({**expected, "gen_len": length})
    assert all(type(value) is float for value in scores.values()), "what a log takes"


def test_a_trainers_prediction_and_tuples(tokenizer):
    from transformers import EvalPrediction

    ids, labels = ids_of(tokenizer, PREDICTIONS, start=[2]), ids_of(tokenizer, REFERENCES)
    compute_metrics = compute_metrics_for(tokenizer)
    plain = compute_metrics((ids, labels))
    assert compute_metrics(EvalPrediction(predictions=ids, label_ids=labels)) == plain
    assert compute_metrics(EvalPrediction(predictions=(ids, None), label_ids=labels)) == plain


def test_length_where_padding_is_the_end_token():
    ids = np.array([[2, 5, 6, 2, 2, 2], [2, 5, 6, 7, 8, 9], [2, 2, -100, -100, -100, -100]])
    assert generated_length(ids, pad=2, eos=2) == pytest.approx((3 + 5 + 1) / 3)
    assert generated_length(np.array([[2, 5, 2, 1, 1]]), pad=1, eos=2) == 2.0


def test_wrong_use_is_named(tokenizer):
    with pytest.raises(ValueError, match=r"kind must be one of \['rouge', 'bleu'\], got 'meteor'"):
        compute_metrics_for(tokenizer, "meteor")
    with pytest.raises(ValueError, match="predict_with_generate must be on"):
        compute_metrics_for(tokenizer)((np.zeros((2, 3, 4), np.float32), np.zeros((2, 3), np.int64)))
