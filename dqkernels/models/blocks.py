"""Attention and feed-forward of packed BART models and their relatives (`FAMILIES`) in fused steps.

    patch(model)        # in place; `isinstance`, names, `state_dict`, hooks and saving stay what they were
    unpatch(model)      # the classes of before

One launch takes Q, K and V from one quantized input, a LayerNorm is computed by the launch that reads it, GELU or ReLU
and the residual are added in the epilogue of the GEMM before them (docs/design.md, section 3). Every module changes its
class to a subclass of its own, with the same name, per instance. Where a step cannot be fused (something in it wants a
gradient, a hook watches a module in the middle, a linear is not packed) it is made of calls of its modules, and under
dropout or autocast the whole layer runs as transformers wrote it.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import torch
from torch import nn

from dqkernels.config import DQConfig
from dqkernels.kernels import native
from dqkernels.models import native_layer, norms, steps

logger = logging.getLogger("dqkernels")

#: `model_type` -> prefix of its classes, and whether a LayerNorm stands behind its block (post) or before it (pre).
FAMILIES = {
    "bart": ("Bart", "post"),
    "mbart": ("MBart", "pre"),
    "marian": ("Marian", "post"),
    "pegasus": ("Pegasus", "pre"),
    "plbart": ("PLBart", "post"),
    "m2m_100": ("M2M100", "pre"),  # NLLB too
    "blenderbot": ("Blenderbot", "pre"),
    "blenderbot-small": ("BlenderbotSmall", "post"),
}
#: What the forwards that are replaced here take, and in which order; the cache under one of the names below. A further
#: parameter would end in `**kwargs` and be ignored without a word: such a transformers is refused.
_PARTS = {
    "Attention": ("self", "hidden_states", "key_value_states", "<cache>", "attention_mask", "kwargs"),
    "EncoderLayer": ("self", "hidden_states", "attention_mask", "kwargs"),
    "DecoderLayer": (
        "self", "hidden_states", "attention_mask", "encoder_hidden_states", "encoder_attention_mask", "<cache>",
        "use_cache", "kwargs",
    ),
}  # fmt: skip
#: Name of the cache in a forward -> the releases of transformers that give it that name.
_CACHES = {"past_key_values": "5.17 to 5.23", "cache": "5.24"}


def patch(model: nn.Module) -> nn.Module:
    """Makes every attention and every layer of `model` a fused one, in place.

    Args:
        model: of transformers and of `FAMILIES`, or a module that contains such models; packed by `quantize_` or about
            to be: layers in float run as before.

    Returns:
        `model` itself.

    Raises:
        ValueError: if it has no attention of these families, or a forward of theirs takes what fused blocks do not
            know, as in a later transformers; nothing is changed then.
    """
    for module in _fusable(model):
        if not is_fused(module):
            module.__class__ = _fused_class(type(module))
    norms.patch(model, {file_of(family): prefix for family, (prefix, _) in FAMILIES.items()})
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Undoes `patch`; without it, nothing happens. Returns `model` itself.

    Raises:
        ValueError: if somebody keeps the fused `forward` of a module (an accelerate hook put on after `patch`); nothing
            is changed then.
    """
    fused = [(name, module) for name, module in model.named_modules() if is_fused(module)]
    for name, module in fused:
        for key, value in module.__dict__.items():
            if _is_fused_forward(module, value):
                raise ValueError(
                    f"{name}.{key} holds the fused forward and would go on calling it: remove the hook that was put on "
                    "after patch, then unpatch"
                )
    for _, module in fused:
        module.__class__ = type(module).dqkernels_base
        native_layer.forget(module)
    norms.unpatch(model)
    return model


def check(model: nn.Module, config: DQConfig) -> None:
    """Raises what `apply` would raise, and changes nothing; works on the meta device."""
    if config.fused and config.strict and _bases(model):
        _fusable(model)


def apply(model: nn.Module, config: DQConfig) -> None:
    """`patch` for fused="auto" where the model has something to fuse, `unpatch` for fused=False.

    Raises:
        ValueError: under `strict`, for a transformers that fused blocks do not know. Otherwise that is a warning, and
            the model runs module by module; `describe` says so.
    """
    if not config.fused:
        unpatch(model)
    elif _bases(model):
        try:
            patch(model)
        except ValueError as error:
            if config.strict:
                raise
            logger.warning("%s is not fused: %s", type(model).__name__, error)


def file_of(family: str) -> str:
    """The module of transformers that holds the classes of a `model_type`."""
    folder = family.replace("-", "_")
    return f"transformers.models.{folder}.modeling_{folder}"


def is_fused(module: nn.Module) -> bool:
    """Whether `patch` changed this module."""
    return "dqkernels_base" in type(module).__dict__


def fused_layers(model: nn.Module) -> list[nn.Module]:
    """The fused encoder and decoder layers inside `model`."""
    return [module for module in model.modules() if is_fused(module) and isinstance(module, _Layer)]


def example(layer: nn.Module, batch: int, tokens: int) -> tuple:
    """Arguments for `layer.forward` of a fused layer: zeros [batch, tokens, d_model], as the source as well."""
    like = layer.self_attn_layer_norm.weight
    x = torch.zeros(batch, tokens, layer.embed_dim, dtype=like.dtype, device=like.device)
    return (x, None, x, None) if isinstance(layer, _DecoderLayer) else (x, None)


def describe(model: nn.Module) -> str:
    """How many layers are fused, and what keeps steps of them apart; or why none is. In words."""
    layers = fused_layers(model)
    if not layers:
        try:
            _fusable(model)
        except ValueError as error:
            return f"not fused: {error}"
        return "not fused: fused=False, or unpatched"
    reasons: dict[str, int] = {}
    for layer in layers:
        for reason in dict.fromkeys(_obstacles(layer)):
            reasons[reason] = reasons.get(reason, 0) + 1
    text = f"{len(layers)} fused layers"
    return text + "".join(f"; {reason} in {count}" for reason, count in reasons.items())


def describe_encoder(model: nn.Module) -> str:
    """How many encoder layers are one call of the compiled core each, and why not the others; empty where there is no
    such core, or none is on a CPU."""
    layers = [each for each in fused_layers(model) if isinstance(each, _EncoderLayer)]
    on_cpu = [each for each in layers if next(each.parameters()).device.type == "cpu"]
    if not on_cpu or native.native() is None:
        return ""
    training = "in training mode the modules run one by one"
    found = [training if each._modules_run() else native_layer.why_not(each) for each in on_cpu]
    whole = found.count(None)
    text = [f"{whole} of the encoder in one native call each"] if whole else []
    reasons = dict.fromkeys(reason for reason in found if reason is not None)
    return "; ".join([*text, *(f"{found.count(each)} of the encoder step by step ({each})" for each in reasons)])


def _obstacles(layer: nn.Module) -> Iterator[str]:
    if layer._modules_run():
        yield "in training mode the modules run one by one"
    if "forward" in layer.__dict__ and not any(_is_fused_forward(layer, each) for each in layer.__dict__.values()):
        yield "a forward put on it before patch runs instead"
    for name, module in layer.named_modules():
        if name and steps.hooked(module):
            yield f"a hook keeps {name} apart"
        elif name.endswith("_layer_norm") and not steps.plain_norm(module):
            yield f"{name} is a {type(module).__name__}"
        elif name.rpartition(".")[2] in ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"):
            if not steps.packed(module):
                float_ = type(module) is nn.Linear
                yield f"{name} is in float" if float_ else f"{name} is a {type(module).__name__}"
        elif name.endswith("_attn"):
            if not is_fused(module):
                yield f"{name} has a forward of its own"
            sharing = ("k_proj", "v_proj") if name == "encoder_attn" else ("q_proj", "k_proj", "v_proj")
            linears = [getattr(module, each) for each in sharing]
            whole = all(steps.packed(each) and not steps.hooked(each) for each in linears)
            if whole and (why := steps.apart(linears)) is not None:
                yield f"{', '.join(sharing)} of {name} are launches of their own ({why})"
    if not steps.hooked(layer.activation_fn) and steps.epilogue(layer.activation_fn) is None:
        yield f"{type(layer.activation_fn).__name__} has no epilogue"


# ---- classes ------------------------------------------------------------------------------------------------


def _is_fused_forward(module: nn.Module, value: Any) -> bool:
    """Whether somebody keeps the fused forward of `module` as `value`, to call it."""
    return getattr(value, "__func__", None) is type(module).forward


def _bases(model: nn.Module) -> dict[nn.Module, type]:
    """Every module of `model` that can be fused -> the class of transformers that it is."""
    return {module: base for module in model.modules() if (base := _base_of(module)) is not None}


def _fusable(model: nn.Module) -> list[nn.Module]:
    """The modules that `patch` changes; raises ValueError as it says."""
    found = _bases(model)
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no attention of {', '.join(FAMILIES)}, or a forward of its own: "
            "nothing to fuse. Its packed linears run as they are"
        )
    for base in dict.fromkeys(found.values()):
        _cache_name(base)
    return list(found)


def _base_of(module: nn.Module) -> type | None:
    """The class of transformers that `module` is, if its forward is that class's (or was, before `patch`)."""
    cls = getattr(type(module), "dqkernels_base", type(module))
    for family, (prefix, _) in FAMILIES.items():
        modeling = sys.modules.get(file_of(family))
        for part in _PARTS if modeling is not None else ():
            base = getattr(modeling, prefix + part)
            if issubclass(cls, base):
                own = _own_forward(cls)
                # Not where somebody has put another function into the class of transformers.
                return base if own is _own_forward(base) and own.__module__ == modeling.__name__ else None
    return None


def _own_forward(cls: type):
    """`cls.forward` without the wrapper that transformers puts around every layer's, for gradient checkpointing."""
    function = cls.forward
    while getattr(function, "__code__", None) and function.__code__.co_name == "forward_with_checkpointing":
        function = function.__wrapped__
    return function


def _cache_name(base: type) -> str:
    """What `base`, a class of transformers, calls the cache in its forward.

    Raises:
        ValueError: if that forward has another parameter than these classes know, lacks one, or has them in another
            order.
    """
    part = next(part for part in _PARTS if base.__name__.endswith(part))
    found = tuple(inspect.signature(base.forward).parameters)
    for name in _CACHES:
        if found == tuple(name if each == "<cache>" else each for each in _PARTS[part]):
            return name
    known = {*_PARTS[part], *_CACHES}
    strange = ", ".join(each for each in found if each not in known)
    raise ValueError(
        f"{base.__name__}.forward of transformers {metadata.version('transformers')} takes ({', '.join(found)}): fused "
        f"blocks do not know {strange or 'these in this order'}. They are made for transformers "
        f"{' and '.join(_CACHES.values())}; quantize_ without patch works: the packed linears run as they are"
    )


@functools.cache
def _fused_class(base: type) -> type:
    """A subclass of `base`, under its name (wrap policies look layers up by it), that computes in fused steps."""
    mixin = {"Attention": _Attention, "EncoderLayer": _EncoderLayer, "DecoderLayer": _DecoderLayer}
    for cls in base.__mro__:
        for family, (prefix, order) in FAMILIES.items():
            if cls.__module__ == file_of(family):
                fields = {
                    "dqkernels_base": base,
                    "dqkernels_post": order == "post",
                    # As the layers of each call their attention: a hook may look for it.
                    "dqkernels_by_name": order == "pre",
                    "dqkernels_cache": _cache_name(cls),
                    "__module__": base.__module__,
                    "__qualname__": base.__qualname__,
                    "__doc__": base.__doc__,
                }
                return type(base.__name__, (mixin[cls.__name__.removeprefix(prefix)], base), fields)
    raise TypeError(f"{base.__name__} is not of {', '.join(FAMILIES)}")


def _empty(base: type) -> nn.Module:
    """What pickle and copy fill: an instance of the fused class, which they cannot find by its name."""
    cls = _fused_class(base)
    return cls.__new__(cls)


class _Fused:
    """What all fused classes share: how they are pickled and copied."""

    def __reduce_ex__(self, protocol):
        _, _, *rest = super().__reduce_ex__(protocol)
        return _empty, (type(self).dqkernels_base,), *rest


class _Attention(_Fused):
    """Multi-head attention whose Q, K and V are one launch, and whose output takes the residual in its epilogue."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        key_value_states: torch.Tensor | None = None,
        past: Any | None = None,
        attention_mask: torch.Tensor | None = None,
        *,
        norm: nn.LayerNorm | None = None,
        add: str | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As of the class it replaces, for `norm(hidden_states)`.

        Args:
            hidden_states: [batch, queries, embed_dim], before `norm`.
            key_value_states: of cross-attention, [batch, keys, embed_dim].
            past: the cache, by position; by keyword under the name that this transformers gives it.
            norm: a LayerNorm of the input; None: the input as it is.
            add: what the output is added to: `input`, `normed` (the input behind `norm`), or None.

        Returns:
            [batch, queries, embed_dim] and the attention weights, if the implementation has any.
        """
        cross = key_value_states is not None
        past = _take_cache(self, past, kwargs)
        cache, filled = _cache(past, cross, self.layer_idx)
        if not cross:
            normed, (query, key, value) = steps.project(hidden_states, (self.q_proj, self.k_proj, self.v_proj), norm)
        else:
            normed, (query,) = steps.project(hidden_states, (self.q_proj,), norm)
            if not filled:
                _, (key, value) = steps.project(key_value_states, (self.k_proj, self.v_proj))
        query = self._heads(query)
        if filled:
            key, value = cache.layers[self.layer_idx].keys, cache.layers[self.layer_idx].values
        else:
            key, value = self._heads(key), self._heads(value)
            if cache is not None:
                more = {"kwargs": kwargs} if type(self).dqkernels_cache == "cache" else {}  # of a paged cache
                key, value = cache.update(key, value, self.layer_idx, **more)
                if cross and cache is not past:
                    past.is_updated[self.layer_idx] = True
        attend = _attention_function(self)
        dropout = self.dropout if self.training else 0.0
        out, weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )  # fmt: skip
        out = out.reshape(*hidden_states.shape[:-1], -1)
        base = {None: None, "input": hidden_states, "normed": normed}[add]
        return steps.project_onto(out, self.out_proj, base), weights

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, embed_dim] -> [batch, heads, tokens, head_dim], a view."""
        return x.view(*x.shape[:-1], -1, self.head_dim).transpose(1, 2)


class _Layer(_Fused):
    """A layer of blocks.

    Pre-norm: each is `x + f(norm(x))`. Post-norm: `norm(x) + f(norm(x))`, of the norm behind the block before it.
    """

    def _modules_run(self) -> bool:
        """Whether training mode keeps the steps apart."""
        # A layer that is trained runs its modules without gradients too: reentrant checkpointing makes its first pass
        # so, and the norms of fused steps may have other last bits than torch's.
        trained = self.training and any(parameter.requires_grad for parameter in self.parameters())
        dropping = self.training and (self.dropout > 0 or self.activation_dropout > 0)
        return trained or dropping

    def _fusable(self, hidden_states: torch.Tensor) -> bool:
        return not self._modules_run() and not steps.under_autocast(hidden_states)

    def _norms(self, *norms: nn.Module) -> tuple[list[nn.Module | None], nn.Module | None, str]:
        """The norm before each block, the one behind the last, and what a block's output is added to."""
        if type(self).dqkernels_post:
            return [None, *norms[:-1]], norms[-1], "normed"
        return list(norms), None, "input"

    def _attend(self, attention: nn.Module, x: torch.Tensor, norm: nn.Module | None, add: str, **kwargs: Any):
        if is_fused(attention) and not steps.hooked(attention):
            return attention(x, norm=norm, add=add, **kwargs)[0]
        # Who watches this attention sees what transformers would show: the input behind the norm, the output alone.
        normed = x if norm is None else norm(x)
        given = {"hidden_states": normed} if type(self).dqkernels_by_name else {}
        out = attention(*([] if given else [normed]), **given, **kwargs)[0]
        return (x if add == "input" else normed) + out

    def _feed_forward(self, x: torch.Tensor, norm: nn.Module | None, add: str) -> torch.Tensor:
        normed, (inner,) = steps.project(x, (self.fc1,), norm, self.activation_fn)
        return steps.project_onto(inner, self.fc2, x if add == "input" else normed)


class _EncoderLayer(_Layer):
    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any):
        if not self._fusable(hidden_states):
            return super().forward(hidden_states, attention_mask, **kwargs)
        x = native_layer.run(self, hidden_states, attention_mask, kwargs)
        if x is None:
            x = self._stepwise(hidden_states, attention_mask, **kwargs)
        if x.dtype == torch.float16:
            # BART's and Marian's ask first whether anything is infinite, which stops the host once per layer.
            limit = torch.finfo(torch.float16).max - 1000
            x = x.clamp(-limit, limit)
        return x

    def _stepwise(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs: Any):
        before, behind, add = self._norms(self.self_attn_layer_norm, self.final_layer_norm)
        x = self._attend(self.self_attn, hidden_states, before[0], add, attention_mask=attention_mask, **kwargs)
        x = self._feed_forward(x, before[1], add)
        return x if behind is None else steps.behind(x, behind, self.fc2)


class _DecoderLayer(_Layer):
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        past: Any | None = None,
        use_cache: bool | None = True,
        **kwargs: Any,
    ):
        cache = {type(self).dqkernels_cache: _take_cache(self, past, kwargs)}
        if not self._fusable(hidden_states):
            source = {
                "encoder_hidden_states": encoder_hidden_states,
                "encoder_attention_mask": encoder_attention_mask,
                "use_cache": use_cache,
                **cache,
            }
            return super().forward(hidden_states, attention_mask, **source, **kwargs)
        cross = encoder_hidden_states is not None
        norms = [self.self_attn_layer_norm, *([self.encoder_attn_layer_norm] if cross else []), self.final_layer_norm]
        before, behind, add = self._norms(*norms)
        kwargs |= cache
        x = self._attend(self.self_attn, hidden_states, before[0], add, attention_mask=attention_mask, **kwargs)
        if cross:
            given = {"key_value_states": encoder_hidden_states, "attention_mask": encoder_attention_mask}
            x = self._attend(self.encoder_attn, x, before[1], add, **given, **kwargs)
        x = self._feed_forward(x, before[-1], add)
        return x if behind is None else steps.behind(x, behind, self.fc2)


def _take_cache(module: nn.Module, past: Any | None, kwargs: dict[str, Any]) -> Any | None:
    """The cache out of a forward's keywords, or `past` by position. The old name is taken too, as transformers does.

    What is called `cache` in the keywords of a transformers of the old name is another thing, and stays there.
    """
    for name in dict.fromkeys((type(module).dqkernels_cache, "past_key_values")):
        found = kwargs.pop(name, None)
        past = found if past is None else past
    return past


def _cache(cache: Any | None, cross: bool, layer: int) -> tuple[Any | None, bool]:
    """The cache of this attention, and whether its keys and values are all there: those of the source."""
    if hasattr(cache, "is_updated"):  # an EncoderDecoderCache
        filled = cross and bool(cache.is_updated.get(layer))
        return (cache.cross_attention_cache if cross else cache.self_attention_cache), filled
    return cache, False


def _attention_function(module: nn.Module):
    """What the model's config names, as transformers looks it up."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    base = next(cls for cls in type(module).__mro__ if cls.__module__.startswith("transformers.models."))
    eager = sys.modules[base.__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, eager)
