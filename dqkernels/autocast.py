"""Keeps torch's autocast out of our ops.

Their eager forms multiply codes as floats and count on every bit of the product; autocast would do those products in
16 bits and round the sums. Gradients would lose bits as well. So an op runs under autocast as it does without: its
inputs as they come, its output in the dtype it is asked for. (Which dtype that is under autocast, the modules decide.)
"""

from __future__ import annotations

import functools

import torch

_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}


def shield(library: torch.library.Library, names) -> None:
    """Registers every op of `names` (of the namespace `dqkernels`) for autocast, as itself without autocast."""
    for name in names:
        op = getattr(torch.ops.dqkernels, name).default
        for device_type, key in _KEYS.items():
            library.impl(name, functools.partial(_plain, op, device_type), key)


def _plain(op, device_type: str, *args, **kwargs):
    with torch.autocast(device_type, enabled=False):
        return op(*args, **kwargs)


def output_dtype(x: torch.Tensor) -> torch.dtype:
    """What a linear returns for `x` where it stands: the autocast dtype where that is on, else x's own."""
    kind = x.device.type
    known = torch.amp.is_autocast_available(kind)  # not for meta tensors
    return torch.get_autocast_dtype(kind) if known and torch.is_autocast_enabled(kind) else x.dtype
