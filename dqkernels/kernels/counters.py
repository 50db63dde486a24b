"""Zeros in which the blocks of a CUDA kernel count their arrivals; a kernel leaves them at zero."""

from __future__ import annotations

import threading

import torch

_DEFAULT_STREAM = 0
_lock = threading.Lock()
#: Those of the default streams, by device.
kept: dict[torch.device, torch.Tensor] = {}


def zeros(device: torch.device, stream: int, count: int) -> torch.Tensor:
    """`count` bytes of zeros that nobody else counts in while this call runs.

    Only those of the default stream are kept, which cannot be captured: two graphs never share any. On another stream
    what stays may lie in the pool of a graph to come: torch.compile(mode="reduce-overhead") warms up there and refuses.
    """
    if stream != _DEFAULT_STREAM:
        return torch.zeros(count, dtype=torch.uint8, device=device)
    found = kept.get(device)
    if found is None or found.numel() < count:
        # A larger one does not replace a smaller one under a kernel that still runs: the stream orders them.
        with _lock:
            found = kept[device] = torch.zeros(max(count, 4096), dtype=torch.uint8, device=device)
    return found
