"""csrc/cuda/quantize.cu on the simulator, against the package's own specification, bit by bit."""

import zlib

import numpy as np
import pytest
import torch
from harness import ABSENT, Case, given, run_cases, wanted
from pairwise import covering

from dqkernels import qmath

DTYPES = {"fp32": (0, torch.float32), "fp16": (1, torch.float16), "bf16": (2, torch.bfloat16)}
MODES = {"per_token": 0, "per_tensor": 1, "static": 2}
ACT_SCALE = 0.0173

AXES = {
    "dtype": list(DTYPES),
    "mode": list(MODES),
    "clip": [None, 2.5],
    "rows": [0, 1, 3, 17],
    # Vector steps need k % 8 == 0; 256 threads take 8 elements each: 2056 and 300 go round again.
    "k": [1, 7, 8, 33, 40, 264, 300, 2056],
    "layout": ["contiguous", "strided", "strided by 16 bytes", "expanded", "off by one"],
    "special": ["none", "NaN", "Inf", "zeros", "tiny", "outlier", "ties", "halves of the type"],
    "want_sum": [False, True],
    "device_scale": [False, True],
}


def rows_of(case, rng):
    """float [rows, k] with the special row in the middle, in the type of the case."""
    rows, k, special = case["rows"], case["k"], case["special"]
    x = rng.standard_normal((rows, k)).astype(np.float32) * 2
    at = slice(rows // 2, rows // 2 + 1) if rows else slice(0, 0)
    if special == "zeros":
        x[at] = 0.0
    elif special == "tiny":
        x[at] = 2.0**-101
    elif special == "outlier":
        x[at, k // 2] = 6e4
    elif special == "ties":
        x[at] = np.arange(k) % 254 - 126.5
        x[at, -1] = 127
    elif special == "halves of the type":
        x[at] = 6e-8  # a subnormal half
    x = torch.from_numpy(x).to(DTYPES[case["dtype"]][1])
    if special in ("NaN", "Inf"):
        x[at, k - 1] = float("nan") if special == "NaN" else float("-inf")
    return x


def storage(x):
    """numpy cannot name bfloat16: 16-bit types travel as their bits."""
    return x.numpy() if x.dtype == torch.float32 else x.view(torch.int16).numpy()


def laid_out(x, layout):
    """The bytes up to the last element that may be read, the row stride in elements, and the base's offset."""
    rows, k = x.shape
    raw = storage(x.contiguous())
    if layout == "expanded":
        return raw[:1] if rows else raw, 0, 0
    if layout in ("contiguous", "off by one"):
        return raw, k, 0 if layout == "contiguous" else raw.itemsize
    stride = k + 5 if layout == "strided" else (k * raw.itemsize + 31) // 16 * 16 // raw.itemsize
    flat = np.full(max(0, (rows - 1) * stride + k), 0x7BCD, raw.dtype)  # between rows: what nobody may count in
    for row in range(rows):
        flat[row * stride : row * stride + k] = raw[row]
    return flat, stride, 0


def quantize_case(options):
    name = " ".join(f"{axis}={value}" for axis, value in options.items())
    x = rows_of(options, np.random.default_rng(zlib.crc32(name.encode())))
    if options["layout"] == "expanded" and options["rows"]:
        x = x[options["rows"] // 2].expand(options["rows"], -1)
    flat, stride, offset = laid_out(x, options["layout"])
    static, on_device = options["mode"] == "static", options["device_scale"]
    act_scale = torch.tensor([ACT_SCALE]) if static else None
    want_q, want_scale, want_sum = qmath.quantize_activation(x, options["mode"], options["clip"], act_scale, True)
    rows, k = x.shape
    scale = np.float32(ACT_SCALE)
    scalars = [rows, k, stride, DTYPES[options["dtype"]][0], MODES[options["mode"]]]
    scalars += [float(options["clip"] or 0.0), 0.0 if on_device or not static else float(scale)]
    buffers = [given(flat, offset), wanted((rows, k), np.int8), wanted(rows, np.float32)]
    buffers.append(wanted(rows, np.int32) if options["want_sum"] else ABSENT)
    buffers.append(given(np.array([scale])) if on_device and static else ABSENT)
    expected = [want_q.numpy(), want_scale.numpy()] + ([want_sum.numpy()] if options["want_sum"] else [])
    return Case(name, "quantize", scalars, buffers, expected)


@pytest.fixture
def program(sim_program):
    return sim_program(
        "quantize_host.cpp", "csrc/cuda/quantize.cu",
        "csrc/cpu/quantize.cpp", "csrc/cpu/quantize_x86.cpp", "csrc/cpu/isa.cpp",
    )  # fmt: skip


GRID = covering(AXES)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_codes_scales_and_sums(program, mode, dtype):
    """Any two options of AXES meet in some case."""
    chosen = [options for options in GRID if options["mode"] == mode and options["dtype"] == dtype]
    assert run_cases(program, map(quantize_case, chosen)) >= 5


def test_the_grid_does_not_quantize_to_zero():
    codes = [case.expected[0] for case in map(quantize_case, GRID) if case.expected[0].size]
    assert sum(int(np.any(q)) for q in codes) > len(codes) / 2


def test_refusals_come_before_any_memory_is_touched(program):
    nothing = [ABSENT] * 5
    run_cases(program, [
        Case("k = 0", "quantize", [1, 0, 0, 0, 0, 0.0, 0.0], nothing, [], 4),
        Case("codes", "quantize", [1, 4, 4, 3, 0, 0.0, 0.0], nothing, [], 2),
        Case("negative clip", "quantize", [1, 4, 4, 0, 0, -1.0, 0.0], nothing, [], 7),
        Case("static without a scale", "quantize", [1, 4, 4, 0, 2, 0.0, 0.0], nothing, [], 8),
        Case("no rows", "quantize", [0, 4, 4, 0, 1, 0.0, 0.0], nothing, []),
    ])  # fmt: skip
