"""BitBLAS's integer GEMM with our codes, between a quantizer and an epilogue in plain torch: it has none of its own.

Written against the source of 0.1.0.post1; never run.
"""

from __future__ import annotations

import torch
from torch import nn

from dqkernels.bench.candidates import quantized_by_hand
from dqkernels.bench.peers.base import NotCompared, Peer, Weights, load


class Layer(nn.Module):
    """int8 x int2/4/8 -> int32 by BitBLAS."""

    def __init__(self, matmul, weights: Weights):
        super().__init__()
        self.matmul = matmul
        self.register_buffer("qweight", matmul.transform_weight(weights.codes))
        self.register_buffer("scale", weights.scale.squeeze(1))
        self.register_buffer("bias", weights.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, scale = quantized_by_hand(x)
        return (self.matmul(q, self.qweight) * scale * self.scale + self.bias).to(x.dtype)


def gemm(weights: Weights, tune: bool) -> tuple[nn.Module, str]:
    """Channel-wise: its integer weights take no scales."""
    library = load("bitblas")
    if weights.group_size != -1:
        raise NotCompared("its integer weights take no group scales")
    n, k = weights.codes.shape
    config = library.MatmulConfig(
        M=[1, 16, 32, 64],
        N=n,
        K=k,
        A_dtype="int8",
        W_dtype=f"int{weights.bits}",
        accum_dtype="int32",
        out_dtype="int32",
        layout="nt",
        with_bias=False,
    )
    matmul = library.Matmul(config=config, enable_tuning=tune)
    words = "tuned" if tune else "default schedule, not tuned"
    return Layer(matmul, weights), f"bitblas, {words}; quantizer and epilogue in torch"


PEER = Peer(
    "bitblas",
    "pip install --no-deps bitblas",
    "bitblas",
    ("cuda",),
    gemm=gemm,
    without={"linear": "is in bench gemm, with our codes"},
)
