"""Which backend runs an op: the only place in the package that decides.

A backend is a module of this folder with the ops of `OPS` as functions (all of one signature per op, the one of
`eager`), `available(device_type) -> (bool, reason)` and `supports(op, **facts) -> reason or None`. One that
quantizes inside its GEMM also has `qlinear`; one that knows when another is faster has `defers(op, **facts) -> reason
or None`, which counts under `auto` only. Nothing is probed at import: the first `choose` asks, and the answers are
kept.
"""

from __future__ import annotations

import functools
import importlib
import os
from dataclasses import dataclass
from types import ModuleType

import torch

from dqkernels.kernels import plans

#: The ops a backend may offer; `eager` offers all of them.
OPS = (
    "quantize_weight",
    "quantize_by_step",
    "dequantize_weight",
    "quantize_activation",
    "qgemm",
    "qembedding",
    "layernorm_quantize",
    "gelu_quantize",
    "qattention",
    "qattention_decode",
    "quantize_into_cache",
    "grad_input",
    "grad_weight",
    "qattention_backward",
)
#: Fastest exact path first, by device type.
ORDER = {"cuda": ("cuda", "triton", "eager"), "cpu": ("cpu", "eager")}
NAMES = ("eager", "triton", "cuda", "cpu")
#: Where kernels for decoding end and those for whole sequences begin.
FEW_ROWS = 64
#: Paths that `strict` refuses unless they were asked for by name.
SLOW = ("eager",)


@dataclass(frozen=True)
class Choice:
    """The backend picked for an op, and the reason in words."""

    backend: str
    reason: str

    @property
    def module(self) -> ModuleType:
        return _module(self.backend)


class BackendError(RuntimeError):
    """No backend can run the op as asked; the message names the op, the reason and the alternatives."""


@functools.cache
def _module(name: str) -> ModuleType:
    return importlib.import_module(f"dqkernels.backends.{name}")


@functools.cache
def available(name: str, device_type: str) -> tuple[bool, str]:
    """Whether backend `name` can take tensors of `device_type` here, and why (not).

    A broken optional part (no Triton, no compiled core) is a reason, never an exception.
    """
    try:
        return _module(name).available(device_type)
    except ImportError as error:
        return False, f"import failed: {error}"


def refresh() -> None:
    """Forgets what was probed and chosen; for `tune`, whose table changed, and tests that change the environment."""
    available.cache_clear()
    _choose.cache_clear()
    _one_kernel.cache_clear()


def requested(backend: str) -> tuple[str, str]:
    """The backend asked for and by whom; DQKERNELS_BACKEND speaks where the config says `auto`.

    Raises:
        ValueError: if DQKERNELS_BACKEND holds an unknown name; the message lists the valid ones.
    """
    if backend not in ("auto", *NAMES):
        raise ValueError(f"backend must be one of {['auto', *NAMES]}, got {backend!r}")
    if backend != "auto":
        return backend, f"backend={backend!r}"
    variable = os.environ.get("DQKERNELS_BACKEND", "")
    if variable in ("", "auto"):
        return "auto", ""
    if variable not in NAMES:
        raise ValueError(f"DQKERNELS_BACKEND must be one of {['auto', *NAMES]}, got {variable!r}")
    return variable, f"DQKERNELS_BACKEND={variable}"


def refusal(name: str, op: str, device_type: str, facts: dict) -> str | None:
    """Why backend `name` cannot run `op` for tensors like these; None when it can."""
    usable, reason = available(name, device_type)
    if not usable:
        return reason
    module = _module(name)
    if not hasattr(module, op):
        return f"has no {op}"
    return module.supports(op, **facts)


def _deferral(name: str, op: str, facts: dict) -> str | None:
    """Why backend `name`, which could run `op`, would rather leave it to the next."""
    defers = getattr(_module(name), "defers", None)
    return None if defers is None else defers(op, **facts)


def gemm_facts(x: torch.Tensor, out_features: int, bits: int, group_size: int, own: int = plans.FASTER_ROWS) -> dict:
    """The facts by which the backend of a GEMM of x [..., K] is chosen.

    `many_rows`: more than `FEW_ROWS` of them. `where`: (device's index, rows, out_features, K) of 9 to 64 rows on a
    GPU, where who is faster is a matter of measurement; the rows as those of a table's entry, so that the choices stay
    few. own: rows up to which it is not asked.
    """
    size, k = x.numel(), x.shape[-1]
    many_rows, where = size > FEW_ROWS * k, None
    if x.is_cuda and not many_rows and size > own * k:
        where = (x.get_device(), plans.bucket(size // k), out_features, k)
    return {"bits": bits, "group_size": group_size, "many_rows": many_rows, "where": where}


def choose(op: str, device_type: str, backend: str = "auto", strict: bool = False, **facts) -> Choice:
    """Picks the backend for one op.

    Args:
        op: a name of `OPS`.
        device_type: `cpu`, `cuda`, ... of the input.
        backend: `auto` or the one to force.
        strict: refuse a slow path that was not asked for by name.
        **facts: what the op is asked for (bits, group_size, mode, ...), hashable; backends judge by them.

    Raises:
        BackendError: if the forced backend cannot run the op, or under `strict` if only a slow path can.
        ValueError: for an unknown backend name.
    """
    name, source = requested(backend)
    return _choose(op, device_type, name, source, strict, tuple(facts.items()))


def one_kernel(op: str, device_type: str, backend: str = "auto", **facts) -> Choice | None:
    """The backend that has `op`, which is made of other ops, as a kernel of its own; None where nobody has.

    Raises:
        ValueError: for an unknown backend name.
    """
    name, source = requested(backend)
    return _one_kernel(op, device_type, name, source, tuple(facts.items()))


@functools.lru_cache(maxsize=4096)
def _one_kernel(op: str, device_type: str, name: str, source: str, fact_items: tuple) -> Choice | None:
    facts = dict(fact_items)
    for candidate in ORDER.get(device_type, ()) if name == "auto" else (name,):
        if refusal(candidate, op, device_type, facts) is None and _deferral(candidate, op, facts) is None:
            return Choice(candidate, f"forced by {source}" if source else "one kernel")
    return None


@functools.lru_cache(maxsize=4096)
def _choose(op: str, device_type: str, name: str, source: str, strict: bool, fact_items: tuple) -> Choice:
    facts = dict(fact_items)
    if name != "auto":
        why_not = refusal(name, op, device_type, facts)
        if why_not is None:
            return Choice(name, f"forced by {source}")
        others = [n for n in NAMES if n != name and refusal(n, op, device_type, facts) is None]
        raise BackendError(
            f"{source} cannot run {op} on {device_type}: {why_not}. Backends that can: {', '.join(others) or 'none'}"
        )
    passed = []
    deferring = None
    for candidate in ORDER.get(device_type, ("eager",)):
        why_not = refusal(candidate, op, device_type, facts)
        if why_not is None and candidate in SLOW and deferring is not None:
            return deferring
        if why_not is None and (why_not := _deferral(candidate, op, facts)) is not None:
            deferring = deferring or Choice(candidate, f"no faster one here, though {why_not}")
        elif why_not is None:
            if strict and candidate in SLOW:
                raise BackendError(
                    f"strict=True refuses the {candidate} path of {op} on {device_type}: "
                    f"{'; '.join(passed) or 'no faster backend exists for this device'}. "
                    f"Use strict=False, or ask for it with backend={candidate!r}"
                )
            return Choice(candidate, "; ".join(passed) or "first choice for this device")
        passed.append(f"{candidate}: {why_not}")
    if deferring is not None:
        return deferring
    raise BackendError(f"no backend can run {op} on {device_type}: {'; '.join(passed)}")
