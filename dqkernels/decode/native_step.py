"""A decode step whose layers are one call of the compiled core, on a CPU: no Python and no torch between its kernels.

The calls that `Step` makes layer by layer are written down once per set of caches (`cpu_step.Tape`): the same kernels
over the same operands in the same order, hence the same bits. So is the head, where no norm of torch stands before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from dqkernels import backends, checks
from dqkernels.decode.caches import Caches, LayerCache
from dqkernels.decode.layers import Attend, Decoder
from dqkernels.decode.step import Step
from dqkernels.kernels import cpu_attention, cpu_gemm, cpu_norm, native
from dqkernels.kernels.cpu_step import Tape
from dqkernels.models import attention, blocks, steps


def why_not(decoder: nn.Module, is_beams: bool = False) -> str | None:
    """Why the layers of a decoder that is served cannot be one native call, in words; None where they can."""
    if native.native() is None:
        return native.why_absent()
    return next(_obstacles(decoder, is_beams), None)


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
            yield from _unreadable((*linears, *([] if norm is None else [norm])), f"{label} of {name}")
            yield from _elsewhere(linears[0], f"{label} of {name}", norm is not None)
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


def _elsewhere(linear: nn.Module, label: str, normed: bool) -> Iterator[str]:
    """Which of this linear's steps another backend runs."""
    layer, where = linear.layer, ("cpu", linear.backend, linear.strict)
    found = [("qgemm", {"bits": layer.bits, "group_size": layer.group_size})]
    found += [("layernorm_quantize", {"mode": layer.act_granularity})] if normed else []
    for op, facts in found:
        chosen = backends.choose(op, *where, **facts).backend
        if chosen != "cpu":
            yield f"{op} of {label} runs on {chosen}"


def _unreadable(modules: tuple[nn.Module, ...], label: str) -> Iterator[str]:
    """Which tensors would be copied to be read: the core keeps addresses, and a copy knows no change of its source."""
    for module in modules:
        for tensor in _tensors(module):
            if not tensor.is_contiguous() or tensor.dtype == torch.float64:
                yield f"{label} hold a {tensor.dtype} tensor of strides {list(tensor.stride())}"


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    """What a linear, or a norm, is computed with."""
    given = (module.weight, module.bias) if isinstance(module, nn.LayerNorm) else _part(module, None)[:4]
    scale = getattr(module, "act_scale", None)
    return [tensor for tensor in (*given, scale) if tensor is not None]


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


def plain_head(decoder: nn.Module, head: nn.Module) -> bool:
    """Whether the head is a linear on what the last layer gives, here and now."""
    if getattr(decoder, "layer_norm", None) is not None or steps.apart((head,)) is not None:
        return False
    return not [*_unreadable((head,), "the head"), *_elsewhere(head, "the head", False)]


def state_of(decoder: nn.Module, head: nn.Module) -> tuple[Any, ...]:
    """What a tape was written down for: every tensor it reads, and how it computes with them. The same where it may be
    run again: the tape holds the memory it reads, so that no other tensor can come to lie there."""
    found: list[Any] = [_linear_state(head) if plain_head(decoder, head) else None]
    for layer in decoder.layers:
        for linears, norm, _ in _groups(layer):
            found += map(_linear_state, linears)
            found.append(None if norm is None else (norm.eps, *map(_place, _tensors(norm))))
        found.append(steps.epilogue(layer.activation_fn))
        found += [(attention.in_use(each), each.scaling) for each in (layer.self_attn, layer.encoder_attn)]
    return tuple(found)


def _linear_state(linear: nn.Module) -> tuple[Any, ...]:
    # A static scale is a number of the call that was written down: its value counts. NaN, which is refused, too.
    scale = getattr(linear, "act_scale", None)
    value = None if scale is None else scale.tolist()
    return linear.layer, linear.backend, linear.strict, repr(value), *map(_place, _tensors(linear))


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape)


def drop_stale(idle: Iterable[Caches], state: tuple[Any, ...]) -> None:
    """Lets go of the tapes of idle sets that were written down for other weights, which they hold."""
    for caches in idle:
        for beams, kept in list(caches.captured.items()):
            if isinstance(kept[1], Layers) and kept[0] != state:
                caches.captured.pop(beams, None)


class Layers:
    """The layers of a decoder over one set of caches, written down.

    Attributes:
        x: [rows, 1, width], what the first layer reads; written by the caller before `tape.run()`.
        out: likewise, what the last one gives.
        logits: [rows, 1, vocabulary], what a plain head makes of it; None with another head.
    """

    # A call under inference_mode leaves tensors that one outside may write to.
    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, decoder: nn.Module, head: nn.Module, prepared: Decoder, caches: Caches, beams: bool, like):
        self.tape = Tape()
        self.caches, self.ancestors = caches, caches.ancestors if beams else None
        self.x = torch.empty(like.shape, dtype=like.dtype)
        self.tape.keep(self.x)
        x = self.x
        for i, layer in enumerate(decoder.layers):
            x = self._layer(layer, prepared.layers[i], caches.own[i], caches.cross[i], x)
            self.tape.next_layer()
        self.out = x
        self.logits = self._project(x, (head,), None)[1][0] if plain_head(decoder, head) else None
        del self.caches, self.ancestors  # which hold this

    @property
    def pool_bytes(self) -> int:
        """What it keeps besides the caches and the weights."""
        return self.tape.pool_bytes + self.x.nbytes

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

    def _project(self, x: torch.Tensor, linears, norm: nn.Module | None, activation: str = "none"):
        """As `steps.project`."""
        parts = [_checked(each, x, activation, None) for each in linears]
        mode, clip, scale = _input(linears[0])
        options = {**_format(linears[0]), "activation": activation, "out_dtype": x.dtype, "into": self.tape}
        if norm is None:
            return x, cpu_gemm.gemm(x, parts, mode=mode, clip=clip, act_scale=scale, **options)
        checks.check_norm(norm.weight, norm.bias, x.shape[-1])
        given = (norm.weight, norm.bias, norm.eps, mode, clip, scale, False)
        y, q, scale, _ = cpu_norm.layernorm_quantize(x, None, *given, into=self.tape)
        return y, cpu_gemm.gemm(q, parts, act_scale=scale, **options)

    def _onto(self, x: torch.Tensor, linear: nn.Module, base: torch.Tensor) -> torch.Tensor:
        """As `steps.project_onto`."""
        mode, clip, scale = _input(linear)
        options = {**_format(linear), "activation": "none", "out_dtype": x.dtype, "into": self.tape}
        parts = [_checked(linear, x, "none", base)]
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


def _part(linear: nn.Module, residual: torch.Tensor | None) -> cpu_gemm.Part:
    qweight, scale, mult = linear.packed()
    return cpu_gemm.part(qweight, scale, checks.given(mult), linear.bias, residual, linear.out_features)


def _checked(linear: nn.Module, x: torch.Tensor, activation: str, residual: torch.Tensor | None) -> cpu_gemm.Part:
    """`_part`, after the checks of `ops.qlinear`: what is written down is never checked again."""
    part, layer = _part(linear, residual), linear.layer
    mode, clip, scale = _input(linear)
    checks.check_activation(x, mode, scale, clip)
    size = linear.out_features
    checks.check_gemm(x.shape[-1], *part[:4], layer.bits, layer.group_size, size, activation, x.dtype)
    checks.check_residual(residual, (*x.shape[:-1], size))
    return part


def _input(linear: nn.Module) -> tuple[str, float | None, torch.Tensor | None]:
    return linear.layer.act_granularity, linear.layer.act_clip, getattr(linear, "act_scale", None)


def _format(linear: nn.Module) -> dict[str, Any]:
    layer = linear.layer
    return {"bits": layer.bits, "four_level": layer.four_level, "group_size": layer.group_size}


class NativeStep(Step):
    """As `Step`, with the layers of a step in one call; the first tokens are run as they come.

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

    def step(self, tokens: torch.Tensor, position: int) -> torch.Tensor:
        self._make_room(position + 1)
        self._place(tokens, position)
        caches = self.caches
        x = self.decoder.embed(caches.tokens, caches.position)
        kept = caches.captured.get(self.beams)
        if kept is None or kept[0] != self.state or kept[1].x.dtype != x.dtype:
            caches.captured.pop(self.beams, None)  # its memory first
            kept = self.state, Layers(*self.parts, self.decoder, caches, self.beams, x)
            caches.captured[self.beams] = kept
        layers = kept[1]
        layers.x.copy_(x)
        layers.tape.run()
        if layers.logits is None:
            return self.decoder.head(layers.out).to(torch.float32).contiguous()
        logits = self.decoder.finish(layers.logits[:, -1])
        # A tensor of the caller's own: the next step writes over this one.
        return logits.to(torch.float32, copy=logits.data_ptr() == layers.logits.data_ptr())
