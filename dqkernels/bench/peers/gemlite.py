"""gemlite's int8-activation GEMM with our codes and scales.

Written against the source of 0.6.0.post2; never run on a GPU here. Its GEMM kernels in Triton's interpreter, fed by
this adapter, keep the bound at 8, 4 and 2 bits and 1, 4 and 16 rows (its quantizer replaced by torch's).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from dqkernels.bench.peers.base import NotCompared, Peer, Weights, load


class Layer(nn.Module):
    """gemlite's own layer, taken apart: its `forward` is bound to the instance, so that clones would share weights."""

    def __init__(self, layer, call: Callable):
        super().__init__()
        names = ("W_q", "scales", "zeros", "meta_scale")
        for name, tensor in zip(names, layer.get_tensor_args(), strict=True):
            self.register_buffer(name, tensor.detach())
        self.register_buffer("bias", layer.bias.detach())
        self.meta, self.call = layer.get_meta_args(), call

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.call(x, self.bias, [self.W_q, self.scales, self.zeros, self.meta_scale], self.meta)


def gemm(weights: Weights, tune: bool) -> tuple[nn.Module, str]:
    """Channel-wise only. 8 bits through its helper; 2 and 4 as its helper for ternary weights sets them up."""
    core, helper = load("gemlite.core"), load("gemlite.helper")
    if weights.group_size != -1:
        raise NotCompared("its group-wise weights take float or fp8 activations")
    device, dtype = str(weights.codes.device), weights.bias.dtype
    n, k = weights.codes.shape
    if weights.bits == 8:
        maker = helper.A8W8_int8_dynamic(device=device, dtype=dtype)
        layer = maker.from_weights(weights.codes, bias=weights.bias, scales=weights.scale)
    else:
        layer = core.GemLiteLinearTriton(
            weights.bits,
            group_size=k,
            in_features=k,
            out_features=n,
            input_dtype=core.DType.INT8,
            output_dtype=helper.TORCH_TO_DTYPE[dtype],
            scaled_activations=True,
        )
        codes = (weights.codes.to(torch.int16) + weights.offset).to(torch.uint8)
        layer.pack(codes, scales=weights.scale, zeros=weights.offset, bias=weights.bias)
        layer.W_group_mode, layer.channel_scale_mode = 1, 3  # a shift alone; both scales after the sum
    return Layer(layer, core.forward_functional), "gemlite, autotuned by itself"


PEER = Peer(
    "gemlite",
    "pip install --no-deps gemlite",
    "gemlite",
    ("cuda",),
    gemm=gemm,
    without={"linear": "is in bench gemm, with our codes"},
)
