"""Distillation and quantization-aware training: from a fine-tuned float teacher to a packed student.

    from dqkernels.train import DistillationTrainer, KDConfig, export, make_student, prepare_qat

Importing this package loads nothing; each name comes with its first use.
"""

from __future__ import annotations

import importlib

_HOME = {
    "DistillationTrainer": "trainer",
    "KDConfig": "losses",
    "PRESETS": "presets",
    "export": "qat",
    "load_trained": "qat",
    "make_student": "student",
    "packed_copy": "qat",
    "prepare_qat": "qat",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'dqkernels.train' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"dqkernels.train.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
