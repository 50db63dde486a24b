"""What the decoder of every family looks like to a decode step: `Layer` and `Decoder`; and what stands in its way."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import nn

from dqkernels import backends
from dqkernels.decode.prepared import Onto, Projection
from dqkernels.models import attention, blocks, steps


@dataclass
class Attend:
    """One attention of a layer.

    Attributes:
        options: how it computes in int8.
        scale: of the scores.
    """

    options: attention.Options
    scale: float

    @classmethod
    def of(cls, module: nn.Module, head_dim: int) -> Attend:
        scale = module.scaling
        return cls(attention.in_use(module), head_dim**-0.5 if scale is None else scale)


@dataclass
class Layer:
    """One decoder layer: the steps that a decode step calls, each of [rows, tokens, width], and what is around them.

    Attributes:
        qkv: x -> what the output is added to, and Q, K, V of self-attention.
        own_out: attention's output and what it is added to -> x.
        cross_q: x -> what the output is added to, and Q of cross-attention.
        cross_kv: the linears of cross-attention's K and V (`sources`).
        cross_out: as `own_out`.
        feed_forward: x -> the layer's output.
        own, cross: the two attentions.
        shared: whether K and V of a source do not depend on how often it is there (a float GEMM's rows may).
    """

    qkv: Projection
    own_out: Onto
    cross_q: Projection
    cross_kv: tuple[nn.Module, nn.Module]
    cross_out: Onto
    feed_forward: Callable[[torch.Tensor], torch.Tensor]
    own: Attend
    cross: Attend
    shared: bool


@dataclass
class Decoder:
    """A decoder and its head.

    Attributes:
        layers: in their order.
        heads, head_dim: of both attentions.
        embed: ids [rows, tokens] and positions int64 [tokens] -> x [rows, tokens, width].
        head: the last layer's output [rows, tokens, width] -> logits of the last token [rows, vocabulary], in the
            model's dtype; a tensor that nobody else holds.
        logits_bias: [vocabulary], what `head` adds behind the linear; None: nothing.
        bias: of self-attention for a query at `position` over the first `keys` keys, [1, heads, 1, keys], or None.
        prefill_bias: the same for the first `tokens` queries over as many keys.
        bias_at: as `bias`, over all keys, for a position that stands in a tensor int64 [1].
        limit: positions it has; None: any.
    """

    layers: list[Layer]
    heads: int
    head_dim: int
    embed: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    head: Callable[[torch.Tensor], torch.Tensor]
    logits_bias: torch.Tensor | None = None
    bias: Callable[[int, int], torch.Tensor] | None = None
    prefill_bias: Callable[[int], torch.Tensor] | None = None
    bias_at: Callable[[torch.Tensor, int], torch.Tensor] | None = None
    limit: int | None = None


def modeling(family: str) -> ModuleType | None:
    """The file of transformers that holds a family's classes, if it was imported."""
    return sys.modules.get(blocks.file_of(family))


def altered(module: nn.Module, file: ModuleType, names: Sequence[str]) -> bool:
    """Whether this is not one of the named classes of transformers, or computes otherwise: a subclass, a patch."""
    kind = getattr(type(module), "dqkernels_base", type(module))
    for name in names:
        base = getattr(file, name, None)
        if base is not None and issubclass(kind, base):
            return kind.forward is not base.forward or base.forward.__module__ != file.__name__
    return True


def obstacles(model: nn.Module, decoder: nn.Module, head: nn.Module) -> Iterator[str]:
    """Why a decoder of any family is not served: something watches it, or it is in training. In words, by name."""
    watched = [("the model", model), ("the head", head)]
    # Its `forward` is what transformers' loop goes through, and this one does not.
    watched += [("model.model", body)] if isinstance(body := getattr(model, "model", None), nn.Module) else []
    watched += [(f"decoder.{name}" if name else "the decoder", module) for name, module in decoder.named_modules()]
    for name, module in watched:
        if steps.hooked(module):
            yield f"a hook watches {name}, or its forward was replaced"
        if module.training:
            yield f"{name} is in training mode"


def attention_obstacles(name: str, module: nn.Module, head_dim: int, device: str, is_beams: bool) -> Iterator[str]:
    """Why this attention is not served: not int8, scales that further tokens would change, no kernel here."""
    options = attention.in_use(module)
    if options is None:
        yield f"{name} is {module.config._attn_implementation}, not int8"
        return
    if options.mode != "per_token":
        yield f"{name} has one scale for all its keys ({options.mode}), which every further token changes"
    facts = {"mode": options.mode, "head_dim": head_dim}
    try:
        backends.choose("quantize_into_cache", device, options.backend, options.strict, **facts)
        backends.choose("qattention_decode", device, options.backend, options.strict, **facts, by_key=is_beams)
    except backends.BackendError as error:
        yield str(error)


def alone(linear: nn.Module) -> bool:
    """Whether a token's output depends on no other: it may with a scale per tensor, or in a float GEMM."""
    return steps.packed(linear) and linear.layer.act_granularity != "per_tensor"
