"""Data that is on every machine: docstrings of installed packages, read offline.

Nothing heavy is imported here; take what you need from `dqkernels.data.docstrings`.
"""
