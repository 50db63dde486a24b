"""Calls of the compiled core of any size: an encoder layer and a decode step of random weights, each one call.

For tests of what such a call does beside computing: whose threads it runs on, whether Python goes on, how far it reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from dqkernels import DQConfig
from dqkernels.kernels import cpu_encoder, cpu_gemm, cpu_token
from dqkernels.kernels.cpu_step import Tape
from dqkernels.nn import QLinear

OPTIONS: dict[str, Any] = {"bits": 4, "four_level": False, "group_size": -1}


def part(k: int, n: int) -> cpu_gemm.Part:
    linear = QLinear.from_linear(nn.Linear(k, n), DQConfig(weight_bits=4))
    return cpu_gemm.part(*linear.packed(), linear.bias.detach(), None, n)


def encoder_layer(width: int, inner: int, dtype: torch.dtype = torch.float32) -> cpu_encoder.EncoderLayer:
    """`y = layer(x, mask)`, with norms before its blocks and one head per 64 columns."""

    def linears(k: int, widths: Sequence[int], coded: bool, activation: str = "none") -> cpu_encoder.Linears:
        return cpu_encoder.Linears([part(k, n) for n in widths], {**OPTIONS, "activation": activation}, coded)

    return cpu_encoder.EncoderLayer(
        post_norm=False,
        norms=tuple(cpu_encoder.Norm(torch.rand(width) + 0.5, torch.randn(width), 1e-5) for _ in range(2)),
        linears=(
            linears(width, [width] * 3, True),
            linears(width, [width], False),
            linears(width, [inner], True, "gelu"),
            linears(inner, [width], False),
        ),
        heads=width // 64, head_dim=64, softmax_scale=0.125, mode="per_token", clip=None, dtype=dtype,
    )  # fmt: skip


def decode_step(k: int, n: int, rows: int = 1) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    """A step of one linear with the logits behind it; called, it gives these and the places of the largest."""
    tape, places = Tape(), torch.zeros(2, rows, dtype=torch.int32)
    tokens = torch.zeros(rows, dtype=torch.int64)
    tape.set_rows(tokens, *places, None)
    options = {**OPTIONS, "activation": "none", "out_dtype": torch.float32}
    x = torch.randn(rows, k)
    (logits,) = cpu_gemm.gemm(x, [part(k, n)], **options, into=tape)
    found = cpu_token.finish_logits(logits, None, False, into=tape)
    given = torch.ones_like(tokens)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        tape.run(given, 0, wants_best=True)
        return found

    return run
