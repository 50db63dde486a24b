"""Timing protocol, records and tables. Nothing is imported here: `from dqkernels.bench import linear`."""

__all__ = ["generate", "kernels", "linear", "plot", "protocol", "quality", "record", "size", "train_step"]
