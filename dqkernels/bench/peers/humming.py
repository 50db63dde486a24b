"""Humming's int8-activation GEMM with our codes and scales.

Written against the source of humming-kernels 0.1.19; never run on a GPU here. Its layer takes the tensors given here;
its `transform` was not reached.
"""

from __future__ import annotations

import torch
from torch import nn

from dqkernels.bench.peers.base import Peer, Weights, load


def gemm(weights: Weights, tune: bool) -> tuple[nn.Module, str]:
    """Its layer, loaded with our codes: unsigned with the middle as zero, 32-bit words along K, 16-bit scales."""
    layers, ops = load("humming.layer"), load("humming.ops")
    device, dtype = weights.codes.device, weights.bias.dtype
    n, k = weights.codes.shape
    layer = layers.HummingLayer(
        shape_n=n,
        shape_k=k,
        weight_config={"dtype": f"int{weights.bits}", "group_size": max(0, weights.group_size)},
        input_config={"dtype": "int8"},
        pad_n_to_multiple=64,
        has_bias=True,
        torch_dtype=dtype,
    ).to(device)
    codes = (weights.codes.to(torch.int32) + weights.offset).contiguous()
    packed = ops.pack_weight(codes, weights.bits)
    layer.load_from_tensors({"weight": packed, "weight_scale": weights.scale.to(dtype), "bias": weights.bias})
    layer.transform()
    return layer, "humming, its heuristics"


PEER = Peer(
    "humming",
    "pip install --no-deps humming-kernels",
    "humming",
    ("cuda",),
    gemm=gemm,
    without={"linear": "is in bench gemm, with our codes"},
)
