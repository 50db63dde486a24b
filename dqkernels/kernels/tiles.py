"""Tile shapes of the Triton GEMM and attention, and the rules that pick one for every GPU.

Nothing here was measured (measured.py reads what was). The tables hold what tests/test_triton_compile.py compiles and
budgets (spills, byte permutes, shared memory, multiply instructions); `choose` is arithmetic on M, N, K. Neither ever
changes a result, but for the last bits of the float sums of attention's backward pass.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch


class Config(NamedTuple):
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


ANY = 1 << 62
SPLIT_M = 256  # the largest M that split-K is for; beyond it there are tiles enough
SPLITS = (1, 2, 4, 8)
#: (bits, with groups) of the GEMM.
FORMATS = ((8, False), (4, False), (2, False), (4, True), (2, True))
_MIN_STEPS = 4  # K steps that each split keeps, so that its load pipeline fills
_DEFAULT_MULTIPROCESSORS = 108  # an A100's, for the interpreter's CPU tensors

# By the largest M of the bucket. One table per instruction family: mma.sync on sm_80..89 and sm_120, wgmma and its
# successors elsewhere. "sm80" fits the 99 KB of sm_86, and 64 x 64 on 8 warps would do each multiply twice.
CONFIGS = {
    ("sm80", 8): {
        16: Config(16, 64, 256, 4, 4),
        32: Config(32, 64, 256, 4, 4),
        64: Config(64, 64, 128, 4, 4),
        256: Config(64, 128, 128, 4, 3),
        ANY: Config(128, 128, 128, 8, 3),
    },
    ("sm80", 4): {
        16: Config(16, 64, 256, 4, 4),
        32: Config(32, 64, 256, 4, 4),
        64: Config(64, 64, 128, 4, 4),
        256: Config(64, 128, 128, 4, 3),
        ANY: Config(128, 128, 128, 8, 3),
    },
    ("sm80", 2): {
        16: Config(16, 64, 512, 4, 4),
        32: Config(32, 64, 256, 4, 4),
        64: Config(64, 64, 256, 4, 2),
        256: Config(64, 128, 256, 4, 3),
        ANY: Config(128, 128, 128, 8, 3),
    },
    ("sm90", 8): {
        16: Config(16, 64, 256, 4, 4),
        32: Config(32, 64, 256, 4, 4),
        64: Config(64, 64, 128, 4, 4),
        256: Config(128, 64, 128, 4, 4),
        ANY: Config(128, 128, 128, 8, 4),
    },
    ("sm90", 4): {
        16: Config(16, 64, 256, 4, 4),
        32: Config(32, 64, 256, 4, 4),
        64: Config(64, 64, 256, 4, 4),
        256: Config(128, 64, 256, 4, 3),
        ANY: Config(128, 128, 128, 8, 4),
    },
    ("sm90", 2): {
        16: Config(16, 64, 512, 4, 4),
        32: Config(32, 64, 512, 4, 3),
        64: Config(64, 64, 256, 4, 4),
        256: Config(128, 64, 256, 4, 3),
        ANY: Config(128, 128, 256, 8, 3),
    },
}

# With groups a thread holds two accumulators, the group's and the total, and the dots of one 128-block are a loop
# body of their own already. (64 x 64 on 4 warps spills on sm_100 with Triton 3.6.)
_GROUP_CONFIGS = {32: Config(32, 64, 128, 4, 5), 256: Config(64, 128, 128, 8, 3), ANY: Config(128, 128, 128, 8, 3)}


# What `dqkernels tune` also tries. They have no budget: a tile that spills or does not fit loses or is refused there.
_MORE = (
    Config(16, 64, 128, 4, 5),
    Config(16, 128, 256, 4, 3),
    Config(16, 32, 256, 2, 4),
    Config(32, 128, 128, 4, 4),
    Config(64, 128, 128, 8, 4),
    Config(128, 64, 128, 4, 3),
    Config(128, 256, 128, 8, 3),
    Config(256, 128, 128, 8, 3),
)


@functools.cache
def candidates(arch: str, bits: int, group_size: int = -1) -> tuple[Config, ...]:
    """Every tile that a measurement may choose from: the table's own first, then a few more."""
    own = dict.fromkeys(table(arch, bits, group_size).values())
    return tuple(dict.fromkeys((*own, *_MORE)))


def table(arch: str, bits: int, group_size: int = -1) -> dict[int, Config]:
    """The tiles of one family and weight width, by the largest M that each is for."""
    return CONFIGS[arch, bits] if group_size == -1 else _GROUP_CONFIGS


@functools.cache
def family(device: torch.device) -> str:
    """The table that a device reads; the interpreter's CPU tensors read the first."""
    return "sm80" if device.type != "cuda" else family_of(torch.cuda.get_device_capability(device)[0])


def family_of(major: int) -> str:
    """The table of a compute capability."""
    return "sm90" if major in (9, 10, 11) else "sm80"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many blocks run side by side, one per multiprocessor; asked of the device at the first call."""
    if device.type != "cuda":
        return _DEFAULT_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.lru_cache(maxsize=1024)
def choose(m: int, n: int, k: int, bits: int, group_size: int, arch: str, sms: int) -> tuple[Config, int]:
    """Tile and number of K splits for [M, K] x [N, K]^T on `sms` multiprocessors.

    M picks the bucket; a smaller one serves where its tiles would leave multiprocessors idle. Up to 256 tokens, K is
    then split in two, four or eight, as long as all blocks still run at once, two per multiprocessor, and each keeps
    `_MIN_STEPS` steps.
    """
    buckets = table(arch, bits, group_size)
    limits = [limit for limit in buckets if limit >= m]
    cfg = buckets[limits[0]]
    for smaller in (256, 64):
        if m > smaller and smaller in buckets and count(m, n, cfg) < sms:
            cfg = buckets[smaller]
    split = 1
    if m <= SPLIT_M:
        blocks, steps = count(m, n, cfg), -(-k // cfg.block_k)
        while split < SPLITS[-1] and 2 * split * blocks <= 2 * sms and steps // (2 * split) >= _MIN_STEPS:
            split *= 2
    return cfg, split


def count(m: int, n: int, cfg: Config) -> int:
    """Tiles of Y."""
    return -(-m // cfg.block_m) * -(-n // cfg.block_n)


class AttentionTile(NamedTuple):
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


#: By the largest number of queries of the bucket; results never depend on the tile. On sm_120, ptxas aims at three
#: blocks of 4 warps at once and spills with 64 x 64.
ATTENTION_TILES = {16: AttentionTile(16, 64, 4, 3), 64: AttentionTile(64, 32, 4, 3), ANY: AttentionTile(128, 64, 8, 3)}


def attention_tile(queries: int, pairs: bool) -> AttentionTile:
    """The tile for this many queries; `pairs`: the mask or the bias holds a value for each query and key.

    tests/test_triton_compile_attention.py compiles them and checks that nothing spills: there are registers for 32 keys
    of such a mask or bias, not for 64.
    """
    tile = next(tile for limit, tile in ATTENTION_TILES.items() if queries <= limit)
    return tile._replace(block_n=32) if pairs else tile


#: Tiles of the backward pass by the bytes of the gradient's type, then by the padded head_dim: that of the queries'
#: kernel and that of the keys'. Not by lengths, and not by the mask: the order of float sums shall not depend on them.
#: Registers decide: 64 keys at a time spill beside a mask or bias per pair, and fp32 has no tensor cores to feed.
_GRAD_KEYS = AttentionTile(32, 32, 4, 2)
_GRAD_FP32 = AttentionTile(16, 32, 8, 1)
ATTENTION_GRAD_TILES = {
    2: {
        32: (AttentionTile(64, 32, 4, 2), _GRAD_KEYS),
        64: (AttentionTile(64, 32, 4, 2), _GRAD_KEYS),
        128: (AttentionTile(32, 32, 4, 2), AttentionTile(32, 32, 4, 1)),
    },
    4: {32: (_GRAD_FP32, _GRAD_FP32), 64: (_GRAD_FP32, _GRAD_FP32), 128: (AttentionTile(16, 16, 8, 1), _GRAD_FP32)},
}


def attention_grad_tiles(dim: int, element_size: int, pairs: bool) -> tuple[AttentionTile, AttentionTile]:
    """The tiles of the backward pass: of the kernel that gives dQ, and of the one that gives dK and dV.

    `pairs`: the mask or the bias holds a value for each query and key. It decides on the stages, which no sum depends
    on: without it ptxas aims at three blocks at once, and with a second stage it spills to get there.
    tests/test_triton_compile_attention.py compiles them and checks that nothing spills.
    """
    tiles = ATTENTION_GRAD_TILES[element_size][dim]
    if pairs or dim > 64:
        return tiles
    return tiles[0]._replace(num_stages=1), tiles[1]._replace(num_stages=1)
