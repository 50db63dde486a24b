"""The compiled core `dqkernels._C`: finding it, and torch tensors in and out of it. No arithmetic here.

`_C` is optional and is loaded at the first call, never at import. `native()` is the module or None, and
`why_absent()` says why it is None. The tensor functions raise RuntimeError with that reason where it is.
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import threading
import zlib
from collections.abc import Iterator
from importlib import metadata
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType

import torch

from dqkernels import packing

#: Twin of kAbiVersion in csrc/include/dqk/api.h. An extension of another version is refused, not called.
ABI_VERSION = 8
MODES = {"per_token": 0, "per_tensor": 1, "static": 2}
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_PACKAGE = Path(__file__).resolve().parent.parent
_lock = threading.Lock()
_loaded: tuple[ModuleType | None, str] | None = None


# ------------------------------------------------------------------------------------------------ finding it


def native() -> ModuleType | None:
    """The extension module, or None where it is absent (`why_absent` says why)."""
    return _load()[0]


def why_absent() -> str:
    """One sentence, or "" where the extension is present."""
    return _load()[1]


def build_info() -> dict:
    """What the build wrote down (mode, cpu, cuda, archs, compiler, reasons, ...); {} if it never ran."""
    for folder in (_PACKAGE, *_installed_folders()):
        try:
            return json.loads((folder / "_build_info.json").read_text())
        except (OSError, ValueError):
            continue
    return {}


def why_no_cuda(info: dict) -> str:
    """Why a core that `build_info` describes has no CUDA part: `no CUDA: no nvcc was found`."""
    # An earlier line may say which architectures were tried; the last one is the failure.
    reasons = [reason.removeprefix("cuda: ") for reason in info.get("reasons") or () if reason.startswith("cuda: ")]
    if not reasons and info.get("mode") == "cpu":
        reasons = ["built with DQKERNELS_BUILD=cpu"]
    return "no CUDA: " + (reasons[-1] if reasons else "the build left no reason")


def code_for(archs: str, capability: tuple[int, int]) -> int | None:
    """The newest code compiled for `archs` (CMake's words: `80-real 90a-real 120-virtual`) that runs on such a card.

    Machine code runs on later cards of its own major version, PTX on every later one; of a number with a letter both
    run on that card alone. A number without a suffix is both.

    Returns:
        The architecture that it was compiled for, 90 for 9.0; None where nothing runs.
    """
    card = 10 * capability[0] + capability[1]
    found = []
    for arch in archs.replace(";", " ").split():
        number, _, kind = arch.partition("-")
        value = int(number.rstrip("af"))
        if not number.isdigit():
            fits = value == card
        else:
            fits = value <= card and (kind != "real" or value // 10 == card // 10)
        if fits:
            found.append(value)
    return max(found, default=None)


def _load() -> tuple[ModuleType | None, str]:
    global _loaded
    if _loaded is None:
        with _lock:
            if _loaded is None:
                _loaded = _search()
    return _loaded


def _search() -> tuple[ModuleType | None, str]:
    refused = []
    for path in _candidates():
        try:
            module = _import(path)
        except ImportError as error:
            refused.append(f"{path.name} does not load: {error}")
            continue
        if module.abi_version() == ABI_VERSION:
            sys.modules["dqkernels._C"] = module
            return module, ""
        refused.append(f"{path.name} has interface {module.abi_version()}, this version needs {ABI_VERSION}")
    if not refused:
        info = build_info()
        if not info:
            return None, "dqkernels._C was never built here: pip install -e . (or pip install .) builds it"
        refused = info["reasons"] or ["the build left no reason"]
    return None, "dqkernels._C is absent: " + "; ".join(refused)


def _candidates() -> Iterator[Path]:
    """Beside the package first. Run from the repository root, that is the source tree, which has no extension
    unless installed with -e, while an installed distribution may have one."""
    for folder in (_PACKAGE, *_installed_folders()):
        for suffix in EXTENSION_SUFFIXES:
            path = folder / f"_C{suffix}"
            if path.is_file():
                yield path


def _installed_folders() -> list[Path]:
    folders = []
    for distribution in metadata.distributions(name="dqkernels"):
        for file in distribution.files or ():
            if file.parts[-2:] == ("dqkernels", "_build_info.json"):
                folder = Path(distribution.locate_file(file)).resolve().parent
                if folder != _PACKAGE and folder not in folders:
                    folders.append(folder)
    return folders


def _import(path: Path) -> ModuleType:
    # pybind11 keeps one module per name: under the same name, a second file would be answered with the first.
    package = "dqkernels" if path.parent == _PACKAGE else f"dqkernels_{zlib.crc32(bytes(path)):08x}"
    spec = importlib.util.spec_from_file_location(f"{package}._C", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def require(function: str) -> ModuleType:
    """The extension module, which has `function`.

    Raises:
        RuntimeError: if it is absent or was built without, with the build's reasons.
    """
    module = native()
    if module is None:
        raise RuntimeError(why_absent())
    if not hasattr(module, function):
        reasons = "; ".join(build_info().get("reasons", [])) or "no reason was recorded"
        raise RuntimeError(f"dqkernels._C was built without {function}: {reasons}")
    return module


# -------------------------------------------------------------------------------------------- packed weights


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Packs int8 codes [N, K] on the CPU into planar format v1; the bits of `packing.pack`.

    Returns:
        uint8 [ceil16(N), ceil128(K) * bits / 8], padding 0.

    Raises:
        ValueError: for another device, dtype, shape or width, or a code outside the width's signed range.
    """
    core = require("pack")
    _check_bits(bits)
    if codes.dtype != torch.int8 or codes.dim() != 2 or codes.shape[1] == 0:
        raise ValueError(f"codes must be int8 [N, K] with K >= 1, got {codes.dtype} {list(codes.shape)}")
    check_device("codes", codes, "cpu")
    codes = codes.contiguous()
    n, k = codes.shape
    packed = torch.empty(packing.packed_shape(n, k, bits), dtype=torch.uint8)
    core.pack(codes.data_ptr(), n, k, bits, packed.data_ptr())
    return packed


def unpack(qweight: torch.Tensor, n: int, k: int, bits: int) -> torch.Tensor:
    """The inverse of `pack`: sign-extended int8 codes [n, k].

    Raises:
        ValueError: if `qweight` is not the CPU tensor that [n, k] codes of `bits` bits pack to.
    """
    core = require("unpack")
    _check_bits(bits)
    if n < 0 or k < 1:
        raise ValueError(f"n must be >= 0 and k >= 1, got n={n}, k={k}")
    packing.check_packed(qweight, n, k, bits)
    check_device("qweight", qweight, "cpu")
    qweight = qweight.contiguous()
    codes = torch.empty((n, k), dtype=torch.int8)
    core.unpack(qweight.data_ptr(), n, k, bits, codes.data_ptr())
    return codes


# ------------------------------------------------------------------------------------------------ activations


def quantize_rows(
    x: torch.Tensor,
    mode: str,
    clip: float | None = None,
    act_scale: torch.Tensor | float | None = None,
    want_sum: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantizes the rows of a CPU tensor; the bits of `qmath.quantize_activation`.

    Args:
        x: fp32, fp16 or bf16 [..., K], any strides.
        mode: `per_token`, `per_tensor` or `static`.
        clip: clamp x to [-clip, clip] first; positive and finite.
        act_scale: one number, for `static`.
        want_sum: also return the sum of each row's codes.

    Returns:
        q int8 [..., K], scale fp32 [...] (one per row in every mode, NaN for a non-finite row), row_sum
        int32 [...] or [0] if not wanted.

    Raises:
        ValueError: for another device, dtype, shape, mode, clip or act_scale.
    """
    core = require("quantize_rows")
    check_device("x", x, "cpu")
    rows, clip, out = quantize_arguments(x, mode, clip, act_scale, want_sum)
    scale_value = float(act_scale) if mode == "static" else 0.0
    core.quantize_rows(*_pointers(rows, mode, clip, scale_value, out))
    return out


def cuda_quantize_rows(
    x: torch.Tensor,
    mode: str,
    clip: float | None = None,
    act_scale: torch.Tensor | float | None = None,
    want_sum: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`quantize_rows` for a CUDA tensor, queued on the current stream of its device; never waits for it.

    An `act_scale` tensor stays on the device: fp32, one element, on the device of x.
    """
    core = require("cuda_quantize_rows")
    check_device("x", x, "cuda")
    with torch.cuda.device(x.device):  # the core launches on the current device
        rows, clip, out = quantize_arguments(x, mode, clip, act_scale, want_sum)
        value, address = 0.0, 0
        if mode == "static" and isinstance(act_scale, torch.Tensor):
            if act_scale.dtype != torch.float32 or act_scale.device != x.device:
                raise ValueError(
                    f"act_scale must be float32 on {x.device}, got {act_scale.dtype} on {act_scale.device}"
                )
            address = act_scale.data_ptr()
        elif mode == "static":
            value = float(act_scale)
        stream = torch.cuda.current_stream(x.device).cuda_stream
        core.cuda_quantize_rows(*_pointers(rows, mode, clip, value, out), stream, address)
    return out


def quantize_arguments(
    x: torch.Tensor, mode: str, clip: float | None, act_scale: torch.Tensor | float | None, want_sum: bool
) -> tuple[torch.Tensor, float, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Checks, x as rows [M, K] with adjacent elements, clip as a number (0 = none), and the empty outputs."""
    if x.dtype not in DTYPES:
        raise ValueError(f"x must be float32, float16 or bfloat16, got {x.dtype}")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must be [..., K] with K >= 1, got {list(x.shape)}")
    if mode not in MODES:
        raise ValueError(f"mode must be one of {list(MODES)}, got {mode!r}")
    if clip is not None and not 0 < clip < math.inf:
        raise ValueError(f"clip must be positive and finite, or None, got {clip!r}")
    if mode == "static":
        elements = act_scale.numel() if isinstance(act_scale, torch.Tensor) else 1
        if act_scale is None or elements != 1:
            found = "None" if act_scale is None else f"{elements} elements"
            raise ValueError(f"mode static needs act_scale with one element, got {found}")
    rows = adjacent_rows(x)
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    row_sum = torch.empty(x.shape[:-1] if want_sum else (0,), dtype=torch.int32, device=x.device)
    return rows, 0.0 if clip is None else float(clip), (q, scale, row_sum)


def adjacent_rows(x: torch.Tensor) -> torch.Tensor:
    """x [..., K] as [M, K] whose rows are adjacent elements in aligned memory: a view where its strides allow it."""
    return adjacent(x.reshape(-1, x.shape[-1]) if x.dim() != 2 else x)


def adjacent(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy of it whose last axis is adjacent elements in aligned memory."""
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        x = x.contiguous()
    if x.data_ptr() % x.element_size():  # a tensor over a foreign buffer
        x = x.clone(memory_format=torch.contiguous_format)
    return x


def _pointers(rows, mode, clip, act_scale, out):
    q, scale, row_sum = out
    return (
        *(rows.data_ptr(), DTYPES[rows.dtype], rows.shape[0], rows.shape[1], rows.stride(0)),
        *(MODES[mode], clip, act_scale, q.data_ptr(), scale.data_ptr(), row_sum.data_ptr()),
    )


def check_device(name: str, tensor: torch.Tensor, device_type: str) -> None:
    if tensor.device.type != device_type:
        raise ValueError(f"{name} must be on {device_type}, got {tensor.device}")


def _check_bits(bits: int) -> None:
    if bits not in (2, 4, 8):
        raise ValueError(f"bits must be 2, 4 or 8, got {bits!r}")
