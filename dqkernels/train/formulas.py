"""What the terms of the distillation loss compute of logits, hidden states and attention maps, a chunk at a time.

Each formula gives its value and its gradient in closed form; `by_chunks` applies it. See `losses` for what is added up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

#: Marks a place in `labels` that is no target token.
IGNORED = -100
#: Values of one chunk, which is what a term holds in fp32, a few times over, beside the tensors that are there anyway:
#: on a CPU it fits the second-level cache, elsewhere it keeps launches few (16 MiB a tensor).
_CHUNK = {"cpu": 1 << 18, "cuda": 1 << 22}


class Formula(Protocol):
    """What one term computes of a chunk. What is masked reaches neither value nor slope, not even as a NaN."""

    def value(self, student: Tensor, *others: Tensor) -> Tensor:
        """fp64 scalar."""

    def slope(self, student: Tensor, *others: Tensor) -> Tensor:
        """The gradient of `value` to the student's tensor, in fp32."""


@dataclass(frozen=True)
class CrossEntropy:
    """(1 - e) * -log p[y] + e * mean of -log p over the vocabulary; logits [N, V], labels [N]."""

    smoothing: float

    def value(self, student: Tensor, labels: Tensor) -> Tensor:
        log_p = functional.log_softmax(student.float(), dim=-1)
        rows = -(1 - self.smoothing) * log_p.gather(1, _words(labels))[:, 0]
        if self.smoothing:
            rows = rows - self.smoothing * log_p.mean(-1)
        return rows.masked_fill(labels == IGNORED, 0).sum(dtype=torch.float64)

    def slope(self, student: Tensor, labels: Tensor) -> Tensor:
        slope = functional.softmax(student.float(), dim=-1)
        if self.smoothing:
            slope -= self.smoothing / slope.shape[-1]
        slope.scatter_add_(1, _words(labels), slope.new_full((len(labels), 1), self.smoothing - 1))
        return slope.masked_fill_((labels == IGNORED)[:, None], 0)


@dataclass(frozen=True)
class Divergence:
    """T^2 * KL(softmax(teacher / T) || softmax(student / T)); [N, V], [N, V], mask [N]."""

    temperature: float

    def value(self, student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
        log_q, log_p = (functional.log_softmax(self._cooled(x), dim=-1) for x in (student, teacher))
        rows = functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
        return self.temperature**2 * rows.masked_fill(~mask, 0).sum(dtype=torch.float64)

    def slope(self, student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
        slope, p = (functional.softmax(self._cooled(x), dim=-1) for x in (student, teacher))
        slope -= p
        return slope.mul_(self.temperature).masked_fill_(~mask[:, None], 0)

    def _cooled(self, logits: Tensor) -> Tensor:
        return logits.float() if self.temperature == 1 else logits.float() / self.temperature


@dataclass(frozen=True)
class Squares:
    """Squared differences where a mask is set, times a factor.

    `places(student, *masks)` gives the mask, which broadcasts to the student's tensor, and the factor: a number, or
    one per entry of the first dimension.
    """

    places: Callable[..., tuple[Tensor, Tensor | float]]

    def value(self, student: Tensor, teacher: Tensor, *masks: Tensor) -> Tensor:
        mask, factor = self.places(student, *masks)
        # The last dimension in fp32, where torch adds in pairs; the rest in fp64, so that parts of a batch add up.
        rows = _differences(student, teacher, mask).square_().sum(-1)
        return (rows.reshape(len(rows), -1).sum(1, dtype=torch.float64) * factor).sum()

    def slope(self, student: Tensor, teacher: Tensor, *masks: Tensor) -> Tensor:
        mask, factor = self.places(student, *masks)
        if isinstance(factor, Tensor):
            factor = factor.reshape(-1, *(1,) * (student.dim() - 1)).float()
        return _differences(student, teacher, mask).mul_(2 * factor)


def token_mean(x: Tensor, mask: Tensor) -> tuple[Tensor, float]:
    """Mean over the last dimension of each token; [..., F], [...]."""
    return mask[..., None], 1 / x.shape[-1]


def head_mean(x: Tensor, queries: Tensor, keys: Tensor) -> tuple[Tensor, float]:
    """Mean over heads of each pair; maps [B, H, T, S], [B, T], [B, S]."""
    return queries[:, None, :, None] & keys[:, None, None, :], 1 / x.shape[1]


def example_mean(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the tokens and features of each example; [B, S, d], [B, S]."""
    return mask[..., None], 1 / (mask.sum(1, dtype=torch.float64).clamp(min=1) * x.shape[-1])


def _differences(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    return (student.float() - teacher.float()).masked_fill_(~mask, 0)


def _words(labels: Tensor) -> Tensor:
    """[N, 1] indices into the vocabulary; any where there is no target."""
    return labels.masked_fill(labels == IGNORED, 0)[:, None]


class _ByChunks(torch.autograd.Function):
    """Sum of `formula.value` over chunks of the first dimension, and its gradient from `formula.slope`.

    Autograd would keep fp32 copies of [B, T, V] and [B, heads, T, S] tensors for every term. Here it keeps the
    tensors it was given, which the models' outputs hold anyway, and one gradient of the student's.
    """

    @staticmethod
    def forward(ctx, formula: Formula, student: Tensor, *others: Tensor) -> Tensor:
        ctx.formula = formula
        ctx.save_for_backward(student, *others)
        value = torch.zeros((), dtype=torch.float64, device=student.device)
        for part in _parts(student):
            value += formula.value(student[part], *(x[part] for x in others))
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        student, *others = ctx.saved_tensors
        result = torch.empty_like(student, memory_format=torch.contiguous_format)
        for part in _parts(student):
            # Scaled in fp32 and rounded once: with fp16 outputs the loss scale keeps small slopes alive.
            result[part] = ctx.formula.slope(student[part], *(x[part] for x in others)).mul_(grad)
        return None, result, *(None for _ in others)


def by_chunks(formula: Formula, student: Tensor, *others: Tensor) -> Tensor:
    """The formula's value, an fp64 scalar that adds up over the first dimension, which all tensors share."""
    return _ByChunks.apply(formula, student, *(x.detach() for x in others))


def _parts(x: Tensor) -> list[slice]:
    rows = max(1, _CHUNK.get(x.device.type, _CHUNK["cuda"]) * x.shape[0] // max(1, x.numel()))
    return [slice(start, start + rows) for start in range(0, x.shape[0], rows)]
