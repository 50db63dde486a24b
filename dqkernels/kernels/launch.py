"""Launching Triton kernels without Triton's dispatch on every call.

Triton binds the arguments by name, specializes each and hashes them into a string: 9 to 40 microseconds of host time a
launch, by its users' reports (vllm#34838, triton#3503); ours is not measured yet. Here the first call of a variant goes
through Triton, which compiles it, and the next ones go straight to the compiled kernel: the key is a tuple of the facts
that Triton specializes on. Sizes are not part of it, only whether 16 divides them. An op that is called again and again
keeps a `Bound` launch, where all of that but the pointers' alignment is settled.

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
    kind = type(value)
    if kind is int:
        fits = -(1 << 31) <= value < 1 << 31  # sizes past 31 bits are passed as 64
        return (fits, value == 1, value % 16 == 0) if specialize else fits  # 1 becomes a constant
    if value is None or kind is float:
        return kind
    return value.dtype, value.data_ptr() % 16 == 0


def _hooked() -> bool:
    """A profiler listens to launches: it gets Triton's own call, with all that it reports."""
    for hook in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
        if getattr(hook, "calls", hook):
            return True
    return False


def _refuse_capture(kernel) -> None:
    """A kernel cannot be compiled and loaded while a CUDA graph is recorded; CUDA's own words would not say which.

    Raises:
        RuntimeError: under capture, naming the kernel and what to do.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{kernel.__name__} meets these shapes or types for the first time while a CUDA graph is captured, and "
            "compiling it would end the capture: run the same call once before capturing, or "
            "dqkernels.warmup.warmup(model) with the numbers of tokens that the graph needs"
        )


#: Every launcher of this process, for `compiled`.
_launchers: list[Launcher] = []


def compiled() -> int:
    """Variants of kernels that this process has compiled, or taken from Triton's cache on disk."""
    return sum(len(launcher.variants) for launcher in _launchers)


class Launcher:
    """A `triton.jit` kernel, its run-time parameters first and its constexpr ones last, with direct launches.

    Safe from any number of threads: a variant is compiled once, under a lock. Several processes share Triton's own
    cache on disk, which replaces files in one step.
    """

    def __init__(self, kernel) -> None:
        self.kernel = kernel
        self.variants: dict[tuple, object] = {}
        self._lock = threading.Lock()
        _launchers.append(self)
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

    def __call__(self, grid: tuple[int, ...], *arguments, num_warps: int = 4, num_stages: int = 3, **constants):
        """Launches on the current device and stream.

        Args:
            grid: programs along 1 to 3 axes.
            arguments: the run-time parameters, in the kernel's order: tensors, ints, floats or None.
            constants: every constexpr parameter, by name.

        Returns:
            the compiled variant, None in the interpreter.

        Raises:
            RuntimeError: if the variant is new and a CUDA graph is being captured.
        """
        options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": False}
        if self.interpreted:
            self.kernel[grid](*arguments, **constants, **options)
            return None
        device = driver.active.get_current_device()
        values = [constants[name] for name in self._constants]
        if len(values) != len(constants):
            unknown = sorted(set(constants) - set(self._constants))
            raise TypeError(f"{self.kernel.__name__} has no parameter {', '.join(unknown)}")
        key = (device, num_warps, num_stages, *values, *map(fact, arguments, self._specialized))
        compiled = self.variants.get(key)
        if compiled is None or _hooked():
            if compiled is None:
                _refuse_capture(self.kernel)
            with self._lock:  # one thread compiles; those that waited find Triton's own cache filled
                self.variants[key] = compiled = self.kernel[grid](*arguments, **constants, **options)
            return compiled
        x, y, z = (*grid, 1, 1)[:3]
        stream = driver.active.get_current_stream(device)
        compiled.run(
            x, y, z, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments, *values
        )
        return compiled

    def bind(self, grid: tuple[int, ...], **options) -> Bound:
        """A launch with everything settled but the tensors' addresses and the floats' values; see `Bound`."""
        return Bound(self, grid, options)


class Bound:
    """A launch for one set of facts: every call must bring the same sizes, types and Nones on the same device.

    Who keeps it (a plan, cached by all of those) vouches for that. What it looks at is the alignment of the tensors:
    torch's own are aligned, and others take the Launcher's general path.
    """

    def __init__(self, launcher: Launcher, grid: tuple[int, ...], options: dict) -> None:
        self.launcher, self.grid, self.options = launcher, grid, options
        self._compiled = None  # of the variant for aligned tensors

    def __call__(self, *arguments) -> None:
        compiled = self._compiled
        if compiled is None or _hooked() or not self._aligned(arguments):
            compiled = self.launcher(self.grid, *arguments, **self.options)
            if self._compiled is None and compiled is not None:
                self._keep(compiled, arguments)
            return
        stream = driver.active.get_current_stream(self._device)
        compiled.run(*self._grid, stream, *self._fixed, *arguments, *self._values)

    def _aligned(self, arguments: tuple) -> bool:
        pointers = 0
        for index in self._tensors:
            pointers |= arguments[index].data_ptr()
        return pointers % 16 == 0

    def _keep(self, compiled, arguments: tuple) -> None:
        self._tensors = [index for index, value in enumerate(arguments) if isinstance(value, torch.Tensor)]
        if not self._aligned(arguments):
            return
        self._device = driver.active.get_current_device()
        self._grid = (*self.grid, 1, 1)[:3]
        self._fixed = (compiled.function, compiled.packed_metadata, None, None, None)
        self._values = [self.options[name] for name in self.launcher._constants]
        self._compiled = compiled  # last: another thread that sees it finds the rest
