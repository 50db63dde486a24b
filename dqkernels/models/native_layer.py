"""A fused encoder layer as one call of the compiled core, on a CPU: no Python and no torch between its kernels.

The same kernels over the same operands in the same order as the steps of `blocks`, hence the same bits. Where a step is
not the core's, or somebody watches a module in the middle, the layer runs step by step.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from dqkernels import backends, checks, direct
from dqkernels.kernels import cpu_encoder, cpu_gemm, native
from dqkernels.models import steps
from dqkernels.models.attention_options import in_use
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

#: Of an encoder layer's keywords: what says what else shall be returned, by hooks that are looked for themselves.
_FLAGS = frozenset(("output_attentions", "output_hidden_states", "use_cache", "return_dict"))

#: Layer -> what it was made for, and the call of the core, or why there is none.
_MADE: weakref.WeakKeyDictionary[nn.Module, tuple[tuple, cpu_encoder.EncoderLayer | str]] = weakref.WeakKeyDictionary()


def run(layer: nn.Module, x: torch.Tensor, mask: torch.Tensor | None, kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The layer's output for x [batch, tokens, width] in one call; None where it has to run step by step.

    mask: bool [batch, 1 or heads, tokens, tokens], True where a key is visible, or None. kwargs: others of the layer's.
    """
    if x.device.type != "cpu":
        forget(layer)
        return None
    if kwargs.get("output_attentions") or any(value is not None for key, value in kwargs.items() if key not in _FLAGS):
        return None
    if "forward" in layer.__dict__:  # accelerate's, which may bring the weights and take them away again
        return None
    if x.dim() != 3 or x.dtype not in native.DTYPES or not _plain_mask(layer, mask, x):
        return None
    norms = (layer.self_attn_layer_norm, layer.final_layer_norm)
    if not direct.unwatched(x, mask, *(t for norm in norms for t in (norm.weight, norm.bias))):
        return None
    if any(map(steps.hooked, _watchable(layer))) or steps.wants_gradient(*_linears(layer)):
        return None
    state = _state(layer, x.dtype)
    made = _MADE.get(layer)
    if made is None or made[0] != state:
        forget(layer)  # the weights it holds first
        reason = _reason(layer)
        made = state, reason if reason is not None else _make(layer, x.dtype)
        _MADE[layer] = made
    return None if isinstance(made[1], str) else made[1](x, mask)


def forget(layer: nn.Module) -> None:
    """Lets go of the call that was made for this layer, which holds the memory of its weights."""
    _MADE.pop(layer, None)


def why_not(layer: nn.Module) -> str | None:
    """Why a fused encoder layer cannot be one call on a CPU, in words; None where it can."""
    if native.native() is None:
        return native.why_absent()
    if "forward" in layer.__dict__:
        return "a forward was put on it"
    if any(map(steps.hooked, _watchable(layer))):
        return "one of its modules is watched"
    return _reason(layer)


def _reason(layer: nn.Module) -> str | None:
    try:
        return next(_obstacles(layer), None)
    except backends.BackendError as error:  # the steps raise it, naming the module
        return str(error)


def _obstacles(layer: nn.Module) -> Iterator[str]:
    own, options = layer.self_attn, in_use(layer.self_attn)
    if native.native() is None:
        yield native.why_absent()
    if options is None or "dqkernels_base" not in type(own).__dict__:
        yield "its attention is not int8, or not fused"
        return
    if getattr(own, "is_causal", False):
        yield "its attention is causal"
    for linears, norm, label in _groups(layer):
        if (why := steps.apart(linears)) is not None:
            yield f"{label} are launches of their own ({why})"
            return
        yield from unreadable((*linears, *([] if norm is None else [norm])), label)
        for many_rows in (False, True):
            yield from elsewhere(linears[0], label, norm is not None, many_rows=many_rows, where=None)
    if not _fits(layer):
        yield "its parts have widths that do not fit each other"
        return
    for norm in (layer.self_attn_layer_norm, layer.final_layer_norm):
        if not steps.plain_norm(norm):
            yield f"a norm is a {type(norm).__name__}, or has no weight"
            return
        yield from unreadable((norm,), "its norms")
    if steps.epilogue(layer.activation_fn) is None:
        yield f"{type(layer.activation_fn).__name__} has no epilogue"
    facts = {"mode": options.mode, "head_dim": own.head_dim}
    chosen = backends.choose("qattention", "cpu", options.backend, options.strict, **facts).backend
    if chosen != "cpu":
        yield f"qattention runs on {chosen}"


def _width(layer: nn.Module) -> int:
    return layer.self_attn.num_heads * layer.self_attn.head_dim


def _fits(layer: nn.Module) -> bool:
    """Whether each part takes what the one before it gives. The steps see that when they get there, and say so."""
    width, own = _width(layer), layer.self_attn
    inner = layer.fc1.out_features
    wanted = [(each, width, width) for each in (own.q_proj, own.k_proj, own.v_proj, own.out_proj)]
    wanted += [(layer.fc1, width, inner), (layer.fc2, inner, width)]
    return all((each.in_features, each.out_features) == (k, n) for each, k, n in wanted) and all(
        vector is None or vector.shape == (width,)
        for norm in (layer.self_attn_layer_norm, layer.final_layer_norm)
        for vector in (getattr(norm, "weight", None), getattr(norm, "bias", None))
    )


def _groups(layer: nn.Module) -> list[tuple[tuple[nn.Module, ...], nn.Module | None, str]]:
    """The linears that share an input, the norm whose codes they take, and a name."""
    own, post = layer.self_attn, type(layer).dqkernels_post
    first, second = layer.self_attn_layer_norm, layer.final_layer_norm
    return [
        ((own.q_proj, own.k_proj, own.v_proj), None if post else first, "Q, K and V"),
        ((own.out_proj,), None, "out_proj"),
        ((layer.fc1,), first if post else second, "fc1"),
        ((layer.fc2,), None, "fc2"),
    ]


def _linears(layer: nn.Module) -> tuple[nn.Module, ...]:
    own = layer.self_attn
    return own.q_proj, own.k_proj, own.v_proj, own.out_proj, layer.fc1, layer.fc2


def _watchable(layer: nn.Module) -> tuple[nn.Module, ...]:
    norms = layer.self_attn_layer_norm, layer.final_layer_norm
    return layer.self_attn, *_linears(layer), *norms, layer.activation_fn


def _plain_mask(layer: nn.Module, mask: torch.Tensor | None, x: torch.Tensor) -> bool:
    """Whether this is a mask that the core reads as it is; another one is for `attention.int8_attention` to judge."""
    if mask is None:
        return True
    batch, tokens, _ = x.shape
    if mask.dtype != torch.bool or mask.dim() != 4 or mask.device.type != "cpu":
        return False
    wanted = ((1, batch), (1, layer.self_attn.num_heads), (1, tokens), (1, tokens))
    return all(size in sizes for size, sizes in zip(mask.shape, wanted, strict=True))


def _state(layer: nn.Module, dtype: torch.dtype) -> tuple[Any, ...]:
    """What a call was made for: every tensor it reads, and how it computes with them."""
    own, norms = layer.self_attn, (layer.self_attn_layer_norm, layer.final_layer_norm)
    return (
        dtype,
        os.environ.get("DQKERNELS_BACKEND"),
        in_use(own),
        (own.scaling, own.num_heads, own.head_dim, getattr(own, "is_causal", False)),
        steps.epilogue(layer.activation_fn),
        *((norm.eps, *map(place, tensors(norm))) if steps.plain_norm(norm) else None for norm in norms),
        *(linear_state(each) if steps.packed(each) else None for each in _linears(layer)),
    )


def _make(layer: nn.Module, dtype: torch.dtype) -> cpu_encoder.EncoderLayer:
    post, own, options = type(layer).dqkernels_post, layer.self_attn, in_use(layer.self_attn)
    norms = []
    for norm, behind in ((layer.self_attn_layer_norm, own.q_proj), (layer.final_layer_norm, layer.fc1)):
        # Of post-norm the first is followed by the feed-forward, and nobody wants the codes of the second.
        behind = behind if not post else layer.fc1 if norm is layer.self_attn_layer_norm else None
        checks.check_norm(norm.weight, norm.bias, _width(layer))
        how = ("per_token", None, None) if behind is None else input_of(behind)
        norms.append(cpu_encoder.Norm(norm.weight, norm.bias, norm.eps, *how))
    linears = []
    for modules, norm, label in _groups(layer):
        like = torch.empty((1, modules[0].in_features), dtype=dtype)
        activation = steps.epilogue(layer.activation_fn) if label == "fc1" else "none"
        mode, clip, scale = input_of(modules[0])
        how = {**format_of(modules[0]), "activation": activation, "mode": mode, "clip": clip, "act_scale": scale}
        parts: list[cpu_gemm.Part] = [checked(each, like, activation, None) for each in modules]
        linears.append(cpu_encoder.Linears(parts, how, coded=norm is not None))
    return cpu_encoder.EncoderLayer(
        post_norm=post,
        norms=tuple(norms),
        linears=tuple(linears),
        heads=own.num_heads,
        head_dim=own.head_dim,
        softmax_scale=own.scaling,
        mode=options.mode,
        clip=options.clip,
        dtype=dtype,
    )
