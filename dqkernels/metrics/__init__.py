"""Scores of generated text. Nothing heavy is imported here; see `dqkernels.metrics.rouge`."""
