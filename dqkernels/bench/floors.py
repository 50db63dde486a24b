"""The least time a GEMM, or any op, can take: bytes over bandwidth or operations over peak, whichever is more.

`floor = max(bytes / bandwidth, 2 M N K / peak)` with bytes = packed weights + input + output + scales.
Peaks are the vendor's dense figures; a card that is not listed has no floor, and a guess is never printed.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Device:
    """What a machine can do at best.

    Attributes:
        name: as printed.
        gb_per_s: memory bandwidth in 10^9 bytes a second.
        int8_tops: dense int8 peak in 10^12 operations a second, or None.
        half_tops: dense fp16 and bf16 peak, or None.
        source: where the figures come from.
    """

    name: str
    gb_per_s: float
    int8_tops: float | None
    half_tops: float | None
    source: str = "datasheet"


A100_40 = Device("A100 40GB", 1555, 624, 312)
A100_80_SXM = Device("A100 80GB SXM", 2039, 624, 312)
A100_80_PCIE = Device("A100 80GB PCIe", 1935, 624, 312)
H100_SXM = Device("H100 80GB SXM", 3350, 1979, 989)
H100_PCIE = Device("H100 80GB PCIe", 2039, 1513, 756)
H200 = Device("H200", 4800, 1979, 989)

# Whole names as the driver spells them: a MIG slice or a power-capped variant carries more words and has no
# floor.
_BY_NAME = (
    (r"(NVIDIA )?A100-(SXM4|PCIE)-40GB", A100_40),
    (r"(NVIDIA )?A100-SXM4-80GB", A100_80_SXM),
    (r"(NVIDIA )?A100 80GB PCIe", A100_80_PCIE),
    (r"NVIDIA H100 80GB HBM3", H100_SXM),
    (r"NVIDIA H100 PCIe", H100_PCIE),
    (r"NVIDIA H200", H200),
)


def device_of(gpu_name: str | None) -> Device | None:
    """The known card of this name, or None."""
    if gpu_name is None:
        return None
    return next((device for pattern, device in _BY_NAME if re.fullmatch(pattern, gpu_name)), None)


def gemm_bytes(m: int, n: int, k: int, bits: int, group_size: int = -1) -> int:
    """Bytes a GEMM has to move once. 16 and 32 bits: input, weights and output of that width.

    2, 4, 8 bits: packed weights, int8 input, 16-bit output, fp32 scales per output channel and per token; with a
    group_size, one byte more for each group of a row.
    """
    if bits in (16, 32):
        return (n * k + m * k + m * n) * bits // 8
    groups = 0 if group_size == -1 else -(-k // group_size)
    return n * k * bits // 8 + m * k + 2 * m * n + 4 * (n + m) + n * groups


def gemm_ops(m: int, n: int, k: int) -> int:
    """Multiplications and additions."""
    return 2 * m * n * k


@dataclass(frozen=True)
class Floor:
    """Least time, and what sets it: `memory` or `compute`."""

    us: float
    bound: str


def gemm_floor(device: Device | None, m: int, n: int, k: int, bits: int, group_size: int = -1) -> Floor | None:
    """The floor of one GEMM, or None where nothing is known about the device.

    `bits` is that of the weights: 2, 4, 8 run at the int8 peak, 16 at the half peak, 32 by memory alone.
    """
    return op_floor(device, gemm_bytes(m, n, k, bits, group_size), gemm_ops(m, n, k), bits)


def op_floor(device: Device | None, moved_bytes: int, operations: int = 0, bits: int = 8) -> Floor | None:
    """The floor of an op that reads and writes `moved_bytes` in all; None where nothing is known about the device.

    Its `operations` run at the int8 peak for 2, 4, 8 bits and at the half peak for 16; 32 is bound by memory alone.
    """
    if device is None:
        return None
    memory = moved_bytes / (device.gb_per_s * 1e3)
    peak = {16: device.half_tops, 32: None}.get(bits, device.int8_tops)
    compute = operations / (peak * 1e6) if peak else 0.0
    return Floor(memory, "memory") if memory >= compute else Floor(compute, "compute")


def probe_cpu(seconds: float = 0.3, mebibytes: int = 256) -> Device:
    """Measures the copy bandwidth of this CPU (bytes read and written, best copy): memory floors only.

    The best copy, not the median: a floor must not be beaten because a neighbour was busy while it was
    measured.
    """
    source = torch.empty(mebibytes << 18, dtype=torch.int32).random_()
    target = torch.empty_like(source)
    best, end = float("inf"), time.perf_counter() + seconds
    copies = 0
    while copies < 2 or time.perf_counter() < end:
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
        copies += 1
    gb_per_s = 2 * source.numel() * 4 / best / 1e9
    return Device("CPU", gb_per_s, None, None, f"measured copy bandwidth, {torch.get_num_threads()} thread(s)")
