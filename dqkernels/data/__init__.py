"""Pairs of texts to train and score on: `sources` loads them, `prepare` makes ids and batches, `mixing` joins sets.

`docstrings` and `gettext_catalogues` find pairs that a machine already has, offline. Nothing heavy is imported here.
"""
