"""How this package's loop gets into `model.generate`: a subclass per instance with `_sample` and `_beam_search`.

`generate` looks both up in the model's class and has prepared everything by then: the configuration, processors,
stopping criteria, the encoder's output, the rows of beams.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from typing import Any

from torch import nn

from dqkernels.decode import engine

_PLAIN: contextvars.ContextVar[tuple[int, ...]] = contextvars.ContextVar("dqkernels_decode_plain", default=())
#: Methods that speak of one token's step: a model that has its own is not served.
_METHODS = (
    "_sample", "_beam_search", "_prefill", "prepare_inputs_for_generation", "_update_model_kwargs_for_generation",
    "_get_logits_processor", "_get_stopping_criteria",
)  # fmt: skip


def serves(model: nn.Module) -> bool:
    """Whether `attach` takes this model: of a family that is known, with transformers' own methods of generation."""
    return engine.family_of(model) is not None and _own_method(model) is None


def attach(model: nn.Module, graphs: bool = True) -> nn.Module:
    """Makes `model.generate` run this package's decode loop wherever a call is one that it has, in place.

    Tokens stay those of transformers' loop. What a call needs is asked call by call, so that attention may become int8,
    and blocks fused, later on; `report(model)` says why the last call went to transformers' loop, if it did.

    Args:
        model: BartForConditionalGeneration, MBart..., MarianMTModel, Pegasus..., M2M100..., PLBart..., Blenderbot...,
            BlenderbotSmall..., T5..., MT5...
        graphs: whether steps on a GPU are captured in CUDA graphs.

    Returns:
        `model` itself.

    Raises:
        ValueError: for another class, or one that has a method of generation of its own, by name.
    """
    if is_attached(model):
        setattr(model, engine.GRAPHS, graphs)
        return model
    if engine.family_of(model) is None:
        known = ", ".join(name for file in engine.FAMILIES for name in file.CLASSES)
        raise ValueError(f"{type(model).__name__} has no decoder that is known here: {known} have")
    own = _own_method(model)
    if own is not None:
        raise ValueError(f"{type(model).__name__} has a {own} of its own: generate keeps transformers' loop")
    model.__class__ = _attached_class(type(model))
    setattr(model, engine.GRAPHS, graphs)
    return model


def detach(model: nn.Module) -> nn.Module:
    """Undoes `attach` and frees the caches; without it, nothing happens. Returns `model` itself."""
    if is_attached(model):
        free(model)
        model.__class__ = type(model).dqkernels_unplugged
        model.__dict__.pop(engine.GRAPHS, None)
    return model


def is_attached(model: nn.Module) -> bool:
    """Whether `attach` changed this model."""
    return "dqkernels_unplugged" in type(model).__dict__


def uses_graphs(model: nn.Module) -> bool:
    """Whether steps of this model are captured on a GPU."""
    return getattr(model, engine.GRAPHS, True)


@contextlib.contextmanager
def plain(model: nn.Module) -> Iterator[nn.Module]:
    """Within it, and in this thread, `model.generate` runs transformers' own loop over the same blocks."""
    token = _PLAIN.set((*_PLAIN.get(), id(model)))
    try:
        yield model
    finally:
        _PLAIN.reset(token)


def free(model: nn.Module) -> None:
    """Drops what is kept for the next calls: caches, and what a step was made for. Of a call that runs, they stay until
    it ends."""
    state = engine.state_of(model)
    state.pool.clear()
    state.native.clear()


def _own_method(model: nn.Module) -> str | None:
    """The first of `_METHODS` that is not transformers' own here."""
    from transformers import GenerationMixin

    kind = type(model)
    kind = kind.__dict__.get("dqkernels_unplugged", kind)
    for name in _METHODS:
        if name in model.__dict__ or getattr(kind, name, None) is not getattr(GenerationMixin, name):
            return name
    return None


@functools.cache
def _attached_class(base: type) -> type:
    fields = {
        "dqkernels_unplugged": base,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    return type(base.__name__, (_Attached, base), fields)


def _empty(base: type) -> nn.Module:
    """What pickle and copy fill: an instance of the attached class, which they cannot find by its name."""
    cls = _attached_class(base)
    return cls.__new__(cls)


class _Attached:
    """What `generate` finds in the class of an attached model."""

    def __reduce_ex__(self, protocol):
        _, _, *rest = super().__reduce_ex__(protocol)
        return _empty, (type(self).dqkernels_unplugged,), *rest

    def _sample(
        self, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus=False, streamer=None,
        **model_kwargs: Any,
    ):  # fmt: skip
        given = (input_ids, logits_processor, stopping_criteria, generation_config)
        if self._dqkernels_serves(input_ids, generation_config, synced_gpus, model_kwargs, False):
            return engine.run_sample(self, *given, streamer, model_kwargs)
        return super()._sample(*given, synced_gpus=synced_gpus, streamer=streamer, **model_kwargs)

    def _beam_search(
        self, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus=False, **model_kwargs: Any
    ):
        given = (input_ids, logits_processor, stopping_criteria, generation_config)
        if self._dqkernels_serves(input_ids, generation_config, synced_gpus, model_kwargs, True):
            return engine.run_beams(self, *given, model_kwargs)
        return super()._beam_search(*given, synced_gpus=synced_gpus, **model_kwargs)

    def _dqkernels_serves(self, ids, config, synced, given, is_beams) -> bool:
        if id(self) in _PLAIN.get():
            return False
        state = engine.state_of(self)
        state.last = engine.why_not(self, ids, config, synced, given, is_beams) or ""
        if state.last:
            state.passed += 1
            state.last_passed = state.last
        else:
            state.served += 1
        return not state.last
