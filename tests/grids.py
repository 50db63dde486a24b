"""Shapes, formats and layouts, each with its reason: without one nobody would dare to remove it."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

import torch

# (M, N, K, why)
GEMM_SHAPES = [
    (1, 1, 1, "the smallest: one code in a block of 128"),
    (0, 5, 7, "an empty batch"),
    (1, 1, 128, "one row of exactly one block"),
    (2, 1, 127, "N = 1; K one short of a block"),
    (3, 2, 129, "K one past a block: the second block holds one code"),
    (1, 16, 256, "N a whole tile, nothing padded"),
    (5, 17, 255, "N one past a tile"),
    (7, 15, 257, "N one short of a tile"),
    (4, 31, 31, "K below the smallest group"),
    (4, 31, 33, "K one past a group of 32: a group of one"),
    (4, 31, 63, "K one short of a group of 64"),
    (4, 31, 65, "one past it"),
    (6, 13, 97, "primes"),
    (11, 53, 101, "primes"),
    (13, 7, 211, "primes, M > N"),
    (17, 3, 383, "M past 16: the skinny kernel stops quantizing in its prologue"),
    (33, 19, 160, "groups of 32 divide K, groups of 64 do not"),
    (64, 5, 96, "the last M of the skinny kernel"),
    (65, 5, 96, "the first M of the next one"),
    (2, 48, 64, "one head of BART: exact multiples"),
    (3, 64, 48, "the same, K the smaller"),
    (1, 769, 3, "wide and shallow: the head of a tiny model"),
    (127, 2, 5, "tall and thin"),
    (9, 96, 512, "a model dimension that divides everything"),
    (5, 24, 1041, "the first K at which an fp32 sum of int8 products may round"),
]

# (bits, quantizer, group_size, weight scales: per_channel or per_tensor)
FORMATS = [
    (2, "ternary", -1, "per_channel"),
    (2, "ternary", -1, "per_tensor"),
    (2, "ternary", 32, "per_channel"),
    (2, "four_level", -1, "per_channel"),
    (2, "four_level", -1, "per_tensor"),
    (2, "four_level", 64, "per_channel"),
    (4, "absmax", -1, "per_channel"),
    (4, "absmax", -1, "per_tensor"),
    (4, "absmax", 32, "per_channel"),
    (4, "absmax", 128, "per_channel"),
    (8, "absmax", -1, "per_channel"),
    (8, "absmax", -1, "per_tensor"),
]

ACT_MODES = ("per_token", "per_tensor", "static")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CODE_RANGE = {"ternary": (-1, 1), "four_level": (-2, 1)}  # else all that storage admits, except -128


@dataclass(frozen=True)
class Case:
    """One point of the GEMM grid; `seed` makes its numbers."""

    m: int
    n: int
    k: int
    bits: int
    quantizer: str
    group_size: int
    granularity: str
    mode: str
    clip: float | None
    dtype: torch.dtype
    layout: str
    bias: bool
    residual: bool
    activation: str
    seed: int

    @property
    def four_level(self) -> bool:
        return self.quantizer == "four_level"

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        extras = [name for name, on in (("bias", self.bias), ("residual", self.residual)) if on]
        return (
            f"{self.m}x{self.n}x{self.k}-w{self.bits}-{self.quantizer}-g{self.group_size}-{self.granularity}-"
            f"{self.mode}-clip{self.clip}-{dtype}-{self.layout}-{'+'.join([*extras, self.activation])}"
        )


def gemm_cases() -> list[Case]:
    """Every shape in every format (300 cases); the other axes are drawn, the same ones in every run."""
    cases = []
    for index, ((m, n, k, _), (bits, quantizer, group, granularity)) in enumerate(
        itertools.product(GEMM_SHAPES, FORMATS)
    ):
        draw = random.Random(index).choice
        cases.append(
            Case(
                m, n, k, bits, quantizer, group, granularity,
                mode=draw(ACT_MODES),
                clip=draw((None, 2.5)),
                dtype=draw(DTYPES),
                layout=draw(tuple(LAYOUTS)),
                bias=draw((True, True, False)),
                residual=draw((True, False)),
                activation=draw(("none", "relu")),
                seed=index,
            )
        )  # fmt: skip
    return cases


# --------------------------------------------------------------------------------------------------- layouts
# Each takes a tensor [..., K] and returns the same values on other strides.


def contiguous(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous()


def transposed(x: torch.Tensor) -> torch.Tensor:
    """K is not the fastest axis."""
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def every_second(x: torch.Tensor) -> torch.Tensor:
    """A gap after each element of a row."""
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), 99.0, device=x.device).to(x.dtype)
    wide[..., ::2] = x
    return wide[..., ::2]


def columns(x: torch.Tensor) -> torch.Tensor:
    """A slice of wider rows, as the q, k, v parts of a fused projection are."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 3), 99.0, device=x.device).to(x.dtype)
    wide[..., 2:-1] = x
    return wide[..., 2:-1]


def unaligned(x: torch.Tensor) -> torch.Tensor:
    """Contiguous, but its first element stands one past an aligned address."""
    flat = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:]
    return flat.copy_(x.reshape(-1)).view(x.shape)


LAYOUTS = {
    "contiguous": contiguous,
    "transposed": transposed,
    "every_second": every_second,
    "columns": columns,
    "unaligned": unaligned,
}
