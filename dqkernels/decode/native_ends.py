"""The two ends of a native decode step: from token ids to what the first layer reads, and from what the last layer
gives to logits and the largest of them.

Each is written down where every step of it runs on the compiled core in the bits of the modules; `why_not_*` say what
keeps it with torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from dqkernels import backends, checks
from dqkernels.decode import bart
from dqkernels.decode.caches import Caches
from dqkernels.kernels import cpu_gemm, cpu_norm, cpu_token
from dqkernels.kernels.cpu_step import Tape
from dqkernels.models import norms, steps
from dqkernels.models.native_parts import elsewhere, linear_state, place, tensors, unreadable


def why_not_embed(decoder: nn.Module) -> str | None:
    """Why the embedding stays with torch, in words; None where it is written down."""
    return next(_embed_obstacles(decoder), None)


def why_not_head(decoder: nn.Module, head: nn.Module, bias: torch.Tensor | None) -> str | None:
    """Why the head stays with torch, in words; None where it is written down. bias: behind it, or None."""
    return next(_head_obstacles(decoder, head, bias), None)


def _embed_obstacles(decoder: nn.Module) -> Iterator[str]:
    if (why := _strange(decoder)) is not None:
        yield why
        return
    tokens, table = decoder.embed_tokens, decoder.embed_positions.weight
    if type(tokens).__name__ != "QEmbedding" or not type(tokens).__module__.startswith("dqkernels."):
        yield f"embed_tokens is a {type(tokens).__name__}"
        return
    facts = {"bits": tokens.layer.bits, "group_size": tokens.layer.group_size}
    chosen = backends.choose("qembedding", "cpu", tokens.backend, tokens.strict, **facts).backend
    if chosen != "cpu":
        yield f"qembedding of embed_tokens runs on {chosen}"
    if any(not each.is_contiguous() for each in _table(tokens) if each is not None) or not table.is_contiguous():
        yield "a table is not contiguous"
    if table.dtype != tokens.compute_dtype or table.dtype == torch.float64:
        yield f"positions are {table.dtype}, tokens {tokens.compute_dtype}"
    yield from _norm_obstacles(decoder, "layernorm_embedding")


def _strange(decoder: nn.Module) -> str | None:
    """What this decoder does otherwise than to add positions, from a table, and norm the sum; in words."""
    if bart.skips_padding(decoder.embed_positions):
        return "positions count the tokens that are no padding"
    return "the norm stands before the positions" if bart.norms_tokens(decoder) else None


def _head_obstacles(decoder: nn.Module, head: nn.Module, bias: torch.Tensor | None) -> Iterator[str]:
    if (why := steps.apart((head,))) is not None:
        yield f"of the head {why}"
        return
    yield from unreadable((head,), "the head")
    yield from elsewhere(head, "the head", getattr(decoder, "layer_norm", None) is not None)
    if bias is not None and (not bias.is_contiguous() or bias.dtype == torch.float64):
        yield f"final_logits_bias is {bias.dtype} of strides {list(bias.stride())}"
    yield from _norm_obstacles(decoder, "layer_norm")


def _norm_obstacles(decoder: nn.Module, name: str) -> Iterator[str]:
    norm = getattr(decoder, name, None)
    if norm is None:
        return
    linear = norms.linear_of(norm)
    if linear is None or norm.weight is None:
        yield f"{name} is a {type(norm).__module__}.{type(norm).__name__}"
    elif (why := steps.apart((linear,))) is not None:
        yield f"{name} is torch's: of the linears beside it {why}"
    elif linear.backend not in ("auto", "cpu"):
        yield f"{name} is torch's beside linears that run on {linear.backend}"
    else:
        yield from unreadable((norm,), name)
        yield from elsewhere(linear, name, True)


def state_of(decoder: nn.Module, head: nn.Module, bias: torch.Tensor | None) -> tuple[Any, ...]:
    """What the ends were written down for, as `native_step.state_of`."""
    embed, logits = why_not_embed(decoder) is None, why_not_head(decoder, head, bias) is None
    found: list[Any] = [embed, logits]
    if embed:
        tokens, positions = decoder.embed_tokens, decoder.embed_positions
        found += [None if each is None else place(each) for each in (*_table(tokens), positions.weight)]
        found += [tokens.layer, tokens.embed_scale, tokens.compute_dtype, tokens.num_embeddings]
        found += [_factor(decoder), getattr(positions, "offset", 0), *_norm_state(decoder, "layernorm_embedding")]
    if logits:
        found += [linear_state(head), None if bias is None else place(bias), *_norm_state(decoder, "layer_norm")]
    return tuple(found)


def _norm_state(decoder: nn.Module, name: str) -> tuple[Any, ...]:
    norm = getattr(decoder, name, None)
    return () if norm is None else (norm.eps, *map(place, tensors(norm)))


def _factor(decoder: nn.Module) -> float:
    return getattr(decoder, "embed_scale", 1.0)


def _table(tokens: nn.Module) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    qweight, scale, mult = tokens.packed()
    return qweight, scale, checks.given(mult)


def embed(tape: Tape, decoder: nn.Module, caches: Caches) -> torch.Tensor:
    """Writes down what `Decoder.embed` does for `caches.tokens` at `caches.positions`; its result [rows, 1, width]."""
    tokens, positions = decoder.embed_tokens, decoder.embed_positions
    qweight, scale, mult = _table(tokens)
    layer, width = tokens.layer, tokens.embedding_dim
    rows, kind = tokens.num_embeddings, tokens.compute_dtype
    checks.check_gemm(width, qweight, scale, mult, None, layer.bits, layer.group_size, rows, "none", kind)
    x = cpu_gemm.embedding(
        caches.tokens, qweight, scale, mult, None, bits=layer.bits, four_level=layer.four_level,
        group_size=layer.group_size, embedding_dim=width, embed_scale=tokens.embed_scale, out_dtype=kind, into=tape,
    )  # fmt: skip
    offset = getattr(positions, "offset", 0)
    cpu_token.add_position(x, _factor(decoder), positions.weight.detach(), caches.positions, offset, into=tape)
    norm = getattr(decoder, "layernorm_embedding", None)
    if norm is None:
        return x
    checks.check_norm(norm.weight, norm.bias, width)
    given = (norm.weight, norm.bias, norm.eps, "per_token", None, None, False)
    return cpu_norm.layernorm_quantize(x, None, *given, into=tape)[0]


def adds_early(head: nn.Module, bias: torch.Tensor | None, dtype: torch.dtype) -> bool:
    """Whether the head's own epilogue may add this bias, in the same bits: where nothing is rounded before the sum, and
    the epilogue has no other."""
    return bias is not None and head.bias is None and dtype == torch.float32


def finish(tape: Tape, logits: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Writes down what stands behind the head: fp32 [rows, vocabulary] of [rows, 1, vocabulary], and int64 [rows]."""
    # As torch: a sum of one 16-bit type is rounded to it, that of two types is taken in fp32.
    return cpu_token.finish_logits(logits, bias, bias is not None and bias.dtype == logits.dtype, into=tape)
