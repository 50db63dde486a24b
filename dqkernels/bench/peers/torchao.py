"""torchao's `quantize_`: int8 weights with int8 activations per token, int8 or int4 weights alone. Eager, not compiled.

Tried on a CPU with 0.18.0; never run on a GPU here.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from dqkernels.bench import candidates
from dqkernels.bench.generate_candidates import BOUNDS, Transformers, set_generation
from dqkernels.bench.peers.base import NotCompared, Peer, held_bytes, load, model_bytes, named, quantized

#: Weights that share a scale at 4 bits.
_GROUP = 64
_KINDS = {
    "torchao int8 dynamic": {"bits": 8, "config": "Int8DynamicActivationInt8WeightConfig"},
    "torchao int8 weights": {"bits": 8, "config": "Int8WeightOnlyConfig"},
    "torchao int4 weights": {"bits": 4, "config": "Int4WeightOnlyConfig"},
}


def _quantized(model: nn.Module, config: str, device: str) -> nn.Module:
    """The model, its linears quantized in place."""
    library, more = load("torchao.quantization"), {}
    if config == "Int4WeightOnlyConfig":
        if device == "cpu":
            raise NotCompared("its wheels have no kernel for packed 4-bit weights on a CPU")
        # Of its layouts the one that torch itself has a kernel for.
        more = {"group_size": _GROUP, "int4_packing_format": "tile_packed_to_4d"}
    library.quantize_(model, getattr(library, config)(**more))
    return model


def linear(layer: nn.Linear, name: str, bits: int, config: str) -> candidates.Candidate:
    module = _quantized(nn.Sequential(copy.deepcopy(layer)), config, layer.weight.device.type)[0]
    weight = module.weight
    if not hasattr(weight, "__tensor_flatten__"):
        raise NotCompared(f"left the layer as it was: {layer.in_features} inputs are no multiple of its group")
    more = {"group_size": _GROUP if bits == 4 else -1}
    words = f"torchao {config.removesuffix('Config')}, eager"
    return quantized(name, layer, module, bits, held_bytes(weight), words, weight.dequantize, **more)


class Generator(Transformers):
    """Every linear, the head among them, which is tied no more; embeddings stay float."""

    foreign = True

    def weights_bytes(self):
        return model_bytes(self.model)


def generate(
    model: nn.Module, dtype: torch.dtype, device: torch.device, name: str, bits: int, config: str
) -> Generator:
    made = _quantized(copy.deepcopy(model).to(dtype).to(device), config, device.type)
    bound = BOUNDS["int8" if bits == 8 else "4 bit"]
    words = f"transformers generate, torchao {config.removesuffix('Config')}, eager"
    return Generator(name, "torchao", set_generation(made.eval()), bound, bits, 8 * dtype.itemsize, words)


PEER = Peer(
    "torchao",
    "pip install --no-deps torchao",
    "torchao",
    linear=named(linear, **_KINDS),
    generate=lambda device: named(generate, **_KINDS),
)
