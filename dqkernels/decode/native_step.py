"""A decode step as one call of the compiled core, on a CPU: no Python and no torch between its kernels.

The calls that `Step` makes layer by layer are written down once per set of caches (`cpu_step.Tape`): the same kernels
over the same operands in the same order, hence the same bits. So are its two ends where they can be (`native_ends`):
token ids in, logits and the largest of them out.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import nn

from dqkernels import backends, checks
from dqkernels.decode import native_ends
from dqkernels.decode.caches import Caches, LayerCache
from dqkernels.decode.layers import Attend, Decoder
from dqkernels.decode.step import Step
from dqkernels.kernels import cpu_attention, cpu_gemm, cpu_norm, native
from dqkernels.kernels.cpu_step import Tape
from dqkernels.models import attention, blocks, steps
from dqkernels.models.native_parts import (
    checked,
    elsewhere,
    format_of,
    input_of,
    linear_state,
    place,
    tensors,
    unreadable,
)


def why_not(decoder: nn.Module, is_beams: bool = False) -> str | None:
    """Why the layers of a decoder that is served cannot be one native call, in words; None where they can."""
    if native.native() is None:
        return native.why_absent()
    return next(_obstacles(decoder, is_beams), None)


def describe(model: nn.Module, file: ModuleType) -> str:
    """How much of a step of this model is one native call, and why not the rest, in words. file: knows its family."""
    decoder, head = file.parts(model)
    reason = why_not(decoder)
    if reason is not None:
        return f"layer by layer ({reason})"
    bias = file.prepare(model).logits_bias
    ends = {"embedding": native_ends.why_not_embed(decoder), "head": native_ends.why_not_head(decoder, head, bias)}
    apart = [f"its {name} by torch ({reason})" for name, reason in ends.items() if reason is not None]
    return ", ".join(["the layers of a step in one native call", *apart]) if apart else "a step in one native call"


def _obstacles(decoder: nn.Module, is_beams: bool) -> Iterator[str]:
    for i, layer in enumerate(getattr(decoder, "layers", ())):
        name = f"decoder.layers.{i}"
        if not blocks.is_fused(layer):
            yield f"{name} is not fused"
            return
        for linears, norm, label in _groups(layer):
            if (why := steps.apart(linears)) is not None:
                yield f"{label} of {name} are launches of their own ({why})"
                return
            if norm is not None and not steps.plain_norm(norm):
                yield f"a norm of {name} is a {type(norm).__name__}, or has no weight"
            yield from unreadable((*linears, *([] if norm is None else [norm])), f"{label} of {name}")
            yield from elsewhere(linears[0], f"{label} of {name}", norm is not None)
        if steps.epilogue(layer.activation_fn) is None:
            yield f"{type(layer.activation_fn).__name__} of {name} has no epilogue"
        for which in ("self_attn", "encoder_attn"):
            module = getattr(layer, which)
            options = attention.in_use(module)
            facts = {"mode": options.mode, "head_dim": module.head_dim}
            for op, more in (("quantize_into_cache", {}), ("qattention_decode", {"by_key": is_beams})):
                chosen = backends.choose(op, "cpu", options.backend, options.strict, **facts, **more).backend
                if chosen != "cpu":
                    yield f"{op} of {name}.{which} runs on {chosen}"
    if not getattr(decoder, "layers", None):
        yield "its blocks are not fused"


def _groups(layer: nn.Module) -> list[tuple[tuple[nn.Module, ...], nn.Module | None, str]]:
    """The linears of a decoder layer that share an input, the norm before them (or behind the last), and a name."""
    own, cross = layer.self_attn, layer.encoder_attn
    norms = [layer.self_attn_layer_norm, layer.encoder_attn_layer_norm, layer.final_layer_norm]
    before = [None, *norms[:2]] if type(layer).dqkernels_post else norms
    return [
        ((own.q_proj, own.k_proj, own.v_proj), before[0], "Q, K and V"),
        ((own.out_proj,), None, "self_attn.out_proj"),
        ((cross.q_proj,), before[1], "encoder_attn.q_proj"),
        ((cross.out_proj,), None, "encoder_attn.out_proj"),
        ((layer.fc1,), before[2], "fc1"),
        ((layer.fc2,), norms[2] if type(layer).dqkernels_post else None, "fc2"),
    ]


def state_of(decoder: nn.Module, head: nn.Module, bias: torch.Tensor | None) -> tuple[Any, ...] | None:
    """What a tape was written down for: every tensor it reads, and how it computes with them; None for a decoder that
    has no native step, whatever its tensors are. The same where a tape may be run again: it holds the memory that it
    reads, so that no other tensor can come to lie there. And the same where `why_not` would find what it found, as long
    as nothing watches the decoder (`layers.obstacles`).

    bias: behind the head, or None.
    """
    if native.native() is None or not getattr(decoder, "layers", None):
        return None
    found: list[Any] = [os.environ.get("DQKERNELS_BACKEND")]
    for layer in decoder.layers:
        if not blocks.is_fused(layer):
            return None
        for linears, norm, _ in _groups(layer):
            if not all(map(steps.packed, linears)) or not (norm is None or isinstance(norm, nn.LayerNorm)):
                return None
            found += map(linear_state, linears)
            found.append(None if norm is None else (type(norm), norm.eps, *map(place, tensors(norm))))
        found.append(steps.epilogue(layer.activation_fn))
        found += [
            (attention.in_use(each), each.scaling, each.head_dim) for each in (layer.self_attn, layer.encoder_attn)
        ]
    return *found, native_ends.state_of(decoder, head, bias)


def drop_stale(idle: Iterable[Caches], state: tuple[Any, ...]) -> None:
    """Lets go of the tapes of idle sets that were written down for other weights, which they hold."""
    for caches in idle:
        for beams, kept in list(caches.captured.items()):
            if isinstance(kept[1], Layers) and kept[0] != state:
                caches.captured.pop(beams, None)


class Layers:
    """A decoder's step over one set of caches, written down.

    Attributes:
        x: [rows, 1, width], what the first layer reads; None where the tape makes it of `caches.tokens`. Otherwise
            written by the caller before `tape.run()`.
        out: likewise, what the last layer gives.
        logits: fp32 [rows, vocabulary]; None where the head is torch's.
        best: int64 [rows], the places of the largest, where a run is asked for them; None likewise.
    """

    # A call under inference_mode leaves tensors that one outside may write to.
    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, parts: tuple[nn.Module, nn.Module], prepared: Decoder, caches: Caches, beams: bool, like):
        decoder, head = parts
        self.tape = Tape()
        self.caches, self.ancestors = caches, caches.ancestors if beams else None
        self.tape.set_rows(caches.tokens.view(-1), caches.positions, caches.lengths, self.ancestors)
        self.x = self.logits = self.best = None
        if like is None:
            x = native_ends.embed(self.tape, decoder, caches)
            self.tape.next_layer()
        else:
            x = self.x = torch.empty(like.shape, dtype=like.dtype)
            self.tape.keep(x)
        for i, layer in enumerate(decoder.layers):
            x = self._layer(layer, prepared.layers[i], caches.own[i], caches.cross[i], x)
            self.tape.next_layer()
        self.out = x
        if native_ends.why_not_head(decoder, head, prepared.logits_bias) is None:
            bias, norm = prepared.logits_bias, getattr(decoder, "layer_norm", None)
            early = bias if native_ends.adds_early(head, bias, x.dtype) else None
            logits = self._project(x, (head,), norm, bias=early)[1][0]
            self.logits, self.best = native_ends.finish(self.tape, logits, bias if early is None else None)
        del self.caches, self.ancestors  # which hold this

    @property
    def pool_bytes(self) -> int:
        """What it keeps besides the caches and the weights."""
        return self.tape.pool_bytes + (0 if self.x is None else self.x.nbytes)

    def _layer(self, layer, prepared, own_cache: LayerCache, cross_cache: LayerCache, x: torch.Tensor) -> torch.Tensor:
        post, caches = type(layer).dqkernels_post, self.caches
        own, cross = layer.self_attn, layer.encoder_attn
        groups = [(linears, norm) for linears, norm, _ in _groups(layer)]
        normed, (q, k, v) = self._project(x, *groups[0])
        self._write(prepared.own, own_cache, k, v)
        out = self._attend(prepared.own, q, own_cache, caches.lengths, self.ancestors)
        x = self._onto(out, own.out_proj, normed if post else x)
        normed, (q,) = self._project(x, *groups[2])
        out = self._attend(prepared.cross, q, cross_cache, caches.source_lengths, caches.source)
        x = self._onto(out, cross.out_proj, normed if post else x)
        normed, (hidden,) = self._project(x, *groups[4], steps.epilogue(layer.activation_fn))
        x = self._onto(hidden, layer.fc2, normed if post else x)
        if post:
            norm = layer.final_layer_norm
            checks.check_norm(norm.weight, norm.bias, x.shape[-1])
            given = (norm.weight, norm.bias, norm.eps, "per_token", None, None, False)
            x = cpu_norm.layernorm_quantize(x, None, *given, into=self.tape)[0]
        return x

    def _project(self, x: torch.Tensor, linears, norm: nn.Module | None, activation: str = "none", bias=None):
        """As `steps.project`. bias: in place of that of the linears."""
        parts = [checked(each, x, activation, None) for each in linears]
        if bias is not None:
            parts = [part._replace(bias=bias) for part in parts]
        mode, clip, scale = input_of(linears[0])
        options = {**format_of(linears[0]), "activation": activation, "out_dtype": x.dtype, "into": self.tape}
        if norm is None:
            return x, cpu_gemm.gemm(x, parts, mode=mode, clip=clip, act_scale=scale, **options)
        checks.check_norm(norm.weight, norm.bias, x.shape[-1])
        given = (norm.weight, norm.bias, norm.eps, mode, clip, scale, False)
        y, q, scale, _ = cpu_norm.layernorm_quantize(x, None, *given, into=self.tape)
        return y, cpu_gemm.gemm(q, parts, act_scale=scale, **options)

    def _onto(self, x: torch.Tensor, linear: nn.Module, base: torch.Tensor) -> torch.Tensor:
        """As `steps.project_onto`."""
        mode, clip, scale = input_of(linear)
        options = {**format_of(linear), "activation": "none", "out_dtype": x.dtype, "into": self.tape}
        parts = [checked(linear, x, "none", base)]
        return cpu_gemm.gemm(x, parts, mode=mode, clip=clip, act_scale=scale, **options)[0]

    def _write(self, attend: Attend, cache: LayerCache, k: torch.Tensor, v: torch.Tensor) -> None:
        where = (cache.k, cache.k_scale, cache.v, cache.v_scale, self.caches.positions)
        options = attend.options
        cpu_attention.quantize_into_cache(*map(self._heads, (k, v)), *where, options.mode, options.clip, into=self.tape)

    def _attend(self, attend: Attend, q: torch.Tensor, cache: LayerCache, lengths, source) -> torch.Tensor:
        seen = (cache.k, cache.k_scale, cache.v, cache.v_scale, lengths, source, None, False, attend.scale)
        options = attend.options
        out = cpu_attention.qattention_decode(self._heads(q), *seen, options.mode, options.clip, into=self.tape)
        return out.view(q.shape)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        shape = self.caches.shape
        return x.view(shape.rows, shape.heads, 1, shape.head_dim)


class NativeStep(Step):
    """As `Step`, with a step in one call, or its layers where an end stays with torch; the first tokens are run as they
    come.

    Args:
        parts: the decoder of transformers that `decoder` was prepared from, and its head.
        state: of `state_of`.
    """

    def __init__(
        self,
        decoder: Decoder,
        caches: Caches,
        beams: bool,
        most: int,
        parts: tuple[nn.Module, nn.Module],
        state: tuple[Any, ...],
    ):
        super().__init__(decoder, caches, beams, most)
        self.parts, self.state = parts, state
        self.embeds = native_ends.why_not_embed(parts[0]) is None
        self.finds_best = native_ends.why_not_head(*parts, decoder.logits_bias) is None
        self._layers: Layers | None = None

    def step(self, tokens: torch.Tensor, position: int, keep: bool = True) -> torch.Tensor:
        self._make_room(position + 1)
        caches = self.caches
        # A position that the model does not have is torch's to refuse.
        if self.embeds and (self.decoder.limit is None or position < self.decoder.limit):
            layers = self._written(None)
            layers.tape.run(tokens.to(torch.int64).contiguous(), position, self.wants_best)  # a caller's first: int32
        else:
            self._place(tokens, position)
            x = self.decoder.embed(caches.tokens, caches.position)
            layers = self._written(x)
            layers.x.copy_(x)
            layers.tape.run(wants_best=self.wants_best)
        self.best = layers.best if self.wants_best else None
        if layers.logits is None:
            return self.decoder.head(layers.out).to(torch.float32).contiguous()
        return layers.logits.clone() if keep else layers.logits  # the next step writes over it

    def _written(self, like: torch.Tensor | None) -> Layers:
        """The tape for this call's caches. like: what the first layer reads, where torch makes it."""
        kept = self.caches.captured.get(self.beams)
        if kept is not None and kept[1] is self._layers:  # of this call; `grow` drops it
            return kept[1]
        if kept is None or kept[0] != self.state or not _suits(kept[1].x, like):
            self.caches.captured.pop(self.beams, None)  # its memory first
            kept = self.state, Layers(self.parts, self.decoder, self.caches, self.beams, like)
            self.caches.captured[self.beams] = kept
        self._layers = kept[1]
        return self._layers


def _suits(x: torch.Tensor | None, like: torch.Tensor | None) -> bool:
    return (x is None) == (like is None) and (x is None or x.dtype == like.dtype)
