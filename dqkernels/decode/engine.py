"""Whether a call of `generate` is one that this package runs, and running it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import nn

from dqkernels.decode import bart, beams, caches, graphs, layers, native_step, sampling, t5
from dqkernels.decode.step import Step
from dqkernels.models import steps

#: The files that know a family, and their classes with a head.
FAMILIES: tuple[ModuleType, ...] = (bart, t5)
#: What `generate` hands on and a decode step has a use for, or may leave alone.
_USED = ("encoder_outputs", "attention_mask", "decoder_attention_mask")
_CACHES = ("cache", "past_key_values")
_IGNORED = ("use_cache", "logits_to_keep", "return_dict", "output_attentions", "output_hidden_states", "tokenizer")


@dataclass
class State:
    """What is kept of a model between calls.

    Attributes:
        pool: its idle caches.
        served, passed: calls so far by this package's loop, and by transformers'.
        last: why the last call was not served; empty where it was. `last_passed`: the last such reason.
        refused: why a step could not be captured; empty where it could, or was never tried.
        processors: classes of logits processors that the last call ran as transformers does, at every step.
        beams_by_torch: why the last call did not keep its beams in the compiled core, where others do; else empty.
        native: by whether beams are searched, the `native_step.state_of` that last had a native step.
    """

    pool: caches.Pool = field(default_factory=caches.Pool)
    served: int = 0
    passed: int = 0
    last: str = ""
    last_passed: str = ""
    refused: str = ""
    processors: tuple[str, ...] = ()
    beams_by_torch: str = ""
    native: dict[bool, tuple] = field(default_factory=dict)


_STATES: weakref.WeakKeyDictionary[nn.Module, State] = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()


def state_of(model: nn.Module) -> State:
    """The model's; a copy of a model has one of its own."""
    with _LOCK:
        return _STATES.setdefault(model, State())


def family_of(model: nn.Module) -> tuple[ModuleType, str, str] | None:
    """The file that knows this model's decoder, its `model_type`, and the name of its class in transformers."""
    for file in FAMILIES:
        for name, family in file.CLASSES.items():
            base = getattr(layers.modeling(family), name, None)
            if base is not None and isinstance(model, base):
                return file, family, name
    return None


#: On a model: False where its steps must not be captured.
GRAPHS = "dqkernels_decode_graphs"


def obstacles(model: nn.Module, is_beams: bool = False) -> Iterator[str]:
    """Why no call of this model as it is now can be served, in words. is_beams: a beam search."""
    file, family, name = family_of(model)
    if layers.altered(model, layers.modeling(family), [name]):
        yield "the model has a forward of its own"
    decoder, head = file.parts(model)
    device = next(head.parameters()).device.type
    yield from file.obstacles(model, family, device, is_beams)
    yield from layers.obstacles(model, decoder, head)


def why_not(
    model: nn.Module, ids: torch.Tensor, config: Any, synced: bool, given: dict[str, Any], is_beams: bool
) -> str | None:
    """Why this call is for transformers' own loop, in words; None where it is served."""
    wishes = (
        (synced, "processes wait for each other at every step (synced_gpus)"),
        (torch.is_grad_enabled(), "gradients are on"),
        (steps.under_autocast(ids), "autocast is on"),
        (config.output_attentions, "output_attentions=True"),
        (config.output_hidden_states, "output_hidden_states=True"),
        (config.use_cache is False, "use_cache=False"),
        (config.cache_implementation == "offloaded", "cache_implementation='offloaded'"),
        (config.prefill_chunk_size is not None, "prefill_chunk_size"),
        (config.compile_config is not None, "compile_config"),
        (getattr(config, "low_memory", None), "low_memory=True"),
        (getattr(config, "is_assistant", False), "it is an assistant"),
    )
    for wished, words in wishes:
        if wished:
            return words
    for name in _CACHES:
        if getattr(given.get(name), "_is_user_defined", False):
            return f"a cache of the caller's ({name})"
    unknown = [key for key in given if key not in (*_USED, *_CACHES, *_IGNORED)]
    if unknown:
        return f"it is given {', '.join(sorted(unknown))}"
    hidden = _hidden(given)
    if (
        hidden is None
        or hidden.dim() != 3
        or (hidden.shape[0], hidden.shape[2]) != (ids.shape[0], model.config.d_model)
    ):
        return "the encoder's output is not [rows, tokens, width]"
    mask = given.get("attention_mask")
    if mask is not None and tuple(mask.shape) != tuple(hidden.shape[:2]):
        return f"attention_mask is {list(mask.shape)}, not {list(hidden.shape[:2])}"
    if len({ids.device, hidden.device, *([] if mask is None else [mask.device])}) > 1:
        return "its inputs are on several devices"
    before = given.get("decoder_attention_mask")
    if before is not None and (before.dim() != 2 or not bool(before.bool().all())):
        return "decoder_attention_mask hides tokens"
    found = next(obstacles(model, is_beams), None)
    return family_of(model)[0].too_long(model, _most(ids, config)) if found is None else found


def _most(ids: torch.Tensor, config: Any) -> int:
    """How many tokens of a row a call may feed to the decoder: all but the last one."""
    return max(config.max_length - 1, ids.shape[1])


def _hidden(given: dict[str, Any]) -> torch.Tensor | None:
    """The encoder's last hidden state, [rows, tokens, width]."""
    outputs = given.get("encoder_outputs")
    try:
        return outputs[0]
    except (TypeError, KeyError, IndexError):
        return None


def sources_of(hidden: torch.Tensor, mask: torch.Tensor | None, expanded: int) -> int:
    """How many sources stand in `hidden` [rows, ...], which `generate` has repeated `expanded` times; as many as rows
    where it is not what such a repetition gives."""
    rows = hidden.shape[0]
    if expanded < 2 or rows % expanded:
        return rows
    for tensor in (hidden, mask):
        if tensor is not None:
            groups = tensor.unflatten(0, (-1, expanded))
            if not torch.equal(groups, groups[:, :1].expand_as(groups)):
                return rows
    return rows // expanded


class Running:
    """One call: a `Step` over caches of its own. A context manager: the caches go back behind it."""

    def __init__(self, model: nn.Module, ids: torch.Tensor, config: Any, given: dict[str, Any], is_beams: bool):
        self.model, self.given = model, given
        file, _, _ = family_of(model)
        decoder = file.prepare(model)
        hidden, mask = _hidden(given), given.get("attention_mask")
        mask = None if mask is None else mask.bool()
        sources = sources_of(hidden, mask, max(config.num_beams or 1, config.num_return_sequences or 1))
        if not all(layer.shared for layer in decoder.layers):
            sources = hidden.shape[0]
        every = hidden.shape[0] // sources
        most = _most(ids, config)
        if decoder.limit is not None:
            most = max(min(most, decoder.limit), ids.shape[1])
        shape = caches.Shape(
            rows=ids.shape[0],
            sources=sources,
            layers=len(decoder.layers),
            heads=decoder.heads,
            head_dim=decoder.head_dim,
            capacity=caches.bucket(min(most, max(caches.FIRST_CAPACITY, ids.shape[1]))),
            source_capacity=caches.bucket(hidden.shape[1]),
            device=ids.device,
        )
        self.state = state_of(model)
        self.caches = self.state.pool.take(shape)
        self.step = self._step(model, decoder, is_beams, most)
        self.hidden = hidden[::every]
        self.mask = None if mask is None else mask[::every]

    def _step(self, model: nn.Module, decoder: layers.Decoder, is_beams: bool, most: int) -> Step:
        parts = family_of(model)[0].parts(model)
        if self.caches.tokens.device.type == "cpu":
            state = native_step.state_of(*parts, decoder.logits_bias)
            if self._is_native(parts[0], state, is_beams):
                native_step.drop_stale(self.state.pool.idle(), state)
                return native_step.NativeStep(decoder, self.caches, is_beams, most, parts, state)
        if not (self.caches.tokens.is_cuda and getattr(model, GRAPHS, True)):
            return Step(decoder, self.caches, is_beams, most)
        weights = graphs.weights_of(model)
        return graphs.GraphStep(decoder, self.caches, is_beams, most, weights, self._refused)

    def _is_native(self, decoder: nn.Module, state: tuple | None, is_beams: bool) -> bool:
        """Whether a step is one native call: asked again, which walks over the whole decoder, once `state` changed."""
        if state is None:
            return False
        if self.state.native.get(is_beams) != state:
            self.state.native.pop(is_beams, None)
            if native_step.why_not(decoder, is_beams) is not None:
                return False
            self.state.native[is_beams] = state
        return True

    def _refused(self, reason: str) -> None:
        self.state.refused = reason

    def __enter__(self) -> Step:
        self.step.start(self.hidden, self.mask)
        return self.step

    def __exit__(self, *_: Any) -> None:
        self.state.processors, self.state.beams_by_torch = self.step.processors, self.step.beams_by_torch
        self.state.pool.give(self.caches)


def run_sample(model: nn.Module, ids, processors, criteria, config, streamer, given):
    """As `_sample` of transformers returns it; its `cache` is None, as there is none of its kind."""
    with Running(model, ids, config, given, is_beams=False) as step:
        sequences, scores, logits = sampling.sample(step, ids, processors, criteria, config, streamer)
    if not config.return_dict_in_generate:
        return sequences
    from transformers.generation import GenerateEncoderDecoderOutput

    return GenerateEncoderDecoderOutput(sequences=sequences, scores=scores, logits=logits)


def run_beams(model: nn.Module, ids, processors, criteria, config, given):
    """As `_beam_search` of transformers returns it; its `cache` is None, as there is none of its kind."""
    with Running(model, ids, config, given, is_beams=True) as step:
        found = beams.search(step, ids, processors, criteria, config)
    if not config.return_dict_in_generate:
        return found.sequences
    from transformers.generation import GenerateBeamEncoderDecoderOutput

    return GenerateBeamEncoderDecoderOutput(
        sequences=found.sequences,
        sequences_scores=found.scores if config.output_scores else None,
        scores=found.step_scores,
        logits=found.logits,
        beam_indices=found.beams,
    )
