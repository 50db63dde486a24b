"""Environment variables that the package honours, the check that they hold what they may, and the C library's
allocator. Imports no torch."""

from __future__ import annotations

import ctypes
import os
import re

from dqkernels.config import BACKENDS

#: What DQKERNELS_CPU may name; twin of kNames in csrc/cpu/isa.cpp.
CPU_ISAS = ("scalar", "avx2", "avx_vnni", "avx512_vnni", "amx_int8", "dotprod")
#: What DQKERNELS_BUILD may hold; twin of MODES in setup.py.
BUILD_MODES = ("auto", "cpu", "cuda", "none")
_ARCH = re.compile(r"\d{2,3}[af]?(-real|-virtual)?")

#: Variables the package honours, with what they may hold.
ENVIRONMENT = {
    "DQKERNELS_BACKEND": "|".join(BACKENDS),
    "DQKERNELS_CPU": "|".join(CPU_ISAS),
    "DQKERNELS_BUILD": "|".join(BUILD_MODES),
    "DQKERNELS_CUDA_ARCHS": "for example 80;90a",
    "DQKERNELS_TILES": "off, or a file that dqkernels tune wrote",
    "TRITON_INTERPRET": "1 runs Triton kernels on CPU tensors",
}
_CHOICES = {"DQKERNELS_BACKEND": BACKENDS, "DQKERNELS_CPU": CPU_ISAS, "DQKERNELS_BUILD": BUILD_MODES}


def check() -> None:
    """Checks every DQKERNELS_* variable that is set; an empty one counts as not set.

    Raises:
        ValueError: naming the variable, the value found and the values wanted.
    """
    for name, choices in _CHOICES.items():
        value = os.environ.get(name, "")
        if value and value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    archs = os.environ.get("DQKERNELS_CUDA_ARCHS", "")
    if archs.strip() and not all(_ARCH.fullmatch(item.strip()) for item in re.split("[;,]", archs)):
        raise ValueError(
            "DQKERNELS_CUDA_ARCHS must list architectures such as 80;86;90a, each optionally with -real or -virtual, "
            f"got {archs!r}"
        )
    tiles = os.environ.get("DQKERNELS_TILES", "")
    if tiles not in ("", "off") and not os.path.isfile(tiles):
        raise ValueError(f"DQKERNELS_TILES must be off or a file that dqkernels tune wrote, got {tiles!r}")


def keep_freed_memory() -> None:
    """Asks glibc to keep what is freed, for this process; training on a CPU calls it.

    It hands every large block back to the system and takes it again zeroed, page by page, which costs a small model
    more than its arithmetic. Another C library is left as it is.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
    mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
