"""The norms around a fused decoder, which transformers calls itself: of its embeddings, and of its last layer's output.

On a CPU they run on the kernel of the norms inside the layers, so that a decode step can be one call of it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

import torch
from torch import nn

from dqkernels.models import steps

#: What a decoder calls them.
NAMES = ("layernorm_embedding", "layer_norm")


def patch(model: nn.Module, families: Mapping[str, str]) -> None:
    """Takes those of every decoder of `families` (module of transformers -> prefix of its classes) inside `model`."""
    kinds = []
    for file, prefix in families.items():
        modeling = sys.modules.get(file)
        kinds += [] if modeling is None else [getattr(modeling, prefix + "Decoder")]
    for decoder in model.modules():
        if isinstance(decoder, tuple(kinds)):
            for name in NAMES:
                norm = getattr(decoder, name, None)
                if type(norm) is nn.LayerNorm:
                    norm.__class__ = LayerNorm
                    norm.dqkernels_layers = (decoder.layers,)  # in a tuple: no submodule of the norm


def unpatch(model: nn.Module) -> None:
    """Undoes `patch`; without it, nothing happens."""
    for norm in model.modules():
        if type(norm) is LayerNorm:
            norm.__class__ = nn.LayerNorm
            del norm.dqkernels_layers


def linear_of(norm: nn.Module) -> nn.Module | None:
    """The linear that says where a norm that was taken runs; None for another norm, or a decoder without layers."""
    layers = norm.dqkernels_layers[0] if type(norm) is LayerNorm else ()
    return layers[-1].fc2 if len(layers) else None


class LayerNorm(nn.LayerNorm):
    """As torch's, by the kernel that norms before the decoder's linears wherever that one runs on a CPU."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        # As the layers: one that is trained runs torch's without gradients too.
        trained = self.training and any(parameter.requires_grad for parameter in self.parameters())
        if trained or self.weight is None or not steps.normed_by_kernel(input, self, linear_of(self)):
            return super().forward(input)
        return steps.kernel_norm(input, self, linear_of(self))
