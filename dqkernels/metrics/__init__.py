"""Scores of generated text. Nothing heavy is imported here; see `rouge`, `bleu` and `seq2seq`."""
