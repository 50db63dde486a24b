"""Compiling ahead of the first request: every kernel that the packed modules of a model run, at every number of tokens.

The fused layers of a model run other kernels than its modules one by one, so both are run.
Triton compiles a kernel when it first meets a tile, a type or an alignment. `warmup` meets them all beforehand, so that
no request waits for a compiler and a CUDA graph can be captured at once. What was compiled stays in Triton's cache on
disk (TRITON_CACHE_DIR): a warm-up when an image is built serves every process that starts from it.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from dqkernels import backends, ops
from dqkernels.models import blocks, steps
from dqkernels.nn import PackedModule, QLinear

#: Every bucket of the choice of tiles, by rule or measured; from the last one on it does not change.
TOKENS = (1, 16, 32, 64, 128, 256, 257, 512, 1024, 2048, 4096, 8192)
#: Outputs of more elements are not made for this: an lm_head at thousands of tokens, which no decoder asks for.
_MAX_ELEMENTS = 1 << 29
#: Longest sequence that a fused layer is run at.
_MAX_SEQUENCE = 1024
#: Backends whose kernels are compiled at their first call; the others are compiled with the package or not at all.
_COMPILING = ("triton",)


@dataclass(frozen=True)
class Warmup:
    """What `warmup` did. `str()` is a sentence, `to_dict()` plain JSON.

    Attributes:
        compiled: variants of kernels that this process had not met before (from Triton's disk cache, or compiled).
        seconds: for all of it.
        modules: kinds of packed modules that were run, one for each shape and format.
        layers: kinds of fused layers that were run.
        tokens: the numbers of tokens they were run at.
        skipped: packed modules that need no compiler, by the backend that runs them: `{"cpu": 33}`.
    """

    compiled: int
    seconds: float
    modules: int
    tokens: tuple[int, ...]
    skipped: dict[str, int] = field(default_factory=dict)
    layers: int = 0

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "tokens": list(self.tokens), "seconds": round(self.seconds, 3)}

    def __str__(self) -> str:
        words = []
        if self.modules:
            fused = f" and {self.layers} of fused layers" if self.layers else ""
            words.append(
                f"{self.compiled} new kernels ready in {self.seconds:.1f} s: {self.modules} kinds of modules{fused} at "
                f"{', '.join(map(str, self.tokens))} tokens"
            )
        words += [f"{count} modules run on {name}, which compiles nothing" for name, count in self.skipped.items()]
        return "; ".join(words)


def warmup(
    model: nn.Module, tokens: Iterable[int] = TOKENS, progress: Callable[[int, int, str], None] | None = None
) -> Warmup:
    """Runs one module, and one fused layer, of every shape and format at every number of tokens, where it is now.

    Args:
        model: a model after `quantize_`, or loaded packed, on the device that will serve.
        tokens: numbers of rows to meet: batch times beams in decoding, batch times source length in encoding.
            The default meets every tile, but for outputs of more than 2^29 elements; other numbers meet theirs.
        progress: called with (calls done, calls, what comes next).

    Raises:
        ValueError: if the model has no packed module, or a number of tokens is below 1.
        BackendError: where a module's forced backend cannot run here.
    """
    tokens = tuple(dict.fromkeys(int(count) for count in tokens))
    if not tokens or min(tokens) < 1:
        raise ValueError(f"tokens must be numbers above 0, got {list(tokens)}")
    kinds: dict[tuple, PackedModule] = {}
    skipped: dict[str, int] = {}
    packed = [module for module in model.modules() if isinstance(module, PackedModule)]
    if not packed:
        raise ValueError("model has no packed module: quantize it first (dqkernels.quantize_)")
    for module in packed:
        name = _backend(module)
        if name in _COMPILING:
            kinds.setdefault(_kind(module), module)
        else:
            skipped[name] = skipped.get(name, 0) + 1
    layers = {_layer_kind(each): each for each in blocks.fused_layers(model) if kinds and not _watched(each)}
    before, start = _variants(), time.perf_counter()
    calls: list[tuple[nn.Module, tuple, str]] = [
        (module, (_input, count), f"{type(module).__name__} {tuple(module.weight.shape)} at {count}")
        for module in kinds.values()
        for count in tokens
        if count * _width(module) <= _MAX_ELEMENTS or count == tokens[0]
    ]
    # As many sequences of one token (decoding), and one sequence of as many (encoding) where attention can bear it.
    calls += [
        (layer, (blocks.example, *size), f"{type(layer).__name__} at {count}")
        for layer in layers.values()
        for count in tokens
        for size in ((count, 1), *([(1, count)] if 1 < count <= _MAX_SEQUENCE else []))
    ]
    with torch.inference_mode():
        for done, (module, (make, *size), words) in enumerate(calls):
            if progress is not None:
                progress(done, len(calls), words)
            given = make(module, *size)
            # forward, not the call: a user's hooks are not for zeros
            module.forward(*(given if isinstance(given, tuple) else (given,)))
    if progress is not None:
        progress(len(calls), len(calls), "")
    for device in {module.qweight.device for module in kinds.values() if module.qweight.is_cuda}:
        torch.cuda.synchronize(device)  # a launch that failed says so here, not in the first request
    return Warmup(_variants() - before, time.perf_counter() - start, len(kinds), tokens, skipped, len(layers))


def _backend(module: PackedModule) -> str:
    device, layer = module.qweight.device.type, module.layer
    if isinstance(module, QLinear):
        choice, _ = ops.choose_qlinear(
            device, layer.bits, layer.group_size, layer.act_granularity, module.backend, module.strict, True
        )
    else:
        choice = backends.choose("qembedding", device, module.backend, module.strict, bits=layer.bits)
    return choice.backend


def _kind(module: PackedModule) -> tuple:
    """Modules that agree in this need the same kernels."""
    bias = getattr(module, "bias", None)
    return (
        type(module), module.layer, tuple(module.weight.shape), module.compute_dtype, module.qweight.device,
        module.backend, None if bias is None else bias.dtype,
    )  # fmt: skip


def _layer_kind(layer: nn.Module) -> tuple:
    """Fused layers that agree in this need the same kernels."""
    packed = tuple((name, _kind(m)) for name, m in layer.named_modules() if isinstance(m, PackedModule))
    return type(layer), layer.self_attn.config._attn_implementation, packed


def _watched(layer: nn.Module) -> bool:
    """Whether somebody watches a module inside: hooks are not for zeros."""
    return any(steps.hooked(module) for module in layer.modules())


def _width(module: PackedModule) -> int:
    """Elements of the output for one row."""
    return module.out_features if isinstance(module, QLinear) else module.embedding_dim


def _input(module: PackedModule, count: int) -> torch.Tensor:
    device = module.qweight.device
    if isinstance(module, QLinear):
        return torch.zeros(count, module.in_features, dtype=module.compute_dtype, device=device)
    return torch.zeros(count, dtype=torch.int64, device=device)


def _variants() -> int:
    """Compiled variants in this process. Imports Triton's kernels only where they are in use already or will be."""
    try:
        return importlib.import_module("dqkernels.kernels.launch").compiled()
    except ImportError:
        return 0  # no Triton: nothing is compiled at a first call
