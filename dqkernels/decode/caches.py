"""Static int8 caches of a decoder, and the few sets of them that a model keeps for its next calls.

Nothing is ever moved in them: a beam that goes on from another one reads the keys of its past where its ancestors wrote
them, by a table of indices (`ancestors`), and beams of one source read that source's keys and values.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from typing import Any

import torch

#: Keys that caches have room for come in steps of this many, so that calls of like length share them.
STEP = 64
#: Keys at first, where a call allows more; they double when they are used up.
FIRST_CAPACITY = 1024
#: Sets of caches that a model keeps between calls, and bytes of all but the last one used.
KEPT_SETS, KEPT_BYTES = 4, 1 << 30


@dataclass(frozen=True)
class Shape:
    """What a set of caches has room for.

    Attributes:
        rows: sequences that are written at once: sources, or beams of them.
        sources: caches of cross-attention; a divisor of `rows`.
        layers, heads, head_dim: of the decoder.
        capacity: keys of self-attention.
        source_capacity: keys of cross-attention.
        device: where they are.
    """

    rows: int
    sources: int
    layers: int
    heads: int
    head_dim: int
    capacity: int
    source_capacity: int
    device: torch.device


def bucket(tokens: int) -> int:
    """Room for `tokens` keys: the next multiple of 64, beyond 1024 of an eighth of the power of two below."""
    step = max(STEP, (1 << max(tokens - 1, 1).bit_length()) // 16)
    return -(-max(tokens, 1) // step) * step


class LayerCache:
    """Keys and values of one attention: int8 [caches, heads, capacity, head_dim], fp32 scales without head_dim."""

    __slots__ = ("k", "k_scale", "v", "v_scale")

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor):
        self.k, self.v = codes.unbind(0)
        self.k_scale, self.v_scale = scales.unbind(0)

    def first(self, keys: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """k, k_scale, v, v_scale of the first `keys` keys, as views."""
        if keys == self.k.shape[2]:
            return self.k, self.k_scale, self.v, self.v_scale
        return self.k[:, :, :keys], self.k_scale[:, :, :keys], self.v[:, :, :keys], self.v_scale[:, :, :keys]


class Caches:
    """The caches of one call, and the small tensors that say what is in them.

    Memory is taken as it comes: what `lengths` and `source_lengths` hide may hold anything.

    Attributes:
        own, cross: a `LayerCache` per decoder layer.
        tokens: int64 [rows, 1], the tokens of a step.
        position: int64 [1], where they stand; `positions` int32 [rows] the same per row, and `lengths` one more.
        ancestors: int32 [rows, capacity], the cache in which each key of a row lies.
        row_numbers: int32 [rows], 0, 1, ...
        source: int32 [rows], the cache of cross-attention that a row reads; None where each has its own.
        source_lengths: int32 [rows], visible keys of a row's source.
        captured: what `graphs` keeps for calls that get this set: graphs over its addresses.
    """

    # A call under inference_mode leaves tensors that one outside may write to.
    @torch.inference_mode(False)
    def __init__(self, shape: Shape):
        self.shape = shape
        rows, device = shape.rows, shape.device
        self.own = self._allocate(rows, shape.capacity)
        self.cross = self._allocate(shape.sources, shape.source_capacity)
        self.tokens = torch.empty((rows, 1), dtype=torch.int64, device=device)
        self.position = torch.empty(1, dtype=torch.int64, device=device)
        self.positions, self.lengths, self.source_lengths = torch.zeros((3, rows), dtype=torch.int32, device=device)
        self.row_numbers = torch.arange(rows, dtype=torch.int32, device=device)
        self.ancestors = self.row_numbers.unsqueeze(1).repeat(1, shape.capacity)
        beams = rows // shape.sources
        self.source = None if beams == 1 else self.row_numbers // beams
        self.captured: dict[bool, tuple[Any, Any]] = {}

    def _allocate(self, caches: int, capacity: int) -> list[LayerCache]:
        layers, heads, head_dim = self.shape.layers, self.shape.heads, self.shape.head_dim
        where = {"device": self.shape.device}
        codes = torch.empty((layers, 2, caches, heads, capacity, head_dim), dtype=torch.int8, **where)
        scales = torch.empty((layers, 2, caches, heads, capacity), dtype=torch.float32, **where)
        return [LayerCache(*pair) for pair in zip(codes, scales, strict=True)]

    @torch.inference_mode(False)
    def grow(self, capacity: int) -> None:
        """Makes room for `capacity` keys of self-attention; what was written stays."""
        before = self.shape.capacity
        self.captured.clear()
        self.shape = replace(self.shape, capacity=capacity)
        for old, new in zip(self.own, own := self._allocate(self.shape.rows, capacity), strict=True):
            for tensor, target in zip(old.first(before), new.first(before), strict=True):
                target.copy_(tensor)
        self.own = own
        ancestors = self.row_numbers.unsqueeze(1).repeat(1, capacity)
        ancestors[:, :before] = self.ancestors
        self.ancestors = ancestors

    def cache_bytes(self) -> int:
        """Of keys, values and their scales."""
        shape = self.shape
        keys = shape.rows * shape.capacity + shape.sources * shape.source_capacity
        return keys * shape.layers * shape.heads * 2 * (shape.head_dim + 4)

    def workspace_bytes(self) -> int:
        """Of the small tensors, and of captured steps."""
        small = (self.tokens, self.position, self.positions, self.lengths, self.source_lengths, self.row_numbers)
        small += (self.ancestors, *([] if self.source is None else [self.source]))
        graphs = sum(captured.pool_bytes for _, captured in self.captured.values())
        return sum(t.numel() * t.element_size() for t in small) + graphs


class Pool:
    """Sets of caches that no call uses at the moment. Two calls at once never get the same one."""

    def __init__(self):
        self._lock = threading.Lock()
        self._idle: list[Caches] = []  # the last used one stands last

    def take(self, shape: Shape) -> Caches:
        """A set of exactly this shape: one that is idle, or a new one."""
        with self._lock:
            for i in range(len(self._idle) - 1, -1, -1):
                if self._idle[i].shape == shape:
                    return self._idle.pop(i)
        return Caches(shape)

    def give(self, caches: Caches) -> None:
        """Takes a set back; the ones that were not used for longest go, above `KEPT_SETS` and `KEPT_BYTES`."""
        with self._lock:
            self._idle.append(caches)
            while len(self._idle) > KEPT_SETS or (
                len(self._idle) > 1 and sum(each.cache_bytes() for each in self._idle[:-1]) > KEPT_BYTES
            ):
                self._idle.pop(0)

    def clear(self) -> None:
        """Drops every idle set."""
        with self._lock:
            self._idle.clear()

    def idle(self) -> list[Caches]:
        """The idle sets, the last used one last."""
        with self._lock:
            return list(self._idle)
