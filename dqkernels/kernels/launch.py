"""Launching Triton kernels without Triton's dispatch on every call.

Triton binds the arguments by name, specializes each and hashes them into a string: 9 to 40 microseconds of host time a
launch, by its users' reports (vllm#34838, triton#3503); ours is not measured yet. Here the first call of a variant goes
through Triton, which compiles it, and the next ones go straight to the compiled kernel: the key is a tuple of the facts
that Triton specializes on. Sizes are not part of it, only whether 16 divides them.

Importing this file imports Triton; nothing imports it when the package is imported.
"""

from __future__ import annotations

import threading

import torch
import triton
from triton import knobs
from triton.runtime import driver


def fact(value, specialize: bool = True) -> object:
    """What Triton compiles a run-time argument for: presence, type, and under `specialize` divisibility by 16."""
    if value is None:
        return None
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, float):
        return float
    fits = -(1 << 31) <= value < 1 << 31  # sizes past 31 bits are passed as 64
    return (fits, value == 1, value % 16 == 0) if specialize else fits  # 1 becomes a constant


def _hooked() -> bool:
    """A profiler listens to launches: it gets Triton's own call, with all that it reports."""
    hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return any(getattr(hook, "calls", hook) for hook in hooks)


class Launcher:
    """A `triton.jit` kernel, its run-time parameters first and its constexpr ones last, with direct launches.

    Safe from any number of threads: a variant is compiled once, under a lock. Several processes share Triton's own
    cache on disk, which replaces files in one step.
    """

    def __init__(self, kernel) -> None:
        self.kernel = kernel
        self.variants: dict[tuple, object] = {}
        self._lock = threading.Lock()
        #: TRITON_INTERPRET=1 was set when the kernel was defined: it runs in numpy, with nothing to keep.
        self.interpreted = not isinstance(kernel, triton.JITFunction)
        if self.interpreted:
            return
        constant = [parameter.is_constexpr for parameter in kernel.params]
        first = constant.index(True) if any(constant) else len(constant)
        if not all(constant[first:]):
            raise TypeError(f"{kernel.__name__}: constexpr parameters must come last, one order for every launch")
        self._constants = [parameter.name for parameter in kernel.params[first:]]
        self._specialized = [not parameter.do_not_specialize for parameter in kernel.params[:first]]

    def __call__(self, grid: tuple[int, ...], *arguments, num_warps: int = 4, num_stages: int = 3, **constants) -> None:
        """Launches on the current device and stream.

        Args:
            grid: programs along 1 to 3 axes.
            arguments: the run-time parameters, in the kernel's order: tensors, ints, floats or None.
            constants: every constexpr parameter, by name.
        """
        options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": False}
        if self.interpreted:
            self.kernel[grid](*arguments, **constants, **options)
            return
        device = driver.active.get_current_device()
        values = [constants[name] for name in self._constants]
        if len(values) != len(constants):
            unknown = sorted(set(constants) - set(self._constants))
            raise TypeError(f"{self.kernel.__name__} has no parameter {', '.join(unknown)}")
        key = (device, num_warps, num_stages, *values, *map(fact, arguments, self._specialized))
        compiled = self.variants.get(key)
        if compiled is None or _hooked():
            with self._lock:  # one thread compiles; those that waited find Triton's own cache filled
                self.variants[key] = self.kernel[grid](*arguments, **constants, **options)
            return
        x, y, z = (*grid, 1, 1)[:3]
        stream = driver.active.get_current_stream(device)
        compiled.run(
            x, y, z, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments, *values
        )
