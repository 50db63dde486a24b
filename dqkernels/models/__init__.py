"""Models of transformers as they run here: fused blocks (`patch`, `unpatch`), int8 attention (`attention`)."""

from dqkernels.models.blocks import patch, unpatch

__all__ = ["patch", "unpatch"]
