"""K and V of the sources for cross-attention, which a call of `generate` computes once, ahead of its first step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from dqkernels import fused
from dqkernels.decode.prepared import projection
from dqkernels.kernels import skinny
from dqkernels.models import steps

#: Bytes of K and V up to which several layers are computed together: they lie beside the caches until they are written
#: there. One layer alone may have more.
BYTES = 16 << 20


def keys_and_values(
    linears: Sequence[tuple[nn.Module, nn.Module]], hidden: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """K and V of each layer, in their order; of as many layers in one call as may share one, quantized once.

    Args:
        linears: K's and V's of each layer.
        hidden: [sources, tokens, width], the encoder's output.

    Yields:
        [sources, tokens, heads * head_dim] each.
    """
    for first, last in _groups(linears, hidden):
        together = linears[first:last]
        _, found = projection([linear for pair in together for linear in pair])(hidden)
        yield from zip(found[::2], found[1::2], strict=True)
        del found  # before the next ones are there


def _groups(linears: Sequence[tuple[nn.Module, nn.Module]], hidden: torch.Tensor) -> Iterator[tuple[int, int]]:
    rows = hidden.numel() // max(hidden.shape[-1], 1)
    # On a GPU the CUDA kernel takes a pair of so few rows in one launch, and no more than three linears.
    alone = hidden.device.type != "cpu" and rows <= skinny.ROWS
    first = 0
    while first < len(linears):
        last, own = first + 1, linears[first]
        while not alone and last < len(linears) and 2 * (last - first + 1) <= fused.MAX_PARTS:
            # Asked first: what is not packed may be any module, of whose width nobody knows.
            if steps.apart((*own, *linears[last])) is not None or _bytes(linears[first : last + 1], hidden) > BYTES:
                break
            last += 1
        yield first, last
        first = last


def _bytes(linears: Sequence[tuple[nn.Module, nn.Module]], hidden: torch.Tensor) -> int:
    rows = hidden.numel() // max(hidden.shape[-1], 1)
    return rows * hidden.element_size() * sum(linear.out_features for pair in linears for linear in pair)
