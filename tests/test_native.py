"""The native core: exact with every instruction set of this CPU, refusals, tensors of any layout, loading."""

import functools
import itertools
import json
import mmap
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import native_checks
import numpy as np
import pytest
import torch
from native_checks import (
    BF16,
    BITS,
    CHECKS,
    FP32,
    PER_TENSOR,
    PER_TOKEN,
    STATIC,
    WIDTHS,
    assert_quantized,
    hard_rows,
    quantize_oracle,
)

from dqkernels.kernels import native

needs_core = pytest.mark.skipif(native.native() is None, reason=native.why_absent() or "present")
ISAS = native.native().cpu_isas() if native.native() else ["scalar"]


def run_program(*arguments, isa=None):
    env = {k: v for k, v in os.environ.items() if k != "DQKERNELS_CPU"} | ({"DQKERNELS_CPU": isa} if isa else {})
    command = [sys.executable, native_checks.__file__, native.native().__file__, *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


@needs_core
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_is_exact(isa):
    done = run_program(isa=isa)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report.pop("isa") == isa
    assert len(report) == len(CHECKS) and all(report.values())


@needs_core
def test_guard_page_faults_on_one_element_too_many():
    assert run_program("--trip").returncode < 0  # killed by a signal


@needs_core
def test_the_flags_that_keep_the_bits_are_in_the_build():
    info = native.native().build_info()
    assert "-ffp-contract=off" in info["flags"]
    assert not info["cuda"] or "-fmad=false" in info["cuda_flags"]
    for flags in (info["flags"], info["cuda_flags"]):
        assert "fast" not in flags and "-march" not in flags


@needs_core
@pytest.mark.parametrize("isa", ["sse9", "AVX2", "avx512"])
def test_unknown_instruction_set_is_refused_with_the_valid_ones(isa):
    done = run_program(isa=isa)
    assert done.returncode == 1
    assert "scalar, avx2, avx_vnni, avx512_vnni, amx_int8, dotprod" in done.stderr


@needs_core
def test_absent_instruction_set_is_refused():
    names = ["scalar", "avx2", "avx_vnni", "avx512_vnni", "amx_int8", "dotprod"]
    absent = next(name for name in names if name not in ISAS)  # no CPU has all six
    done = run_program(isa=absent)
    assert done.returncode == 1 and "does not have" in done.stderr


@needs_core
def test_offsets_past_2_to_the_31():
    """Two rows 2^31 elements apart in a sparse mapping: an int32 offset would read the first row twice."""
    stride, k = 2**31 + 5, 200
    try:
        noreserve = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Python 3.11 on Linux does not name it
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | noreserve
        memory = mmap.mmap(-1, 2 * (stride + k), flags=flags)
    except (OSError, AttributeError) as error:
        pytest.skip(f"no sparse 4 GB mapping here: {error}")
    rows = np.ndarray((2, k), np.uint16, memory, 0, (2 * stride, 2))
    rows[0], rows[1] = 0x3F80, 0xBF80  # 1 and -1
    q, _ = assert_quantized(native.native(), rows, BF16, PER_TOKEN)
    assert (q[0] == 127).all() and (q[1] == -127).all()


@needs_core
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"dtype": 3}, "dtype code must be 0"),
        ({"mode": -1}, "mode must be 0"),
        ({"rows": -1}, "rows must be >= 0"),
        ({"k": 0}, "columns >= 1"),
        ({"row_stride": -1}, "row stride >= 0"),
        ({"row_stride": 2**62}, "63 bits"),
        ({"k": 2**24 + 2**18}, "int32 sum"),
        ({"clip": float("nan")}, "clip must be positive"),
        ({"clip": -1.0}, "clip must be positive"),
        ({"clip": float("inf")}, "clip must be positive"),
        *[({"mode": STATIC, "static_scale": s}, "act_scale must lie") for s in (0.0, -1.0, 1e-40, 3e38, float("nan"))],
        ({"x_ptr": 0}, "x_ptr is a null pointer"),
        ({"x_ptr": 2}, "x_ptr must be aligned to 4 bytes"),
        ({"scale_ptr": 0}, "scale_ptr is a null pointer"),
        ({"q_ptr": 0}, "q_ptr is a null pointer"),
    ],
)
def test_quantize_refuses_with_one_sentence(change, sentence):
    x, q, scale = np.ones((3, 8), np.float32), np.zeros((3, 8), np.int8), np.zeros(3, np.float32)
    arguments = {"x_ptr": x.ctypes.data, "dtype": FP32, "rows": 3, "k": 8, "row_stride": 8, "mode": PER_TOKEN}
    arguments |= {
        "clip": 0.0,
        "static_scale": 0.0,
        "q_ptr": q.ctypes.data,
        "scale_ptr": scale.ctypes.data,
        "sum_ptr": 0,
    }
    native.native().quantize_rows(**arguments)
    assert (q == 127).all()
    with pytest.raises(ValueError, match=sentence):
        native.native().quantize_rows(**arguments | change)


@needs_core
def test_pack_refuses_what_it_cannot_hold():
    core = native.native()
    codes, out = np.zeros((1, 4), np.int8), np.zeros((16, 128), np.uint8)
    for bits in BITS[:2]:
        low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
        for code in range(-128, 128):
            codes[0, 2] = code
            if low <= code <= high:
                core.pack(codes.ctypes.data, 1, 4, bits, out.ctypes.data)
            else:
                with pytest.raises(ValueError, match="outside the signed range"):
                    core.pack(codes.ctypes.data, 1, 4, bits, out.ctypes.data)
    for n, k, bits, sentence in [
        (1, 4, 3, "bits must be 2, 4 or 8"),
        (1, 0, 4, "columns >= 1"),
        (-1, 4, 4, "rows must be >= 0"),
        (2**40, 2**40, 4, "63 bits"),
        (2**63 - 1, 1, 4, "63 bits"),
        (1, 2**63 - 1, 8, "63 bits"),
    ]:
        for function in (core.pack, core.unpack):
            with pytest.raises(ValueError, match=sentence):
                function(codes.ctypes.data, n, k, bits, out.ctypes.data)


# -------------------------------------------------------------------------------------- tensors in and out


def layouts():
    """Name -> a tensor [.., 24] whose memory is laid out in that way."""
    x = torch.randn(6, 4, 24, generator=torch.Generator().manual_seed(0))
    misaligned = torch.frombuffer(bytearray(1 + x.numel() * 4), dtype=torch.float32, offset=1, count=x.numel())
    return {
        "contiguous": x,
        "one row": x[0, 0],
        "rows strided": x[:, 1, :],
        "columns sliced": torch.randn(5, 40)[:, 3:27],
        "transposed": torch.randn(24, 7).t(),
        "last stride 2": torch.randn(5, 48)[:, ::2],
        "expanded": torch.randn(1, 24).expand(9, 24),
        "outer axes swapped": x.transpose(0, 1),
        "unaligned": misaligned.copy_(x.flatten()).view(x.shape),
        "one column": torch.randn(4, 6)[:, 2:3],
        "no rows": torch.randn(0, 24),
        "no batch": torch.randn(3, 0, 24),
    }


@needs_core
@pytest.mark.parametrize("mode", ["per_token", "per_tensor", "static"])
@pytest.mark.parametrize("name", layouts())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_any_layout_gives_the_bits_of_a_contiguous_copy(name, mode, dtype):
    x = layouts()[name]
    x = x if dtype == torch.float32 else x.to(dtype)
    before = x.clone()
    q, scale, row_sum = native.quantize_rows(x, mode, 2.0, torch.tensor([0.02]), want_sum=True)
    assert q.shape == x.shape and scale.shape == row_sum.shape == x.shape[:-1]
    assert torch.equal(x, before)
    modes = {"per_token": PER_TOKEN, "per_tensor": PER_TENSOR, "static": STATIC}
    flat = x.contiguous().float().reshape(-1, x.shape[-1]).numpy()
    want_q, want_scale, want_sum = quantize_oracle(flat, modes[mode], 2.0, 0.02)
    np.testing.assert_array_equal(q.reshape(flat.shape), want_q)
    np.testing.assert_array_equal(scale.flatten(), want_scale)
    np.testing.assert_array_equal(row_sum.flatten(), want_sum)
    assert native.quantize_rows(x, mode, None, 0.02)[2].shape == (0,)


@needs_core
def test_tensor_functions_refuse_by_name():
    x = torch.randn(2, 8)
    for arguments, sentence in [
        ((x.double(), "per_token"), "x must be float32, float16 or bfloat16, got torch.float64"),
        ((x.to("meta"), "per_token"), "x must be on cpu, got meta"),
        ((x[:, :0], "per_token"), r"K >= 1, got \[2, 0\]"),
        ((x, "per_row"), "mode must be one of"),
        ((x, "per_token", 0.0), "clip must be positive"),
        ((x, "static"), "one element, got None"),
        ((x, "static", None, torch.ones(2)), "one element, got 2"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            native.quantize_rows(*arguments)
    with pytest.raises(ValueError, match="codes must be int8"):
        native.pack(x, 4)
    with pytest.raises(ValueError, match="bits must be 2, 4 or 8, got 3"):
        native.pack(x.to(torch.int8), 3)
    with pytest.raises(ValueError, match="qweight must be uint8"):
        native.unpack(torch.zeros(16, 63, dtype=torch.uint8), 3, 100, 4)


@needs_core
@pytest.mark.parametrize("bits", BITS)
def test_pack_agrees_with_the_torch_specification(bits):
    from dqkernels import packing

    low, high = packing.code_range(bits)
    codes = torch.randint(low, high + 1, (37, 390), dtype=torch.int8).t()[:301]  # not contiguous
    packed = native.pack(codes, bits)
    assert torch.equal(packed, packing.pack(codes, bits))
    assert torch.equal(native.unpack(packed, *codes.shape, bits), codes)


# ------------------------------------------------------------------------------------------------- loading


def test_importing_loads_nothing():
    code = "import sys, dqkernels.kernels.native; sys.exit('dqkernels._C' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


class Distribution:
    def __init__(self, folder):
        self.folder = folder
        self.files = [Path("dqkernels/_build_info.json"), Path("dqkernels/other.py")]

    def locate_file(self, file):
        return self.folder / file


@pytest.fixture
def source_tree(monkeypatch, tmp_path):
    """A package folder without an extension, and nothing installed elsewhere."""
    (tmp_path / "src").mkdir()
    monkeypatch.setattr(native, "_PACKAGE", tmp_path / "src")
    monkeypatch.setattr(native.metadata, "distributions", lambda name: [])
    monkeypatch.setattr(native, "_loaded", None)
    return tmp_path


def test_absent_core_says_why(source_tree):
    assert native.native() is None
    assert "never built" in native.why_absent()
    with pytest.raises(RuntimeError, match="never built"):
        native.quantize_rows(torch.ones(1, 1), "per_token")


def test_absent_core_repeats_the_reasons_of_the_build(source_tree):
    (source_tree / "src" / "_build_info.json").write_text(json.dumps({"reasons": ["cpu: no compiler"]}))
    assert native.native() is None
    assert native.why_absent() == "dqkernels._C is absent: cpu: no compiler"


def test_broken_core_is_a_reason_not_a_crash(source_tree):
    suffix = native.EXTENSION_SUFFIXES[0]
    (source_tree / "src" / f"_C{suffix}").write_bytes(b"not a library")
    assert native.native() is None
    assert f"_C{suffix} does not load" in native.why_absent()


@needs_core
def test_source_tree_uses_the_installed_core(source_tree, monkeypatch):
    built = Path(native.importlib.util.find_spec("dqkernels").submodule_search_locations[0])
    path = next(p for s in native.EXTENSION_SUFFIXES if (p := built / f"_C{s}").is_file())
    installed = source_tree / "site" / "dqkernels"
    installed.mkdir(parents=True)
    shutil.copy(path, installed)
    (installed / "_build_info.json").write_text("{}")
    monkeypatch.setattr(native.metadata, "distributions", lambda name: [Distribution(source_tree / "site")])
    assert native.native() is not None and native.why_absent() == ""
    assert Path(native.native().__file__) == installed / path.name

    monkeypatch.setattr(native, "_loaded", None)
    monkeypatch.setattr(native, "ABI_VERSION", native.ABI_VERSION + 1)
    assert native.native() is None
    assert "has interface" in native.why_absent()


@needs_core
def test_cold_threads_agree(monkeypatch):
    monkeypatch.setattr(native, "_loaded", None)
    x = torch.randn(64, 300, generator=torch.Generator().manual_seed(0))
    start, results = threading.Barrier(8), [None] * 8

    def work(index):
        start.wait()
        results[index] = native.quantize_rows(x, "per_token", want_sum=True)

    threads = [threading.Thread(target=functools.partial(work, i)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


# -------------------------------------------------------------------------------------------------- on a GPU


@needs_core
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", ["per_token", "per_tensor", "static"])
def test_cuda_gives_the_bits_of_the_cpu(dtype, mode):
    if not hasattr(native.native(), "cuda_quantize_rows"):
        pytest.skip("the extension was built without CUDA: " + "; ".join(native.build_info().get("reasons", [])))
    rng = np.random.default_rng(4)
    for k, clip in itertools.product(WIDTHS, (None, 2.5)):
        rows = torch.from_numpy(hard_rows(rng, k)).to(dtype)
        rows[3, k // 2] = float("nan")
        for x in (rows, rows[:, : max(1, k - 1)], rows[:0], rows[-5:]):
            want = native.quantize_rows(x, mode, clip, 0.0173, want_sum=True)
            for act_scale in (0.0173, torch.tensor([0.0173], device="cuda")):
                got = native.cuda_quantize_rows(x.cuda(), mode, clip, act_scale, want_sum=True)
                for a, b in zip(got, want, strict=True):
                    np.testing.assert_array_equal(a.cpu(), b)


@pytest.mark.parametrize(
    ("archs", "card", "code"),
    [
        ("80-real 90a-real", (8, 0), 80),
        ("80-real 90a-real", (8, 9), 80),
        ("80-real 90a-real", (9, 0), 90),
        ("80-real 90a-real", (10, 0), None),
        ("86-real", (8, 0), None),
        ("80-real 90-virtual", (12, 0), 90),
        ("90a-virtual", (10, 0), None),
        ("80", (12, 0), 80),
        ("80 90a", (12, 0), 80),
        ("90-real 80-virtual", (9, 0), 90),
        ("80;100;90", (10, 3), 100),
        ("100f-real", (10, 3), None),
        ("120-real 120-virtual", (9, 0), None),
        ("", (8, 0), None),
    ],
)
def test_which_code_runs_on_a_card(archs, card, code):
    assert native.code_for(archs, card) == code


def test_a_build_for_another_card_is_named(monkeypatch):
    from types import SimpleNamespace

    from dqkernels.backends import cuda

    core = SimpleNamespace(cuda_quantize_rows=None, build_info=lambda: {"cuda_archs": "80-real"})
    monkeypatch.setattr(native, "native", lambda: core)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert cuda.available("cuda") == (False, "compiled for 80-real, which does not run on compute capability 9.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    assert cuda.available("cuda")[0]
