"""torch's own dynamic int8 on CPUs (`torch.ao`): one scale per tensor for the weights and, per call, for the input."""

from __future__ import annotations

import copy
import warnings

import torch
from torch import nn

from dqkernels.bench import candidates
from dqkernels.bench.generate_candidates import BOUNDS, Transformers
from dqkernels.bench.peers.base import NotCompared, Peer, only

_NAME = "torch dynamic int8"


def _quantized(model: nn.Module) -> nn.Module:
    quantize = getattr(getattr(torch.ao, "quantization", None), "quantize_dynamic", None)
    if quantize is None:
        raise NotCompared(f"torch {torch.__version__} has no torch.ao.quantization.quantize_dynamic")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces that torchao will replace it
        return quantize(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)


def linear(layer: nn.Linear) -> candidates.Candidate:
    only(layer, torch.float32)
    module = _quantized(nn.Sequential(layer))[0]
    proof, kernel = candidates.bounded(layer, candidates.INT8_BOUND), f"torch.ao, {torch.backends.quantized.engine}"
    return candidates.Candidate(_NAME, module, 8, layer.weight.numel(), proof, kernel)


class Generator(Transformers):
    """Linears of torch.ao: int8 weights, inputs quantized per call; embeddings stay float."""

    def weights_bytes(self):
        # Its packed weights are no tensors of the state dict.
        kinds = torch.ao.nn.quantized.dynamic.Linear
        linears = [module for module in self.model.modules() if isinstance(module, kinds)]
        tensors = [t for one in linears for t in (one.weight(), one.bias()) if t is not None]
        tensors += [*self.model.parameters(), *self.model.buffers()]
        unique = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors}
        return sum(unique.values())


def generate(model: nn.Module, dtype: torch.dtype, device: torch.device) -> Generator:
    """`torch.ao.quantization.quantize_dynamic` on every linear."""
    words = f"transformers generate, torch.ao {torch.backends.quantized.engine}"
    return Generator(_NAME, "dynamic", _quantized(model), BOUNDS["int8"], 8, 32, words)


PEER = Peer(
    "dynamic",
    "part of torch",
    None,
    ("cpu",),
    label=_NAME,
    linear={_NAME: linear},
    generate=lambda device: {_NAME: generate},
)
