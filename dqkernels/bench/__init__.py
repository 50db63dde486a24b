"""Timing protocol, records and tables. Nothing is imported here: `from dqkernels.bench import linear`."""

__all__ = ["kernels", "linear", "model", "protocol", "record", "size"]
